r"""Every method for pictures on the harder shapes task, at equal cost.

    python -m benchmarks.shapes_hard tune flow_grpo find      # each method's three settings
    python -m benchmarks.shapes_hard train flow_grpo --seeds 0 1 2
    python -m benchmarks.shapes_hard table
    python -m benchmarks.shapes_hard figures                  # into assets/figures

The base is assets/shapes-sd3-incomplete (docs/shapes.md, "A harder task"). A forward pass of a row
costs 1, forward and backward 3; passes that draw, of old and reference policies and of the loss all
count. Flow-GRPO's 40 iterations of 128 pictures set the cost that the iterations of every method
are chosen to reach, evaluations aside. Settings are chosen by the strict accuracy on the RL
captions, with a seed and noise of their own; what is reported are the last policy's pictures of the
held-out captions and of new pairs, from noise that nothing else drew from. Runs that are there are
not made again. CPU seconds: of the iterations, by the wall clock, times the process's own share of
that clock.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import REWARDS, load, spread
from genpolicy.config import parse
from genpolicy.config.shipped import path
from genpolicy.contracts.task import read_prompts
from genpolicy.evaluation import metrics_file
from genpolicy.evaluation.curves import COLOURS, Panel, evaluation, save_panels
from genpolicy.evaluation.pictures import before_after
from genpolicy.evaluation.prompt_scores import evaluate
from genpolicy.evaluation.statistics import interval, paired
from genpolicy.training.experiment import finished, train

BASE = "assets/shapes-sd3-incomplete"
SPLITS = {"held_out": 512, "new_pairs": 528}
"""Pictures of the report, by split: 8 and 6 of every caption."""
TUNING_SEED, TUNING_NOISE, REPORT_NOISE = 11, 77_001, 4242
GUIDANCES = (1.0, 3.0)
"""Of the base; 3 is its best on the RL captions."""
LEVEL = 0.5
"""Of strict accuracy, that `table` says the cost of."""
PICTURES, STEPS, TRAINED = 128, 8, 7
"""Per iteration of all methods but B², per chain, and of them noisy."""
FAST = "--optimizer.lr=3e-4"


@dataclass(frozen=True)
class Arm:
    """One method: the iterations that spend the cost, and its settings beside the preset."""

    iterations: int
    settings: tuple[tuple[str, ...], ...]  # overrides of configs/shapes_NAME.yaml that were tried
    chosen: int = 0  # of them, by `tune`


ARMS = {
    "flow_grpo": Arm(40, ((), (FAST,), ("--method.updates=8",)), chosen=2),
    "grpo_guard": Arm(40, ((), (FAST,), ("--method.updates=8",)), chosen=1),
    "ddpo": Arm(40, ((), (FAST,), ("--method.updates=8",))),
    "dance_grpo": Arm(61, ((), (FAST,), ("--method.updates=8",))),
    "mix_grpo": Arm(83, ((), (FAST,), ("--method.size=3",))),
    "b2_diffurl": Arm(69, ((), ("--method.first=1",), ("--method.first=1", FAST)), chosen=1),
    "diffusion_nft": Arm(27, ((), (FAST,), ("--method.updates=8",)), chosen=2),
    "find": Arm(
        145,
        (
            ("--method.clip=0.2", "--method.lr=3e-4"),
            ("--method.clip=1", "--method.lr=1e-4"),
            ("--method.clip=1", "--method.lr=1e-3", "--method.minibatch=128"),
        ),
        chosen=2,
    ),
}


def run(folder: Path, name: str, overrides: Sequence[str], seed: int, *, tuning: bool) -> None:
    """Trains an arm in a folder, where it is not done yet; writes its CPU share beside it."""
    if folder.exists() and finished(folder):
        return
    judged = "train" if tuning else "held_out"
    every = 0 if tuning else max(1, round(ARMS[name].iterations / 8))
    experiment = parse.load(
        f"shapes_{name}",
        [
            f"--policy.pretrained={BASE}",
            f"--task.prompts={BASE}/captions_train.txt",
            f"--eval.prompts={BASE}/captions_{judged}.txt",
            f"--eval.samples={304 if tuning else 256}",
            f"--eval.every={every}",
            *([f"--eval.seed={TUNING_NOISE}"] if tuning else []),
            f"--budget={{iterations: {ARMS[name].iterations}}}",
            "--checkpoint_every=1000",
            f"--seed={seed}",
            f"--output={folder}",
            *overrides,
        ],
    )
    began, clock = time.process_time(), time.perf_counter()
    train(experiment)
    share = (time.process_time() - began) / (time.perf_counter() - clock)
    (folder / "cpu_share.json").write_text(json.dumps(share), encoding="utf-8")


def cost(folder: Path, name: str) -> list[float]:
    """What each iteration of a run cost: forward passes + 3 x differentiated ones.

    The run counts a differentiated pass twice, E = F + 2 D. F is what drew, and for DiffusionNFT
    the old and the reference policy's passes, as many each as there are differentiated ones.
    """
    found: list[float] = []
    for line in metrics_file.read(folder):
        if "nfe_per_sample" not in line:
            continue
        evaluations, drew = line["nfe_per_sample"] * PICTURES, float(PICTURES * STEPS)
        if name == "b2_diffurl":
            groups, group, length = 32, 5, int(line["b2/steps"])
            evaluations = line["nfe_per_sample"] * groups * group
            trunk = TRAINED - length + 1  # the step that branches is evaluated once per group, too
            drew = groups * trunk + groups * group * (STEPS - trunk)
        if name == "dance_grpo":  # the first evaluation of a group is one
            drew = evaluations - 2 * PICTURES * int(0.6 * TRAINED)
        shares = 4 if name == "diffusion_nft" else 2
        found.append(evaluations + (evaluations - drew) / shares)
    return found


@torch.no_grad()
def report(source: str, guidance: float) -> dict[str, Any]:
    """The pictures of a run or of the base, judged: per split strict by picture, dense, diversity, spread."""
    told: dict[str, Any] = {}
    for split, samples in SPLITS.items():
        captions = read_prompts(str(path(f"{BASE}/captions_{split}.txt")))
        policy = load(source, guidance)
        result = evaluate(
            policy, REWARDS, prompts=captions, samples=samples, seed=REPORT_NOISE, shown=samples
        )
        told[split] = {
            "strict": result.parts["shapes_strict"].flatten().tolist(),
            "dense": float(result.parts["shapes_dense"].mean()),
            "diversity": result.diversity,
            "spread": spread(result.outputs, list(result.prompts)),
        }
    return told


def level(folder: Path, spent: Sequence[float]) -> float | None:
    """The cost after which the first evaluation on held-out captions was at `LEVEL`, or None."""
    for line in metrics_file.read(folder):
        if line.get("eval/reward/shapes_strict", 0.0) >= LEVEL:
            return sum(spent[: int(line["iteration"])])
    return None


def judged(runs: Path, source: str, guidance: float = 1.0) -> dict[str, Any]:
    """`report`, read from the runs' folder where it is there already."""
    file = runs / "reports" / f"{Path(source).name}_{guidance:g}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        metrics_file.write_json(file, report(source, guidance))
    return json.loads(file.read_text())


