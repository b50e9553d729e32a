r"""Methods that learn from everything that was done, beside on-policy ones: success over steps.

    python -m benchmarks.off_policy train --methods pa_rl aloe expo q_chunking dsrl dppo rl100
    python -m benchmarks.off_policy train --methods pa_rl --seeds 0 1 2
    python -m benchmarks.off_policy train --methods q_chunking_long q_chunking_steps --seeds 0 1 2
    python -m benchmarks.off_policy table
    python -m benchmarks.off_policy figure            # assets/figures/off_policy.png
    python -m benchmarks.off_policy keep              # docs/measured/off_policy.json

One task at a time (shelf-place by default), sparse reward; five noisy scripted demonstrations are
cloned, one clone for each seed, and every method begins from the clone of its seed with its preset.
All its environment steps count, and those of the demonstrations. A level is reached where an
evaluation (200 starts, the same for all) is at or above it and the next one too. What is reported is
the last policy as it is deployed, on 500 starts that nothing else uses. Runs that are there are not
made again. `keep` writes what the runs there are have measured into a small file, which `table` and
`figure` read too, so that a table may be of runs whose folders are gone.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch

from genpolicy.config import leaves, parse
from genpolicy.config.origin import PERSON
from genpolicy.config.whole_file import write_text
from genpolicy.contracts.model import ControlModel
from genpolicy.evaluation import metrics_file
from genpolicy.evaluation.curves import COLOURS, by_experience, evaluation, save_panels
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.statistics import interval
from genpolicy.policy.files import load
from genpolicy.rollout.demonstrations import demonstrate
from genpolicy.training.experiment import finished, train

FRESH = range(66_000_000, 66_000_500)
"""Reset seeds of the report."""
DEMONSTRATIONS = {"shelf-place-v3": 5, "assembly-v3": 3, "peg-insert-side-v3": 10}
"""As in benchmarks/rl100."""
DEMONSTRATED_FROM, NOISE = 10_000, 0.1
STEPS, LEVEL, SLOTS = 125_000, 0.9, 20
REPORT = "report.json"
"""The file of a run's folder that has its success from each of the fresh starts."""
METHODS = ("pa_rl", "aloe", "expo", "q_chunking", "dsrl", "dppo", "rl100")
OWN = {
    "dppo": ["--eval.every=5"],
    # its online stage alone, from the same clone, and on until it is at the level
    "rl100": [
        "--method.stage=online",
        "--data=null",
        "--eval.every=5",
        "--budget={env_steps: 400000}",
    ],
    "q_chunking_long": ["--method.length=4"],
    "q_chunking_steps": ["--method.length=4", "--method.bootstrap=steps"],
}
"""Overrides of presets: the methods with large iterations are evaluated more often."""
KEPT = Path("docs/measured/off_policy.json")
"""What the runs that are told of measured, by task, method and seed."""
STUDIES = ("q_chunking_long", "q_chunking_steps")
"""The decoupled critic, which sees four decisions, and its control; they are not in the figure."""


def clone(out: Path, task: str, seed: int) -> Path:
    """The clone of a seed, made where it is not there."""
    folder, data = out / task / f"clone-{seed}", out / task / "demonstrations"
    if not data.exists():
        demonstrate(
            {"name": "metaworld", "env": task},
            data,
            episodes=DEMONSTRATIONS[task],
            noise=NOISE,
            seed=DEMONSTRATED_FROM,
        )
    if not (folder.exists() and finished(folder)):
        where = [f"--task.env={task}", f"--data.root={data}"]
        train(parse.load("metaworld_bc", [*where, f"--seed={seed}", f"--output={folder}"]))
    return folder / "policy"


def learn(
    out: Path, task: str, preset: str, seed: int, folder: Path, steps: int, *own: str
) -> None:
    """A preset's run from the clone of its seed, and what its last policy reaches.

    steps: environment steps that the run may take. own: further overrides of the preset.
    """
    if not (folder.exists() and finished(folder)):
        overrides = [
            f"--policy.pretrained={clone(out, task, seed)}",
            f"--task.env={task}",
            f"--budget={{env_steps: {steps}}}",
            "--eval.episodes=200",
            "--eval.seed=3000003",
            "--checkpoint_every=1000",
            f"--seed={seed}",
            f"--output={folder}",
            *own,
        ]
        began = time.process_time()
        train(parse.load(preset, overrides))
        (folder / "cpu_s.txt").write_text(f"{time.process_time() - began:.0f}\n")
    judge(folder, task)


def judge(folder: Path, task: str) -> None:
    """Plays a run's policy from the fresh starts, once, and writes its successes beside it."""
    if (folder / REPORT).exists():
        return
    world = leaves.make("tasks", {"name": "metaworld", "env": task}, PERSON)
    loaded = load(folder / "policy")
    environments = world.environments(SLOTS, cast(ControlModel, loaded.model).history)
    found = evaluate_control(loaded, environments, episodes=len(FRESH), seed=FRESH.start)
    environments.close()
    metrics_file.write_json(folder / REPORT, {"success": found.success.tolist()})


@dataclass(frozen=True)
class Run:
    """What a run measured.

    course: (environment steps so far, those of the demonstrations too; success of 200 starts) of
    each evaluation. success: of the last policy from each of the fresh starts. cpu_s: seconds of
    computing, evaluations among them; 0 of a clone.
    """

    course: list[tuple[float, float]]
    success: list[bool]
    cpu_s: float


