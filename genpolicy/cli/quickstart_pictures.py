"""The quickstart's pictures: a small Stable Diffusion 3 learns to draw what its captions say."""

from pathlib import Path

from genpolicy.config.leaves import make
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import Experiment
from genpolicy.evaluation import metrics_file, pictures
from genpolicy.evaluation.prompt_scores import Evaluation, measure
from genpolicy.evaluation.statistics import interval, paired
from genpolicy.policy.files import saved
from genpolicy.policy.sampler import deployed_sampler, make_policy
from genpolicy.training.build import make_rewards, prompt_lines
from genpolicy.training.rehearsal import Rehearsal

CONFIG = "quickstart"
"""The shipped configuration."""
REWARD = "shapes_strict"
"""The reward whose share of ones is reported."""
FRESH = 2_000_003
"""The final measurement's noise has the seed FRESH + the run's seed, from which neither training
nor its evaluations draw.
"""
PER_CAPTION = 6
"""Pictures per held-out caption in the final measurement."""
SHOWN = 24
"""Captions in the figure of pictures before and after."""


def announce(experiment: Experiment, cost: Rehearsal) -> None:
    """Prints what will happen and how long it takes here, from one iteration that was measured and
    thrown away.
    """
    captions = len(prompt_lines(experiment.task["prompts"]))
    held_out = len(prompt_lines(str(experiment.eval.prompts)))
    stage = cost.stages[0]
    print(
        "A small Stable Diffusion 3 (assets/shapes-sd3) draws two coloured shapes from captions "
        'like\n"a red circle left of a blue square". '
        f"It has seen no picture of the {captions} captions it now practises on:\n"
        f"a program checks what it draws, and {experiment.method['name']} turns that into "
        f"learning. {held_out} further\n"
        "captions are kept out of everything and measure what it has learned.\n\n"
        f"{cost.iterations} iterations of {stage.samples} pictures, "
        f"{stage.evaluations_per_sample:.0f} network evaluations each: "
        f"about {cost.seconds / 60:.1f} minutes on this machine."
    )


def report(experiment: Experiment, out: Path, seed: int) -> list[str]:
    """Measures the base and the trained policy, prints both, and writes quickstart.json and the
    figure; returns lines that name what there is to look at.
    """
    print(
        "\nMeasuring before and after on the held-out captions, "
        "with noise that nothing has used yet ..."
    )
    before, after = _measured(experiment, out, FRESH + seed)
    _print_and_write(before, after, out)
    figure = out / "figures" / "before_after.png"
    prompt = '"a red circle left of a blue square"'
    return [
        f"{figure}   {SHOWN} captions at even steps through the list, not chosen",
        f"{out / 'figures' / 'curves.png'}   what happened on the way",
        f"genpolicy sample {out} --prompts {prompt} --n 8 --out {out}/drawn",
    ]


def _measured(experiment: Experiment, out: Path, seed: int) -> tuple[Evaluation, Evaluation]:
    """Evaluates the base and the trained policy with the same sampler, prompts and noise."""
    rewards = make_rewards(experiment.reward, PERSON)
    prompts = prompt_lines(str(experiment.eval.prompts))
    sampler = deployed_sampler(experiment.chain, experiment.eval.sampler)
    base = make_policy(make("models", experiment.policy, PERSON), sampler, origin=PERSON)
    samples, shown = PER_CAPTION * len(prompts), len(prompts)
    before, after = (
        measure(policy, rewards, prompts=prompts, samples=samples, seed=seed, shown=shown)[0]
        for policy in (base, saved(out).load())
    )
    return before, after


def _print_and_write(before: Evaluation, after: Evaluation, out: Path) -> None:
    """Reports the share of pictures drawn exactly right, its difference, and the diversity."""
    parts = before.parts[REWARD], after.parts[REWARD]
    captions = len(set(before.prompts))
    difference, low, high = paired(*parts, captions)
    # the table
    print(
        f"\nDrawn exactly right, {before.samples} pictures of {captions} held-out captions "
        "[95 % interval]:"
    )
    numbers = {"n": before.samples, "difference": {"value": difference, "ci95": [low, high]}}
    for name, evaluation, part in (("before", before, parts[0]), ("after", after, parts[1])):
        value, (least, most) = float(part.mean()), interval(part)
        print(f"  {name:<10} {value:6.1%}   [{least:.1%}, {most:.1%}]")
        numbers[name] = {"value": value, "ci95": [least, most], "diversity": evaluation.diversity}
    points, bounds = f"{100 * difference:+6.1f} points", f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    print(f"  {'difference':<10} {points}   {bounds}, paired")
    change = after.diversity / before.diversity - 1
    print(
        f"Diversity within a caption: {before.diversity:.3f} before, "
        f"{after.diversity:.3f} after ({change:+.0%})"
    )
    # the files
    metrics_file.write_json(out / "quickstart.json", numbers)
    rows = [i * captions // SHOWN for i in range(SHOWN)]
    pictures.before_after(
        before.outputs[rows],
        after.outputs[rows],
        [before.prompts[row] for row in rows],
        out / "figures" / "before_after.png",
        (parts[0][rows], parts[1][rows]),
    )
