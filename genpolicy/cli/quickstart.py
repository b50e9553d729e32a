"""`genpolicy quickstart`: both worlds learn by reinforcement on the embedded models, and what
changed is measured afresh.
"""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import make
from genpolicy.config.schema import Experiment
from genpolicy.contracts.model import ControlModel
from genpolicy.evaluation import metrics_file, pictures
from genpolicy.evaluation.episode_scores import ControlEvaluation, evaluate_control
from genpolicy.evaluation.film import side_by_side
from genpolicy.evaluation.prompt_scores import Evaluation, interval, measure, paired
from genpolicy.policy.files import saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import deployed_sampler, make_policy
from genpolicy.tasks._simulators import RenderError
from genpolicy.training.build import control_model, make_rewards, prompt_lines
from genpolicy.training.experiment import Rehearsal, finished, rehearse, train

PICTURES, ROBOT = "quickstart", "quickstart_robot"
"""The configurations of the two halves."""
REWARD = "shapes_strict"
FRESH = 2_000_003
"""Plus the run's seed: the noise of the final measurement, which neither training nor its
evaluations draw from.
"""
FRESH_STARTS = 5_000_000
"""Plus a thousand times the run's seed: the first reset seed of the robot's final measurement, used
by nothing else.
"""
PER_CAPTION = 6
SHOWN = 24
EPISODES = 300


def quickstart(out: Path, seed: int, world: str) -> int:
    """Both worlds side by side, each on a core of its own: pictures in this process, the robot in
    another; or one alone.

    Returns the exit code. Deterministic given the seed, times aside.
    """
    if world != "both":
        return {"pictures": _pictures, "robot": _robot}[world](out / world, seed)
    if importlib.util.find_spec("metaworld") is None:
        print(
            'The robot\'s half needs a simulator: pip install "genpolicy[simulation]". Here is the other half.\n'
        )
        return _pictures(out / "pictures", seed)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "robot.log"
    command = [sys.executable, "-m", "genpolicy", "quickstart", "--world", "robot"]
    print(
        f"Two worlds, one method each, side by side. The robot's half writes to {log} meanwhile.\n"
    )
    with open(log, "w") as file:
        robot = subprocess.Popen(
            [*command, "--out", str(out), "--seed", str(seed)], stdout=file, stderr=file
        )
    try:
        code = _pictures(out / "pictures", seed)
        print("\n" + "-" * 80 + "\nThe robot:\n", flush=True)
        code = robot.wait() or code
    except BaseException:
        robot.terminate()
        robot.wait()
        raise
    print(
        "\n".join(line for line in log.read_text().split("\n") if "\r" not in line)
    )  # all but the progress bar
    return code


def _learn(
    name: str, out: Path, seed: int, announce: Callable[[Experiment, Rehearsal], None]
) -> Experiment | None:
    """Train a shipped configuration into ``out``, or go on with it; None where a signal stopped it."""
    overrides = [f"--seed={seed}", f"--output={out}"]
    experiment = parse.load(name, overrides)
    _require_same(experiment, out)
    resumed = (out / "config.yaml").is_file()
    if resumed:
        print(f"Going on with the run in {out}.\n")
    else:
        announce(experiment, rehearse(name, overrides)[1])
        print(
            f"Everything is written to {out}. Ctrl-C stops after the current iteration; the same command goes on.\n"
        )
    train(out / "config.yaml") if resumed else train(experiment)
    if not finished(out):
        print("\nStopped; the same command goes on from here.")
        return None
    return experiment


def _require_same(experiment: Experiment, out: Path) -> None:
    file = out / "config.yaml"
    if file.is_file() and parse.load(file) != experiment:
        raise ConfigError(
            f"{out} holds another run, or a quickstart with another seed: choose another --out"
        )


# Pictures


def _pictures(out: Path, seed: int) -> int:
    started = time.perf_counter()
    experiment = _learn(PICTURES, out, seed, _announce_pictures)
    if experiment is None:
        return 0
    print(
        "\nMeasuring before and after on the held-out captions, with noise that nothing has used yet ..."
    )
    before, after = _measure(experiment, out, FRESH + seed)
    _tell(before, after, out)
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes in all. Look at")
    print(
        f"  {out / 'figures' / 'before_after.png'}   {SHOWN} captions at even steps through the list, not chosen"
    )
    print(f"  {out / 'figures' / 'curves.png'}   what happened on the way")
    print(
        f'  genpolicy sample {out} --prompts "a red circle left of a blue square" --n 8 --out {out}/drawn'
    )
    return 0


def _announce_pictures(experiment: Experiment, cost: Rehearsal) -> None:
    """What will happen and how long it takes here, from one iteration that is measured and thrown
    away.
    """
    captions = len(prompt_lines(experiment.task["prompts"]))
    held_out = len(prompt_lines(str(experiment.eval.prompts)))
    print(
        "A small Stable Diffusion 3 (assets/shapes-sd3) draws two coloured shapes from captions like\n"
        f'"a red circle left of a blue square". It has seen no picture of the {captions} captions it now practises on:\n'
        f"a program checks what it draws, and {experiment.method['name']} turns that into learning. {held_out} further\n"
        "captions are kept out of everything and measure what it has learned.\n\n"
        f"{cost.iterations} iterations of {cost.stages[0].samples} pictures, {cost.stages[0].evaluations_per_sample:.0f} network "
        f"evaluations each: about {cost.seconds / 60:.1f} minutes on this machine."
    )


