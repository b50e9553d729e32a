"""The quickstart's robot: a clone of five demonstrations learns from success and failure alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from genpolicy.config.errors import RenderError
from genpolicy.config.leaves import make
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import Experiment
from genpolicy.contracts.model import ControlModel
from genpolicy.contracts.task import ControlTask
from genpolicy.evaluation import metrics_file
from genpolicy.evaluation.episode_scores import ControlEvaluation, evaluate_control
from genpolicy.evaluation.film import side_by_side
from genpolicy.evaluation.statistics import interval, paired
from genpolicy.policy.files import saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import deployed_sampler, make_policy
from genpolicy.rollout.guard import guarded
from genpolicy.training.build import control_model
from genpolicy.training.rehearsal import Rehearsal

CONFIG = "quickstart_robot"
"""The shipped configuration."""
FRESH_STARTS = 5_000_000
"""The final measurement's first reset seed is FRESH_STARTS + 1000 times the run's seed; nothing
else uses these starts.
"""
EPISODES = 300
"""Episodes of the final measurement, per policy."""
CLONE, RESAMPLED, TRAINED = "as cloned", "as cloned, new sampler", "after"
"""The policies of the final measurement."""


def announce(experiment: Experiment, cost: Rehearsal) -> None:
    """Prints what will happen and how long it takes here, from one iteration that was measured and
    thrown away.
    """
    stage = cost.stages[0]
    print(
        f"A robot arm in simulation, task {experiment.task['env']}. Its policy "
        "(assets/assembly-clone, 0.3 million weights, ten\n"
        "denoising steps) was cloned from five demonstrations and succeeds about half the time. "
        "It is told nothing but\n"
        f"success or failure, once an episode; {experiment.method['name']} takes it from there.\n\n"
        f"{cost.iterations} iterations of about {stage.samples} decisions, "
        f"{stage.evaluations_per_sample:.0f} network evaluations each: "
        f"about {cost.seconds / 60:.1f} minutes on this machine."
    )


def report(experiment: Experiment, out: Path, seed: int) -> list[str]:
    """Measures the clone, the clone with the new sampler and the trained policy, prints them, and
    writes quickstart.json and a film; returns lines that name what there is to look at.
    """
    print("\nMeasuring before and after on starts that nothing has used yet ...")
    task = make("tasks", experiment.task, PERSON)
    sampler = deployed_sampler(experiment.chain, experiment.eval.sampler, control=True)
    policies = {
        CLONE: saved(experiment.policy["pretrained"]).load(),
        RESAMPLED: make_policy(
            control_model(experiment.policy, task, None, PERSON), sampler, origin=PERSON
        ),
        TRAINED: saved(out).load(),
    }
    first = FRESH_STARTS + 1000 * seed
    found = {name: _play(policy, task, experiment, first) for name, policy in policies.items()}
    _print_and_write(found, out, first)
    return [
        *_film(policies, found, task, first, out / "figures" / "before_after.gif"),
        f"{out / 'figures' / 'curves.png'}   what happened on the way",
        f"genpolicy evaluate {out} --samplers mean ode stochastic"
        "   one network, three ways to sample it",
    ]


def _play(
    policy: ChainPolicy, task: ControlTask, experiment: Experiment, first: int
) -> ControlEvaluation:
    """Plays `EPISODES` episodes from the reset seeds ``first``, ``first`` + 1, ..."""
    name, slots = str(experiment.task["name"]), experiment.environments
    history = cast(ControlModel, policy.model).history
    environments = guarded(task, name, slots, history, experiment.patience)
    try:
        return evaluate_control(policy, environments, episodes=EPISODES, seed=first)
    finally:
        environments.close()


def _print_and_write(found: Mapping[str, ControlEvaluation], out: Path, first: int) -> None:
    """Reports each policy's success rate, and the paired difference of the trained one to the
    clone.
    """
    print(f"\nSuccess in {EPISODES} episodes from fresh starts [95 % interval]:")
    numbers: dict[str, Any] = {"n": EPISODES, "first_seed": first}
    for name, evaluation in found.items():
        value, (low, high) = float(evaluation.success.mean()), interval(evaluation.success)
        steps = float(evaluation.lengths.mean())
        print(f"  {name:<24} {value:6.1%}   [{low:.1%}, {high:.1%}]   {steps:.0f} steps an episode")
        numbers[name] = {"value": value, "ci95": [low, high], "length": steps}
    difference, low, high = paired(found[CLONE].success, found[TRAINED].success, EPISODES)
    points, bounds = f"{100 * difference:+6.1f} points", f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    print(f"  {'difference':<24} {points}   {bounds}, paired")
    numbers["difference"] = {"value": difference, "ci95": [low, high]}
    metrics_file.write_json(out / "quickstart.json", numbers)


def _film(
    policies: Mapping[str, ChainPolicy],
    found: Mapping[str, ControlEvaluation],
    task: ControlTask,
    first: int,
    path: Path,
) -> list[str]:
    """Films the first start at which the clone fails and the trained policy succeeds, and returns
    the line that names the film; an empty list where there is no such start.
    """
    mended = (found[CLONE].success == 0) & (found[TRAINED].success == 1)
    starts = mended.nonzero().flatten().tolist()
    if not starts:
        return []
    pair = {"before": policies[CLONE], "after": policies[TRAINED]}
    try:
        side_by_side(pair, task, first, path, episode=starts[0])
    except RenderError as error:
        return [f"(no film: {error})"]
    return [f"{path}   the first start at which the clone fails, before (left) and after"]