def tuned(runs: Path) -> list[str]:
    """Lines of what the tuning runs reached on the RL captions."""
    lines = ["| method | setting | strict on the RL captions [95 %] |", "|---|---|---|"]
    for name, arm in ARMS.items():
        for place, overrides in enumerate(arm.settings):
            folder = runs / "tune" / f"{name}-{place}"
            if folder.exists() and finished(folder):
                after = metrics_file.read_sealed(folder / "summary.json")["after"]
                low, high = after["ci95/shapes_strict"]
                setting = " ".join(overrides).replace("--", "") or "as shapes_" + name
                strict = after["reward/shapes_strict"]
                lines.append(f"| {name} | {setting} | {strict:.3f} [{low:.3f}, {high:.3f}] |")
    return lines


def table(runs: Path) -> str:
    """The tuning runs, and a line per method of the means over its seeds."""
    lines = [*tuned(runs), ""]
    lines.append(
        "| method | seeds | strict, held out [95 %] | new pairs | diversity | spread"
        f" | cost | cost to {LEVEL:g} | CPU s | less Flow-GRPO [95 %] |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for guidance in GUIDANCES:
        told = _pictures([judged(runs, BASE, guidance)])
        lines.append(f"| base, guidance {guidance:g} | | {told} | | | | |")
    flow: dict[str, Tensor] = {}
    for name in ARMS:
        folders = {f.name.rpartition("-")[2]: f for f in sorted(runs.glob(f"{name}-[0-9]*"))}
        folders = {seed: f for seed, f in folders.items() if finished(f)}
        if not folders:
            continue
        found = {seed: judged(runs, str(folder)) for seed, folder in folders.items()}
        strict = {s: torch.tensor(f["held_out"]["strict"]).double() for s, f in found.items()}
        costs = {s: cost(f, name) for s, f in folders.items()}
        levels = [level(f, costs[s]) for s, f in folders.items()]
        if name == "flow_grpo":
            flow = strict
        lines.append(
            f"| {name} | {len(found)} | {_pictures(list(found.values()))}"
            f" | {_average([sum(c) for c in costs.values()]):.0f}"
            f" | {', '.join('never' if v is None else f'{v:.0f}' for v in levels)}"
            f" | {_average([seconds(f) for f in folders.values()]):.0f}"
            f" | {_against(flow, strict)} |"
        )
    return "\n".join(lines)


def figures(runs: Path, out: Path) -> None:
    """Draws the learning curves of all methods over the cost, a panel per method, and pictures of
    each method's first seed beside the base's, from the same noise.
    """
    panels: list[Panel] = []
    for name in ARMS:
        folders = [f for f in sorted(runs.glob(f"{name}-[0-9]*")) if finished(f)]
        if folders:
            panels.append((name, partial(_courses, name, folders)))
            _pairs(folders[0], out / f"shapes_hard_{name}.png")
    save_panels(
        panels,
        out / "shapes_hard.png",
        "strict accuracy on held-out captions, no guidance; a line per seed",
        "cost in thousands of forward passes",
    )


def _courses(name: str, folders: Sequence[Path], axes: Any) -> None:
    for folder, colour in zip(folders, COLOURS, strict=False):
        metrics = metrics_file.read(folder)
        spent = [0.0, *cost(folder, name)]
        kilo = {k: sum(spent[: k + 1]) / 1000 for k in range(len(spent))}
        lines = [{**m, "iteration": kilo[int(m["iteration"])]} for m in metrics]
        evaluation(axes, lines, "reward/shapes_strict", "", colour)
    axes.set_ylim(0, 1)


def _pairs(folder: Path, file: Path) -> None:
    """Eight held-out captions: the base's picture and the policy's."""
    captions = read_prompts(str(path(f"{BASE}/captions_held_out.txt")))[::8]
    before, after = (
        evaluate(
            load(source, 1.0),
            REWARDS,
            prompts=captions,
            samples=len(captions),
            seed=REPORT_NOISE,
            shown=len(captions),
        )
        for source in (BASE, str(folder))
    )
    rewards = (before.parts["shapes_strict"].flatten(), after.parts["shapes_strict"].flatten())
    before_after(before.outputs, after.outputs, list(captions), file, rewards)


def seconds(folder: Path) -> float:
    """CPU seconds of a run's iterations."""
    share = json.loads((folder / "cpu_share.json").read_text())
    return share * metrics_file.read_sealed(folder / "summary.json")["training_s"]


def _pictures(found: Sequence[dict[str, Any]]) -> str:
    """The cells of what a method's pictures are like, the mean over its seeds."""
    seen = [one["held_out"] for one in found]
    strict = [
        _mean([torch.tensor(one[split]["strict"]).double() for one in found]) for split in SPLITS
    ]
    diversity, spread = (_average([one[k] for one in seen]) for k in ("diversity", "spread"))
    return f"{strict[0]} | {strict[1]} | {diversity:.3f} | {spread:.2f}"


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean(seeds: Sequence[Tensor]) -> str:
    """Of one seed Wilson's interval over pictures, of several Student's over seeds."""
    values = seeds[0] if len(seeds) == 1 else torch.stack([s.mean() for s in seeds])
    low, high = interval(values)
    return f"{float(values.mean()):.3f} [{low:.3f}, {high:.3f}]"


def _against(flow: dict[str, Tensor], strict: dict[str, Tensor]) -> str:
    """The difference from Flow-GRPO, paired: over captions of one seed, else over seeds."""
    both = [s for s in strict if s in flow]
    if not both or strict is flow:
        return ""
    if len(both) == 1:
        captions = len(read_prompts(str(path(f"{BASE}/captions_held_out.txt"))))
        mean, low, high = paired(flow[both[0]], strict[both[0]], captions)
    else:
        before, after = (torch.stack([x[s].mean() for s in both]) for x in (flow, strict))
        mean, low, high = paired(before, after, len(both))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("tune", "train", "table", "figures"))
    parser.add_argument("methods", nargs="*", default=list(ARMS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes_hard"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.methods:
        arm = ARMS[name]
        if args.verb == "tune":
            for place, overrides in enumerate(arm.settings):
                folder = args.runs / "tune" / f"{name}-{place}"
                run(folder, name, overrides, TUNING_SEED, tuning=True)
        if args.verb == "train":
            for seed in args.seeds:
                folder = args.runs / f"{name}-{seed}"
                run(folder, name, arm.settings[arm.chosen], seed, tuning=False)
    if args.verb == "figures":
        figures(args.runs, Path("assets/figures"))
    print(table(args.runs))


if __name__ == "__main__":
    main()
