r"""FIND's table of starts on prompts that the base fails, beside DDPO and stored noises.

    python -m benchmarks.find_prompts --runs runs/find_prompts --seeds 0 1 2

The prompts are the eight RL captions of assets/shapes-sd3-incomplete of whose 64 pictures the
fewest pass. FIND learns a start for each, and DDPO the network, at equal cost (a forward pass 1,
forward and backward 3): 80 iterations of 128 pictures against 22. "Stored" draws as many noises
from the base as FIND and keeps each caption's best 16, ties in the order of drawing: with a
deterministic sampler they draw the same pictures again. All else is reported on fresh noise: strict
accuracy, within a caption the spread of pixels over correct pictures alone, and FIND's entropy.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes import REWARDS, load
from benchmarks.shapes_hard import BASE, STEPS
from genpolicy.config import parse
from genpolicy.config.shipped import path
from genpolicy.contracts.task import read_prompts
from genpolicy.evaluation import metrics_file
from genpolicy.evaluation.prompt_scores import Evaluation, evaluate
from genpolicy.evaluation.statistics import interval
from genpolicy.training.experiment import finished, train

FAILED, DRAWS = 8, 64
"""Captions of the study, and pictures of each caption that they are chosen by."""
CHOICE_NOISE, STORED_NOISE, REPORT_NOISE = 501, 502, 503
FRESH, KEPT = 32, 16
"""Pictures of each caption in the report, and stored noises of each."""
ITERATIONS = {"find": 80, "ddpo": 22}
PICTURES = 128
LEVEL = 0.5
METHODS = {
    "find": [
        "--method.prompts=8",
        "--method.groups=8",
        "--method.group=16",
        "--method.lr=1e-2",
        "--method.clip=1",
        "--method.minibatch=128",
    ],
    "ddpo": [],
}


def chosen() -> list[str]:
    """The captions that the base fails most."""
    captions = read_prompts(str(path(f"{BASE}/captions_train.txt")))
    samples = DRAWS * len(captions)
    found = evaluate(load(BASE, 1.0), REWARDS, prompts=captions, samples=samples, seed=CHOICE_NOISE)
    passed = found.parts["shapes_strict"].view(DRAWS, len(captions)).mean(0)
    return [captions[i] for i in passed.argsort(stable=True)[:FAILED].tolist()]


def learned(runs: Path, name: str, seed: int) -> Path:
    """The folder of a method's run on the captions, trained where it is not there yet."""
    folder = runs / f"{name}-{seed}"
    if not (folder.exists() and finished(folder)):
        train(
            parse.load(
                f"shapes_{name}",
                [
                    f"--policy.pretrained={BASE}",
                    f"--task.prompts={runs / 'captions.txt'}",
                    f"--eval.prompts={runs / 'captions.txt'}",
                    f"--eval.samples={FAILED * FRESH}",
                    f"--eval.every={ITERATIONS[name] // 10}",
                    f"--budget={{iterations: {ITERATIONS[name]}}}",
                    "--checkpoint_every=1000",
                    f"--seed={seed}",
                    f"--output={folder}",
                    *METHODS[name],
                ],
            )
        )
    return folder


def line(row: str, pictures: Tensor, strict: Tensor, more: str = "", fresh: bool = True) -> None:
    """Prints a row; pictures [S,3,H,W] and strict [S] of captions in turn. fresh: the pictures were
    not chosen, so that their rate has an interval.
    """
    within = []
    for caption in range(FAILED):
        own = pictures[caption::FAILED][strict[caption::FAILED] == 1]
        if len(own) >= 3:
            within.append(own.std(0).square().mean().sqrt())
    low, high = interval(strict)
    interval_told = f" [{low:.3f}, {high:.3f}]" if fresh else ""
    spread = float(torch.stack(within).mean()) if within else float("nan")
    print(
        f"| {row} | {float(strict.mean()):.3f}{interval_told} | {spread:.3f}"
        f" ({len(within)} captions) | {more} |",
        flush=True,
    )


def drawn(source: str, captions: list[str], each: int, seed: int) -> Evaluation:
    """So many judged pictures of every caption, all of them kept."""
    samples = FAILED * each
    policy = load(source, 1.0)
    return evaluate(policy, REWARDS, prompts=captions, samples=samples, seed=seed, shown=samples)


def report(row: str, source: str, captions: list[str], more: str = "") -> None:
    """A policy's line, on fresh noise."""
    found = drawn(source, captions, FRESH, REPORT_NOISE)
    line(row, found.outputs, found.parts["shapes_strict"].flatten(), more)


def stored(captions: list[str], each: int) -> None:
    """The line of the best `KEPT` of so many stored noises per caption."""
    found = drawn(BASE, captions, each, STORED_NOISE)
    best = found.parts["total"].view(each, FAILED).argsort(dim=0, descending=True, stable=True)
    rows = (best[:KEPT] * FAILED + torch.arange(FAILED)).flatten()
    row = f"best {min(KEPT, each)} of {each} stored noises per caption"
    strict = found.parts["shapes_strict"].flatten()[rows]
    line(row, found.outputs[rows], strict, f"cost {FAILED * each * STEPS}", fresh=False)


def course(folder: Path, per_iteration: float) -> str:
    """The cost at which an evaluation first reached `LEVEL`, and FIND's entropy at the end."""
    lines = metrics_file.read(folder)
    reached = [m for m in lines if m.get("eval/reward/shapes_strict", 0.0) >= LEVEL]
    when = f"{reached[0]['iteration'] * per_iteration:.0f}" if reached else "never"
    entropy = [m["start/entropy"] for m in lines if "start/entropy" in m]
    told = f", entropy {entropy[-1]:.3f} nats per dim" if entropy else ""
    return f"cost to {LEVEL:g}: {when}{told}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/find_prompts"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    captions = chosen()
    args.runs.mkdir(parents=True, exist_ok=True)
    (args.runs / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    print("| policy | strict [95 %] | spread of correct pictures | |\n|---|---|---|---|")
    report("base", BASE, captions)
    for each in (KEPT, 64, ITERATIONS["find"] * PICTURES // FAILED):
        stored(captions, each)
    each = {"find": PICTURES * STEPS, "ddpo": PICTURES * (STEPS + 3 * (STEPS - 1))}
    for seed in args.seeds:
        for name, cost in each.items():
            folder = learned(args.runs, name, seed)
            report(f"{name}, seed {seed}", str(folder), captions, course(folder, float(cost)))


if __name__ == "__main__":
    main()
