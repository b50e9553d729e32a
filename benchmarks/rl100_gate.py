"""Does the offline gate tell better from worse? Unprotected it does not, and what protects in its
place.

    # imitation and the offline stage, nothing after it
    python -m benchmarks.rl100_gate learn --runs runs/gate --tasks hammer-v3 --seeds 0
    # what that stage returned
    python -m benchmarks.rl100_gate protected --runs runs/gate --tasks hammer-v3 --seeds 0
    # the negative control
    python -m benchmarks.rl100_gate unprotected --runs runs/gate --tasks hammer-v3 --seeds 0

The runs are those of "learn", or of benchmarks/rl100, which goes on to the online stage.
"unprotected" repeats a run's offline stage on the same data with no KL, no bound on the distance
and no real episodes, twenty short candidates, and compares the gate's scores with the truth of
each. "protected" takes the candidates that the run itself made: the best of them and of the policy
before is chosen on one list of starts, and compared with what the stage returned, paired, on a
fresh one. Both lists are used nowhere else.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rl100
from genpolicy.config import leaves, parse
from genpolicy.config.origin import PERSON
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.statistics import paired
from genpolicy.learning.acceptance import rank_correlation
from genpolicy.policy.files import saved
from genpolicy.training.experiment import finished, train

CHOOSING, FRESH = range(27_000_000, 27_000_500), range(28_000_000, 28_000_500)
"""Reset seeds of the choice and of the report. Those from 21,000,000 and 22,000,000 on belong to
the table before the end of episodes was learned."""
TRUTH = range(11_500_000, 11_500_200)
"""Reset seeds of the unprotected candidates."""
SLOTS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["learn", "unprotected", "protected"])
    parser.add_argument("--runs", type=Path, default=Path("runs/rl100"))
    parser.add_argument("--tasks", nargs="+", default=["hammer-v3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.tasks:
        for seed in args.seeds:
            folder = args.runs / name / str(seed)
            if args.what == "learn":
                learn(name, seed, args.runs)
                continue
            found = (unprotected if args.what == "unprotected" else protected)(name, folder)
            line = json.dumps({"task": name, "seed": seed, **found})
            print(line, flush=True)
            with open(args.runs / f"gate_{args.what}.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")


def learn(name: str, seed: int, runs: Path) -> None:
    """The pipeline of benchmarks/rl100 up to the end of its offline stage."""
    data, folder = rl100.demonstrations(name, runs), runs / name / str(seed)
    if folder.exists() and finished(folder):
        return
    experiment = parse.load("metaworld_rl100", [f"--data.root={data}"])
    method = leaves.make("methods", experiment.method, PERSON)
    # imitate, collect, criticise, improve
    iterations = method.imitation.iterations + 2 + method.offline.candidates
    train(
        parse.load(
            "metaworld_rl100",
            [
                f"--task.env={name}",
                f"--data.root={data}",
                f"--output={folder}",
                f"--seed={seed}",
                "--budget.env_steps=null",
                f"--budget.iterations={iterations}",
                "--eval.every=0",
            ],
        )
    )


def unprotected(name: str, folder: Path) -> dict[str, Any]:
    """The offline stage again with nothing that holds it back:
    every candidate's score and truth.
    """
    out = folder.parent / f"{folder.name}-unprotected"
    shutil.rmtree(out, ignore_errors=True)
    offline = {
        "episodes": 200,
        "candidates": 20,
        "sweeps": 2,
        "kl": 0.0,
        "far": 1e9,
        "z": 0.0,
        "check": 0,
    }
    train(
        parse.load(
            folder / "config.yaml",
            [
                f"--policy.pretrained={folder / 'stages' / 'imitation'}",
                f"--output={out}",
                "--method.stage=offline",
                *(f"--method.offline.{key}={value}" for key, value in offline.items()),
                "--budget.env_steps=null",
                "--budget.iterations=100",
                "--eval.every=0",
            ],
        )
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rounds, scores = told(rows)
    policies = [out / "stages" / f"candidate-{row['iteration']}" for row in rounds]
    truth = [
        rate(name, path, TRUTH).mean().item()
        for path in [folder / "stages" / "imitation", *policies]
    ]
    return {
        "accepted": sum(row["gate/accepted"] for row in rounds),
        "candidates": len(rounds),
        "score": scores,
        "distance": [0.0] + [row["gate/distance"] for row in rounds],
        "truth": truth,
        "rank_correlation": rank_correlation(scores, truth),
        "rank_correlation_after_the_best": rank_correlation(
            scores[truth.index(max(truth)) :], truth[truth.index(max(truth)) :]
        ),
    }


def protected(name: str, folder: Path) -> dict[str, Any]:
    """Compares the policy that the stage returned with the best one that it saw."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds, scores = told(rows)
    stages = folder / "stages"
    seen = {"imitation": stages / "imitation"}
    seen |= {
        f"candidate-{row['iteration']}": stages / f"candidate-{row['iteration']}" for row in rounds
    }
    chosen = {key: rate(name, path, CHOOSING).mean().item() for key, path in seen.items()}
    best = max(chosen, key=lambda key: chosen[key])
    accepted = [f"candidate-{row['iteration']}" for row in rounds if row["gate/accepted"]]
    returned = accepted[-1] if accepted else "imitation"
    after = rate(name, seen[returned], FRESH)
    before = after if best == returned else rate(name, seen[best], FRESH)
    mean, low, high = paired(before, after, len(FRESH))
    return {
        "seen": chosen,
        "score": scores,
        "rank_correlation": rank_correlation(scores, list(chosen.values())),
        "accepted": accepted,
        "best": best,
        "returned": returned,
        "returned_minus_best": [mean, low, high],
        "fresh": {"returned": after.mean().item(), "best": before.mean().item(), "n": len(FRESH)},
        "differences": (after - before).tolist(),
    }


def told(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[float]]:
    """The rows of a run in which the gate spoke,
    and its scores of the first policy (0) and of every candidate.
    """
    rounds = [row for row in rows if "gate/gain" in row]
    scores, in_force = [0.0], 0.0
    for row in rounds:  # a gain is against the policy in force
        scores.append(in_force + row["gate/gain"])
        in_force = scores[-1] if row["gate/accepted"] else in_force
    return rounds, scores


def rate(name: str, path: Path, seeds: range) -> Tensor:
    """Success of a saved policy from each of the starts."""
    policy = saved(path).load()
    environments = leaves.make("tasks", {"name": "metaworld", "env": name}, PERSON).environments(
        SLOTS, policy.model.history
    )
    found = evaluate_control(policy, environments, episodes=len(seeds), seed=seeds.start)
    environments.close()
    return found.success


if __name__ == "__main__":
    main()