def measured(where: Path) -> dict[str, Run]:
    """The runs of a task's folder whose last policy was reported, by method and seed."""
    folders = sorted(f.parent for f in where.glob(f"*-[0-9]/{REPORT}"))
    return {f.name: _measured(f, _frames(where / "demonstrations")) for f in folders}


def _measured(folder: Path, demonstrated: int) -> Run:
    lines, _ = by_experience(metrics_file.read(folder))
    return Run(
        [
            (m["iteration"] + demonstrated, m["eval/success_rate"])
            for m in lines
            if "eval/success_rate" in m
        ],
        json.loads((folder / REPORT).read_text())["success"],
        float(spent.read_text()) if (spent := folder / "cpu_s.txt").exists() else 0.0,
    )


def _frames(data: Path) -> int:
    """The environment steps of the demonstrations."""
    section = {"name": "lerobot_dataset", "root": str(data)}
    return len(leaves.make("datasets", section, PERSON))


def kept(task: str) -> dict[str, Run]:
    """The runs of a task that the file of kept ones holds."""
    tasks = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return {
        name: Run(
            [(steps, rate) for steps, rate in one["course"]],
            [mark == "1" for mark in one["success"]],
            one["cpu_s"],
        )
        for name, one in tasks.get(task, {}).items()
    }


def keep(task: str, runs: dict[str, Run]) -> None:
    """Writes the runs of a task into the file of kept ones, beside other tasks'."""
    tasks = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    tasks[task] = {
        name: {**asdict(one), "success": "".join(str(int(s)) for s in one.success)}
        for name, one in sorted(runs.items())
    }
    # a line per run
    told = ",\n".join(
        f' "{task}": {{\n'
        + ",\n".join(f'  "{name}": {json.dumps(one)}' for name, one in runs.items())
        + "\n }"
        for task, runs in tasks.items()
    )
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    write_text(KEPT, f"{{\n{told}\n}}\n")


def of(method: str, runs: dict[str, Run]) -> list[Run]:
    """The runs of a method, by seed."""
    return [one for name, one in sorted(runs.items()) if name.rpartition("-")[0] == method]


def reached(points: list[tuple[float, float]]) -> float | None:
    """The steps of the first evaluation at or above the level that the next one confirms."""
    for (steps, now), (_, after) in pairwise(points):
        if min(now, after) >= LEVEL:
            return steps
    return None


def table(runs: dict[str, Run]) -> str:
    """A line per method."""
    lines = [
        f"| method | success by seed (n {len(FRESH)}) | mean [95 %] | steps to {LEVEL:g}, by seed"
        " | CPU s |",
        "|---|---|---|---|---|",
    ]
    for method in (*METHODS, *STUDIES):
        if not (own := of(method, runs)):
            continue
        levels = [reached(one.course) for one in own]
        told = ", ".join("not" if v is None else f"{v:,.0f}" for v in levels)
        seconds = sum(one.cpu_s for one in own) / len(own)
        lines.append(f"| `{method}` | {rates(own)} | {told} | {seconds:.0f} |")
    return "\n".join(lines)


def rates(runs: list[Run]) -> str:
    """Two cells of a table: the success of each run, and their mean with its interval: over the
    runs, or of a single one over its episodes. Two runs have none: one degree of freedom says
    nothing.
    """
    found = [torch.tensor(one.success).double() for one in runs]
    means = torch.stack([one.mean() for one in found])
    told = f"{', '.join(f'{float(one):.3f}' for one in means)} | {float(means.mean()):.3f}"
    if len(found) == 2:
        return told
    low, high = interval(means if len(found) > 2 else found[0])
    return f"{told} [{low:.3f}, {high:.3f}]"


def figure(runs: dict[str, Run], task: str, file: Path) -> None:
    """Draws success over environment steps, all methods in one panel."""

    def draw(axes: Any) -> None:
        for method, colour in zip(METHODS, COLOURS, strict=True):
            for number, one in enumerate(of(method, runs)):
                lines = [{"iteration": n / 1000, "eval/success_rate": s} for n, s in one.course]
                evaluation(axes, lines, "success_rate", "" if number else method, colour)
        axes.axhline(LEVEL, color="black", linewidth=0.7, linestyle=":")
        axes.set_ylim(0, 1)
        axes.set_xlim(0, STEPS / 1000)

    save_panels(
        [(f"success on {task}, 200 starts; a line per seed", draw)],
        file,
        xlabel="thousands of environment steps",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("train", "table", "figure", "keep"))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=(*METHODS, *STUDIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--task", default="shelf-place-v3", choices=list(DEMONSTRATIONS))
    parser.add_argument("--out", type=Path, default=Path("runs/off_policy"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "train":
        for seed in args.seeds:
            for method in args.methods:
                folder, own = args.out / args.task / f"{method}-{seed}", OWN.get(method, [])
                preset = "metaworld_" + method.removesuffix("_long").removesuffix("_steps")
                learn(args.out, args.task, preset, seed, folder, STEPS, *own)
    runs = {**kept(args.task), **measured(args.out / args.task)}
    if args.verb == "keep":
        keep(args.task, runs)
    if args.verb == "figure":
        figure(runs, args.task, Path("assets/figures/off_policy.png"))
    print(table(runs))


if __name__ == "__main__":
    main()
