r"""Does a student of one or two network evaluations act as well as its teacher of ten?

    # the teachers
    python -m benchmarks.rl100_gate learn --runs runs/gate --seeds 1 --tasks hammer-v3 push-wall-v3 \
        peg-insert-side-v3 shelf-place-v3 assembly-v3
    python -m benchmarks.distillation --runs runs/gate --tasks all --seed 1

A task's teacher is the policy at the end of RL-100's offline stage, as it is deployed (the mean of
its kernel) and, with --teachers ode, as the ODE of the same network. Beside the students, with the
same states and updates, a network without noise that is regressed on the teacher's actions, and,
without training, the teacher's own first step (DDIM of one step). All are played from the same
fresh starts, which nothing else uses; rows that there are already are not made again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rl100 import DEMONSTRATIONS
from genpolicy.config import leaves, parse
from genpolicy.config.origin import PERSON
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.statistics import interval, paired
from genpolicy.policy.files import load
from genpolicy.training.experiment import finished, train

FRESH = range(31_000_000, 31_001_000)
"""Reset seeds of the report."""
SLOTS = 20
ODE = {"kernel": {"name": "ddim", "eta": 0.0}, "window": None}
TEACHERS: dict[str, dict[str, Any]] = {"mean": {}, "ode": ODE}
"""Keys of the teacher's sampler in the place of the deployed one's."""
STUDENTS: dict[str, dict[str, Any]] = {
    "student, 1 step": {"prediction_type": "sample"},
    "student, 2 steps": {"prediction_type": "sample"},
    "network without noise": {"family": "gaussian", "pretrained": None},
}
"""The policy sections of those who are taught, beside their teacher."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/gate"))
    parser.add_argument("--tasks", nargs="+", default=["hammer-v3"])
    parser.add_argument("--teachers", nargs="+", default=["mean"], choices=list(TEACHERS))
    parser.add_argument("--rows", nargs="+", default=["1", "2", "without", "own"])
    parser.add_argument("--seed", type=int, default=1, help="of the teachers' runs")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = list(DEMONSTRATIONS) if "all" in args.tasks else args.tasks
    if not args.table:
        for task in tasks:
            for teacher in args.teachers:
                compare(args.runs, task, teacher, args.seed, args.rows)
    print(table(args.runs))


def compare(runs: Path, task: str, teacher: str, seed: int, wanted: list[str]) -> None:
    """Plays the teacher, and then everybody who is compared with it."""
    folder = runs / task / str(seed) / "stages" / "offline"
    done = {(r["task"], r["teacher"], r["row"]) for r in results(runs)}

    def told(row: str, path: Path, **sampler: Any) -> None:
        if (task, teacher, row) not in done:
            success = rate(task, path, **sampler)
            line = {"task": task, "teacher": teacher, "row": row, "success": success.tolist()}
            with open(runs / "distillation.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    told("teacher, 10 steps", folder, **TEACHERS[teacher])
    for row, section in STUDENTS.items():
        if any(word in row.split() for word in wanted):
            steps = 2 if "2 steps" in row else 1
            told(row, taught(runs, task, teacher, seed, row, steps, section))
    if "own" in wanted:
        told("teacher's own first step", folder, **{**ODE, "steps": 1})


def taught(
    runs: Path, task: str, teacher: str, seed: int, row: str, steps: int, section: dict[str, Any]
) -> Path:
    """The folder of a student, trained where it is not there yet."""
    folder = runs / task / f"{seed}-{teacher}-{row.replace(', ', '-').replace(' ', '-')}"
    if not (folder.exists() and finished(folder)):
        experiment = parse.load(
            "metaworld_consistency",
            [
                f"--task.env={task}",
                f"--data={{name: lerobot_dataset, root: {runs / task / 'demonstrations'}}}",
                f"--chain.steps={steps}",
                f"--output={folder}",
                "--eval.every=0",
                "--eval.episodes=20",
            ],
        )
        path = str(runs / task / str(seed) / "stages" / "offline")
        asked = {"path": path, **TEACHERS[teacher]}
        experiment.policy = {"name": "mlp", "teacher": asked, **section}
        train(experiment)
    return folder / "policy"


def rate(task: str, path: Path, **sampler: Any) -> Tensor:
    """Success of a policy from each of the fresh starts, [n]."""
    policy = load(path, **sampler)
    made = leaves.make("tasks", {"name": "metaworld", "env": task}, PERSON)
    environments = made.environments(SLOTS, policy.model.history)
    found = evaluate_control(policy, environments, episodes=len(FRESH), seed=FRESH.start)
    environments.close()
    return found.success


def results(runs: Path) -> list[dict[str, Any]]:
    """The rows that there are."""
    file = runs / "distillation.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(runs: Path) -> str:
    """Success with Wilson's 95 %, and the paired difference from the teacher with its 95 %."""
    found = {
        (r["task"], r["teacher"], r["row"]): torch.tensor(r["success"]).double()
        for r in results(runs)
    }
    lines = [
        f"{'task':20} {'teacher':8} {'row':26} {'success, 95 %':>22} {'minus teacher, 95 %':>26}"
    ]
    for (task, teacher, row), success in found.items():
        low, high = interval(success)
        text = f"{float(success.mean()):.3f} [{low:.3f}, {high:.3f}]"
        mean, below, above = paired(
            found[task, teacher, "teacher, 10 steps"], success, len(success)
        )
        lines.append(
            f"{task:20} {teacher:8} {row:26} {text:>22} {mean:+10.3f} [{below:+.3f}, {above:+.3f}]"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