def _measure(experiment: Experiment, out: Path, seed: int) -> tuple[Evaluation, Evaluation]:
    """The base and the trained policy with the same sampler, prompts and noise."""
    rewards, prompts = make_rewards(experiment.reward), prompt_lines(str(experiment.eval.prompts))
    base = make_policy(
        make("models", experiment.policy),
        deployed_sampler(experiment.chain, experiment.eval.sampler),
    )
    found = []
    for policy in (base, saved(out).load()):
        samples = PER_CAPTION * len(prompts)
        result, _ = measure(
            policy, rewards, prompts=prompts, samples=samples, seed=seed, shown=len(prompts)
        )
        found.append(result)
    return found[0], found[1]


def _tell(before: Evaluation, after: Evaluation, out: Path) -> None:
    parts = before.parts[REWARD], after.parts[REWARD]
    captions = len(set(before.prompts))
    difference, low, high = paired(*parts, captions)
    print(
        f"\nDrawn exactly right, {before.samples} pictures of {captions} held-out captions [95 % interval]:"
    )
    numbers = {"n": before.samples, "difference": {"value": difference, "ci95": [low, high]}}
    for name, evaluation, part in (("before", before, parts[0]), ("after", after, parts[1])):
        value, (least, most) = float(part.mean()), interval(part)
        print(f"  {name:<10} {value:6.1%}   [{least:.1%}, {most:.1%}]")
        numbers[name] = {"value": value, "ci95": [least, most], "diversity": evaluation.diversity}
    print(
        f"  {'difference':<10} {100 * difference:+6.1f} points   [{100 * low:+.1f}, {100 * high:+.1f}], paired"
    )
    change = after.diversity / before.diversity - 1
    print(
        f"Diversity within a caption: {before.diversity:.3f} before, {after.diversity:.3f} after ({change:+.0%})"
    )
    metrics_file.write_json(out / "quickstart.json", numbers)
    rows = [i * captions // SHOWN for i in range(SHOWN)]
    pictures.before_after(
        before.outputs[rows],
        after.outputs[rows],
        [before.prompts[row] for row in rows],
        out / "figures" / "before_after.png",
        (parts[0][rows], parts[1][rows]),
    )


# A robot


def _robot(out: Path, seed: int) -> int:
    started = time.perf_counter()
    experiment = _learn(ROBOT, out, seed, _announce_robot)
    if experiment is None:
        return 0
    print("\nMeasuring before and after on starts that nothing has used yet ...")
    task = make("tasks", experiment.task)
    clone = saved(experiment.policy["pretrained"])
    sampler = deployed_sampler(experiment.chain, experiment.eval.sampler, control=True)
    policies = {
        "as cloned": clone.load(),
        "as cloned, new sampler": make_policy(
            control_model(experiment.policy, task, None), sampler
        ),
        "after": saved(out).load(),
    }
    first = FRESH_STARTS + 1000 * seed
    found = {
        name: _play(policy, task, experiment.environments, first)
        for name, policy in policies.items()
    }
    _tell_robot(found, out, first)
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes in all. Look at")
    failed = found["as cloned"].success == 0
    best = (failed & (found["after"].success == 1)).nonzero().flatten().tolist()
    if best:
        film = out / "figures" / "before_after.gif"
        pair = {"before": policies["as cloned"], "after": policies["after"]}
        try:
            side_by_side(pair, task, first, film, episode=best[0])
            print(f"  {film}   the first start at which the clone fails, before (left) and after")
        except RenderError as error:
            print(f"  (no film: {error})")
    print(f"  {out / 'figures' / 'curves.png'}   what happened on the way")
    print(
        f"  genpolicy evaluate {out} --samplers mean ode stochastic   one network, three ways to sample it"
    )
    return 0


def _announce_robot(experiment: Experiment, cost: Rehearsal) -> None:
    print(
        f"A robot arm in simulation, task {experiment.task['env']}. Its policy (assets/assembly-clone, 0.3 million weights, ten\n"
        "denoising steps) was cloned from five demonstrations and succeeds about half the time. It is told nothing but\n"
        f"success or failure, once an episode; {experiment.method['name']} takes it from there.\n\n"
        f"{cost.iterations} iterations of about {cost.stages[0].samples} decisions, {cost.stages[0].evaluations_per_sample:.0f} network "
        f"evaluations each: about {cost.seconds / 60:.1f} minutes on this machine."
    )


def _play(policy: ChainPolicy, task: Any, slots: int, first: int) -> ControlEvaluation:
    environments = task.environments(slots, cast(ControlModel, policy.model).history)
    try:
        return evaluate_control(policy, environments, episodes=EPISODES, seed=first)
    finally:
        environments.close()


def _tell_robot(found: dict[str, ControlEvaluation], out: Path, first: int) -> None:
    print(f"\nSuccess in {EPISODES} episodes from fresh starts [95 % interval]:")
    numbers: dict[str, Any] = {"n": EPISODES, "first_seed": first}
    for name, evaluation in found.items():
        value, (low, high) = float(evaluation.success.mean()), interval(evaluation.success)
        steps = float(evaluation.lengths.mean())
        print(f"  {name:<24} {value:6.1%}   [{low:.1%}, {high:.1%}]   {steps:.0f} steps an episode")
        numbers[name] = {"value": value, "ci95": [low, high], "length": steps}
    difference, low, high = paired(found["as cloned"].success, found["after"].success, EPISODES)
    print(
        f"  {'difference':<24} {100 * difference:+6.1f} points   [{100 * low:+.1f}, {100 * high:+.1f}], paired"
    )
    numbers["difference"] = {"value": difference, "ci95": [low, high]}
    metrics_file.write_json(out / "quickstart.json", numbers)
