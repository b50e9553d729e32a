r"""Methods that improve a cloned robot policy, at equal environment steps, beside the best of 16.

    python -m benchmarks.rl100_gate learn --runs runs/gate --seeds 0 1 2 --tasks peg-insert-side-v3
    python -m benchmarks.robot_peers --runs runs/gate --seeds 0 1 2

The clones and the best of 16 by an offline critic are the first stages of RL-100's pipeline
(benchmarks/rl100_gate); every method begins from the clone of its seed and learns for 140 thousand
steps with the settings of its preset. All are played from the same starts, which nothing else uses:
a policy's last weights, as it is deployed. Rows that are there are not made again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.config import leaves, parse
from genpolicy.config.origin import PERSON
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.statistics import interval, paired
from genpolicy.policy.files import load
from genpolicy.training.experiment import finished, train

TASK = "peg-insert-side-v3"
FRESH = range(63_000_000, 63_000_500)
"""Reset seeds of the report."""
STEPS, SLOTS = 140_000, 20
ODE = {"kernel": {"name": "ddim", "eta": 0.0}, "window": None}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "clone, its ODE": ("imitation", ODE),
    "clone, mean of the noisy kernel": ("imitation", {}),
    "best of 16 by Q": ("best_of_16", {}),
}
METHODS = ("dppo", "b2_diffurl", "diffusion_nft", "find")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/gate"))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        for seed in args.seeds:
            stages = args.runs / TASK / str(seed) / "stages"
            for row, (stage, sampler) in STAGES.items():
                tell(args.runs, row, seed, stages / stage, sampler)
            for method in args.methods:
                folder, seconds = learned(args.runs, method, seed)
                tell(args.runs, method, seed, folder, {}, seconds)
    print(table(args.runs))


def learned(runs: Path, method: str, seed: int) -> tuple[Path, float]:
    """The folder of a method's run, trained where it is not there yet, and its CPU seconds."""
    folder = runs / TASK / f"{method}-{seed}"
    if not (folder.exists() and finished(folder)):
        began = time.process_time()
        train(
            parse.load(
                f"metaworld_{method}",
                [
                    f"--policy.pretrained={runs / TASK / str(seed) / 'stages' / 'imitation'}",
                    f"--task.env={TASK}",
                    f"--budget={{env_steps: {STEPS}}}",
                    "--eval.every=0",
                    "--eval.episodes=100",
                    f"--seed={seed}",
                    f"--output={folder}",
                ],
            )
        )
        (folder / "cpu_s.txt").write_text(f"{time.process_time() - began:.0f}\n")
    return folder / "policy", float((folder / "cpu_s.txt").read_text())


def tell(
    runs: Path, row: str, seed: int, policy: Path, sampler: dict[str, Any], seconds: float = 0.0
) -> None:
    """Plays a policy from the fresh starts and writes a line, where there is none."""
    if (row, seed) in {(r["row"], r["seed"]) for r in results(runs)}:
        return
    task = leaves.make("tasks", {"name": "metaworld", "env": TASK}, PERSON)
    loaded = load(policy, **sampler)
    environments = task.environments(SLOTS, loaded.model.history)
    found = evaluate_control(loaded, environments, episodes=len(FRESH), seed=FRESH.start)
    environments.close()
    line = {"row": row, "seed": seed, "cpu_s": seconds, "success": found.success.tolist()}
    with open(runs / "robot_peers.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def results(runs: Path) -> list[dict[str, Any]]:
    """The lines that there are."""
    file = runs / "robot_peers.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(runs: Path) -> str:
    """A line per row: success by seed, the mean with Student's 95 % over seeds (Wilson's over episodes
    where there is one), and the difference from DPPO, paired by seed.
    """
    found: dict[str, dict[int, Tensor]] = {}
    episodes: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {}
    for line in results(runs):
        success = torch.tensor(line["success"]).double()
        found.setdefault(line["row"], {})[line["seed"]] = success.mean()
        episodes[line["row"]] = success
        seconds.setdefault(line["row"], []).append(line["cpu_s"])
    lines = [
        "| policy | by seed | mean [95 %] | less DPPO [95 %] | CPU s |",
        "|---|---|---|---|---|",
    ]
    for row, rates in found.items():
        many = len(rates) > 1
        low, high = interval(torch.stack(list(rates.values())) if many else episodes[row])
        both = sorted(set(rates) & set(found.get("dppo", {})))
        difference = ""
        if row != "dppo" and len(both) > 1:
            before = torch.stack([found["dppo"][s] for s in both])
            after = torch.stack([rates[s] for s in both])
            mean, below, above = paired(before, after, len(both))
            difference = f"{mean:+.3f} [{below:+.3f}, {above:+.3f}]"
        by_seed = ", ".join(f"{float(rates[s]):.3f}" for s in sorted(rates))
        mean = float(torch.stack(list(rates.values())).mean())
        spent = sum(seconds[row]) / len(seconds[row])
        lines.append(
            f"| {row} | {by_seed} | {mean:.3f} [{low:.3f}, {high:.3f}] | {difference}"
            f" | {spent:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
