r"""Learning from preferences on the embedded picture models, at equal cost.

    python -m benchmarks.preferences tune                     # learning rates, hard task
    python -m benchmarks.preferences train --seeds 0 1 2      # hard task, three seeds
    python -m benchmarks.preferences train --task easy
    python -m benchmarks.preferences table

Winners are each base's own: of eight samples of an RL caption the one that the checker scores
highest, and beside it the one that it scores lowest; the same pairs for all arms, and the same with
one label of five turned around. No arm sees a reward. From the winners alone learn cloning (SFT),
SPIN, and SePPO with its flip and pools; from pairs DPO, RPO (with a supervised term) and robust DPO
(which reckons with a fifth of wrong labels).

A forward pass of a row costs 1, forward and backward 3: passes that sample, of the reference and of
the loss all count, and every arm spends about what 40 iterations of Flow-GRPO cost in
benchmarks/shapes_hard. Drawing the pairs is not counted; it is said beside the table. Learning
rates are chosen by strict accuracy on the RL captions with a seed and noise of their own; what is
reported are the last policy's pictures of held-out captions, from noise that nothing else drew
from. Runs that are there are not made again.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import genpolicy
from benchmarks.shapes import REWARDS, spread
from genpolicy.cli.main import main as command
from genpolicy.config import parse
from genpolicy.config.shipped import path
from genpolicy.contracts.task import read_prompts
from genpolicy.evaluation import metrics_file
from genpolicy.evaluation.prompt_scores import evaluate
from genpolicy.evaluation.statistics import interval, paired
from genpolicy.training.experiment import finished, train

BASES = {"hard": "assets/shapes-sd3-incomplete", "easy": "assets/shapes-sd3"}
GROUPS = {"hard": 532, "easy": 528}
"""Groups that pairs are made of: seven and six of every RL caption."""
MEMBERS, STEPS, WRONG = 8, 8, 0.2
COST = 148_480
"""The cost that every arm spends."""
PICTURES = {"hard": 512, "easy": 528}
"""Pictures of the report: eight and six of every held-out caption."""
VARIETY = ("diversity", "spread")
TUNING_SEED, TUNING_NOISE, REPORT_NOISE = 11, 77_001, 4242
RATES = (1.5e-4, 3e-4)
ROWS = 128
"""Examples of an iteration of SePPO, and rows of an update of SFT."""
PAIRS = 512
"""Pairs of an iteration of DPO, in eight updates."""


@dataclass(frozen=True)
class Arm:
    """A method, its settings beside those of its kind, and the labels that it learns from."""

    kind: str  # of `KINDS`
    settings: Mapping[str, Any] = field(default_factory=dict)
    wrong: bool = False  # a fifth of the labels are turned

    @property
    def method(self) -> dict[str, Any]:
        """The section of the experiment."""
        return {**KINDS[self.kind].method, **self.settings}

    @property
    def iterations(self) -> int:
        """The number of iterations that spend the cost."""
        return round(COST / KINDS[self.kind].each)


@dataclass(frozen=True)
class Kind:
    """A method with its sizes. each: the cost of an iteration. rate: the learning rate that
    `tune` chose.
    """

    method: Mapping[str, Any]
    each: int
    rate: float


KINDS = {
    "bc": Kind({"name": "bc", "batch": ROWS, "updates": 4}, 4 * ROWS * 3, RATES[0]),
    # each example has a sample; both sides are differentiated, and go through the reference
    "seppo": Kind({"name": "seppo", "samples": ROWS, "updates": 8}, ROWS * (STEPS + 8), RATES[0]),
    "diffusion_dpo": Kind(
        {
            "name": "diffusion_dpo",
            "pairs": "recorded",
            "pairs_per_update": PAIRS // 8,
            "updates": 8,
        },
        PAIRS * 8,
        RATES[0],
    ),
}
ROBUST = {"preference": {"wrong": WRONG}}
RPO = {"preference": {"supervised": 1.0}}
ARMS = {
    "sft": Arm("bc"),
    "spin": Arm("seppo", {"flip": "none", "pool": "latest"}),
    "seppo": Arm("seppo"),
    "seppo_no_flip": Arm("seppo", {"flip": "none"}),
    "seppo_latest": Arm("seppo", {"pool": "latest"}),
    "seppo_initial": Arm("seppo", {"pool": "initial"}),
    "dpo": Arm("diffusion_dpo"),
    "rpo": Arm("diffusion_dpo", RPO),
    "robust": Arm("diffusion_dpo", ROBUST),
    "dpo_wrong": Arm("diffusion_dpo", wrong=True),
    "rpo_wrong": Arm("diffusion_dpo", RPO, wrong=True),
    "robust_wrong": Arm("diffusion_dpo", ROBUST, wrong=True),
}
TUNED = {"sft": "bc", "seppo": "seppo", "dpo": "diffusion_dpo"}
"""The arms whose learning rate is chosen, each for its kind."""


def pairs(out: Path, task: str, wrong: bool) -> Path:
    """The folder of a task's pairs, made where it is not there."""
    folder, base = out / f"{task}-{'wrong' if wrong else 'right'}", BASES[task]
    if not folder.exists():
        failed = command(
            [
                *("pairs", base, "--out", str(folder), "--prompts", f"{base}/captions_train.txt"),
                *("--reward", "shapes_strict", "shapes_dense", "--groups", str(GROUPS[task])),
                *("--members", str(MEMBERS), "--steps", str(STEPS)),
                *("--wrong", str(WRONG if wrong else 0)),
            ]
        )
        if failed:
            raise SystemExit(failed)
    return folder


