"""`genpolicy quickstart`: the embedded model learns by reinforcement, and what changed is measured on fresh noise."""

import time
from pathlib import Path

from genpolicy import config, report
from genpolicy.build import deployed_sampler, make_policy, make_rewards, prompt_lines, saved
from genpolicy.config import ConfigError, Experiment, make
from genpolicy.evaluate import Evaluation, interval, measure, paired
from genpolicy.experiment import finished, rehearse, train

CONFIG = "quickstart"
REWARD = "shapes_strict"
FRESH = 2_000_003
"""Plus the run's seed: the noise of the final measurement, which neither training nor its evaluations draw from."""
PER_CAPTION = 6
SHOWN = 24


def quickstart(out: Path, seed: int) -> int:
    """Train configs/quickstart.yaml into ``out`` (or go on with it), measure before and after, and say where all is.

    Returns the exit code. Deterministic given the seed, times aside.
    """
    started = time.perf_counter()
    overrides = [f"--seed={seed}", f"--output={out}"]
    experiment = config.load(CONFIG, overrides)
    _require_same(experiment, out)
    resumed = (out / "config.yaml").is_file()
    _announce(experiment, out, resumed, overrides)
    result = train(out / "config.yaml") if resumed else train(experiment)
    if not finished(out):
        print("\nStopped; the same command goes on from here.")
        return 0
    print("\nMeasuring before and after on the held-out captions, with noise that nothing has used yet ...")
    before, after = _measure(experiment, out, FRESH + seed)
    _tell(before, after, out)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{result.summary['training_s'] / 60:.1f} minutes of learning, {minutes:.1f} in all. Look at")
    print(f"  {out / 'figures' / 'before_after.png'}   {SHOWN} captions at even steps through the list, not chosen")
    print(f"  {out / 'figures' / 'curves.png'}   what happened on the way")
    print(f'  genpolicy sample {out} --prompts "a red circle left of a blue square" --n 8 --out {out}/drawn')
    return 0


def _require_same(experiment: Experiment, out: Path) -> None:
    file = out / "config.yaml"
    if file.is_file() and config.load(file) != experiment:
        raise ConfigError(f"{out} holds another run, or a quickstart with another seed: choose another --out")


def _announce(experiment: Experiment, out: Path, resumed: bool, overrides: list[str]) -> None:
    """What will happen and how long it takes here, from one iteration that is measured and thrown away."""
    captions = len(prompt_lines(experiment.task["prompts"]))
    held_out = len(prompt_lines(str(experiment.eval.prompts)))
    print(
        "A small Stable Diffusion 3 (assets/shapes-sd3) draws two coloured shapes from captions like\n"
        f'"a red circle left of a blue square". It has seen no picture of the {captions} captions it now practises on:\n'
        f"a program checks what it draws, and {experiment.method['name']} turns that into learning. {held_out} further\n"
        "captions are kept out of everything and measure what it has learned.\n"
    )
    if resumed:
        print(f"Going on with the run in {out}.\n")
        return
    cost = rehearse(CONFIG, overrides)[1]
    print(
        f"{cost.iterations} iterations of {cost.samples} pictures, {cost.evaluations_per_sample:.0f} network "
        f"evaluations each: about {cost.seconds / 60:.1f} minutes on this machine.\n"
        f"Everything is written to {out}. Ctrl-C stops after the current iteration; the same command goes on.\n"
    )


def _measure(experiment: Experiment, out: Path, seed: int) -> tuple[Evaluation, Evaluation]:
    """The base and the trained policy with the same sampler, prompts and noise."""
    rewards, prompts = make_rewards(experiment.reward), prompt_lines(str(experiment.eval.prompts))
    base = make_policy(make("models", experiment.policy), deployed_sampler(experiment.chain, experiment.eval.sampler))
    found = []
    for policy in (base, saved(out).load()):
        samples = PER_CAPTION * len(prompts)
        result, _ = measure(policy, rewards, prompts=prompts, samples=samples, seed=seed, shown=len(prompts))
        found.append(result)
    return found[0], found[1]


def _tell(before: Evaluation, after: Evaluation, out: Path) -> None:
    parts = before.parts[REWARD], after.parts[REWARD]
    captions = len(set(before.prompts))
    difference, low, high = paired(*parts, captions)
    print(f"\nDrawn exactly right, {before.samples} pictures of {captions} held-out captions [95 % interval]:")
    numbers = {"n": before.samples, "difference": {"value": difference, "ci95": [low, high]}}
    for name, evaluation, part in (("before", before, parts[0]), ("after", after, parts[1])):
        value, (least, most) = float(part.mean()), interval(part)
        print(f"  {name:<10} {value:6.1%}   [{least:.1%}, {most:.1%}]")
        numbers[name] = {"value": value, "ci95": [least, most], "diversity": evaluation.diversity}
    print(f"  {'difference':<10} {100 * difference:+6.1f} points   [{100 * low:+.1f}, {100 * high:+.1f}], paired")
    change = after.diversity / before.diversity - 1
    print(f"Diversity within a caption: {before.diversity:.3f} before, {after.diversity:.3f} after ({change:+.0%})")
    report.write_json(out / "quickstart.json", numbers)
    rows = [i * captions // SHOWN for i in range(SHOWN)]
    report.before_after(
        before.outputs[rows],
        after.outputs[rows],
        [before.prompts[row] for row in rows],
        out / "figures" / "before_after.png",
        (parts[0][rows], parts[1][rows]),
    )