def run(out: Path, folder: Path, task: str, arm: Arm, rate: float, seed: int, tuning: bool) -> None:
    """Trains an arm in a folder, where it is not done yet."""
    if folder.exists() and finished(folder):
        return
    base, iterations = BASES[task], arm.iterations
    raw = {
        "policy": {
            "name": "diffusers_pipeline",
            "pretrained": base,
            "train": "full",
            "call": {"max_sequence_length": 1},
        },
        "chain": {"steps": STEPS, "kernel": {"name": "dpmsolver"}},
        "task": {"name": "prompts", "prompts": f"{base}/captions_train.txt"},
        "data": {
            "name": "picture_pairs",
            "root": str(pairs(out, task, arm.wrong)),
            "height": 32,
            "width": 32,
        },
        "reward": {"shapes_strict": 0.5, "shapes_dense": 0.5},
        "method": arm.method,
        "optimizer": {"lr": rate, "betas": [0.9, 0.99], "weight_decay": 0.0, "ema": 0.9},
        "budget": {"iterations": iterations},
        "eval": {
            "every": 0 if tuning else max(1, iterations // 8),
            "prompts": f"{base}/captions_{'train' if tuning else 'held_out'}.txt",
            "samples": 304 if tuning else 256,
            **({"seed": TUNING_NOISE} if tuning else {}),
            "select": "reward/shapes_strict",
        },
        "threads": 1,
        "checkpoint_every": 1000,
        "seed": seed,
        "output": str(folder),
    }
    train(parse.parse(raw))


@torch.no_grad()
def judged(folder: Path, task: str) -> dict[str, Any]:
    """The strict scores of a run's pictures, their diversity and spread; kept in its folder."""
    file = folder / "report.json"
    if not file.exists():
        count, seen = PICTURES[task], captions(task)
        result = evaluate(
            genpolicy.load(folder),
            REWARDS,
            prompts=seen,
            samples=count,
            seed=REPORT_NOISE,
            shown=count,
        )
        metrics_file.write_json(
            file,
            {
                "strict": result.parts["shapes_strict"].flatten().tolist(),
                "diversity": result.diversity,
                "spread": spread(result.outputs, list(result.prompts)),
            },
        )
    return json.loads(file.read_text())


def captions(task: str) -> tuple[str, ...]:
    """The held-out captions."""
    return tuple(read_prompts(str(path(f"{BASES[task]}/captions_held_out.txt"))))


def tuned(out: Path) -> list[str]:
    """Lines of what the tuning runs reached on the RL captions."""
    lines = ["| arm | learning rate | strict on the RL captions [95 %] |", "|---|---|---|"]
    for name in TUNED:
        for rate in RATES:
            folder = out / "tune" / f"{name}-{rate:g}"
            if folder.exists() and finished(folder):
                after = metrics_file.read_sealed(folder / "summary.json")["after"]
                low, high = after["ci95/shapes_strict"]
                strict = after["reward/shapes_strict"]
                lines.append(f"| {name} | {rate:g} | {strict:.3f} [{low:.3f}, {high:.3f}] |")
    return lines


def table(out: Path) -> str:
    """The tuning runs, and a line per task and arm."""
    lines = [*tuned(out), ""]
    lines.append(
        "| task | arm | strict, held out, by seed | mean [95 %] | diversity | spread"
        " | less SFT [95 %] | less DPO [95 %] |"
    )
    lines.append("|---|---|---|---|---|---|---|---|")
    for task in BASES:
        found = {name: _reports(out, task, name) for name in ARMS}
        sft, dpo = (_strict(found[name]) for name in ("sft", "dpo"))
        for name, seeds in found.items():
            if not seeds:
                continue
            strict = _strict(seeds)
            values = torch.stack([one.mean() for one in strict.values()])
            low, high = interval(values if len(values) > 1 else next(iter(strict.values())))
            varied, places = (_mean([one[k] for one in seeds.values()]) for k in VARIETY)
            lines.append(
                f"| {task} | {name} | {', '.join(f'{float(v):.3f}' for v in values)}"
                f" | {float(values.mean()):.3f} [{low:.3f}, {high:.3f}]"
                f" | {varied:.3f} | {places:.2f}"
                f" | {_less(task, sft, strict)} | {_less(task, dpo, strict)} |"
            )
    return "\n".join(lines)


def _reports(out: Path, task: str, name: str) -> dict[str, dict[str, Any]]:
    """The reports of an arm's runs, by seed."""
    folders = [f for f in sorted((out / task).glob(f"{name}-[0-9]")) if finished(f)]
    return {folder.name[-1]: judged(folder, task) for folder in folders}


def _mean(values: Sequence[float | None]) -> float:
    """The mean of a number per seed; nan where a seed has none (too few right pictures)."""
    return sum(math.nan if v is None else v for v in values) / len(values)


def _strict(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    return {seed: torch.tensor(one["strict"]).double() for seed, one in seeds.items()}


def _less(task: str, other: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The difference from another arm, paired: over captions of one seed, else over seeds."""
    both = [seed for seed in own if seed in other]
    if not both or all(torch.equal(own[s], other[s]) for s in both):
        return ""
    if len(both) == 1:
        mean, low, high = paired(other[both[0]], own[both[0]], len(captions(task)))
    else:
        before, after = (torch.stack([x[s].mean() for s in both]) for x in (other, own))
        mean, low, high = paired(before, after, len(both))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("tune", "train", "table"))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--task", default="hard", choices=BASES)
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "tune":
        for name in TUNED:
            for rate in RATES:
                folder = args.out / "tune" / f"{name}-{rate:g}"
                run(args.out, folder, "hard", ARMS[name], rate, TUNING_SEED, tuning=True)
    if args.verb == "train":
        for seed in args.seeds:
            for name in args.arms:
                arm, folder = ARMS[name], args.out / args.task / f"{name}-{seed}"
                run(args.out, folder, args.task, arm, KINDS[arm.kind].rate, seed, tuning=False)
                judged(folder, args.task)
    print(table(args.out))


if __name__ == "__main__":
    main()
