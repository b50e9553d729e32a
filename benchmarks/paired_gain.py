"""The gain of a run on a robot task: its start and its end, same sampler, same starts, paired.

    python -m benchmarks.paired_gain RUN … [--episodes 500] [--seed 9000000]

The starts from 9,000,000 on are used by nothing else. The lower bound is that of the 95 % interval
of the mean paired difference (Student's t over episodes; over runs where several are given: each
run is a unit then).
"""

import argparse
import math
from pathlib import Path

import torch
from scipy.stats import t

from genpolicy.config import leaves, parse
from genpolicy.config.origin import PERSON
from genpolicy.contracts.task import ControlTask
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.statistics import paired
from genpolicy.policy.files import saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from genpolicy.training.build import control_model


def success(policy: ChainPolicy, task: ControlTask, episodes: int, seed: int) -> torch.Tensor:
    environments = task.environments(20, policy.model.history)
    try:
        return evaluate_control(policy, environments, episodes=episodes, seed=seed).success
    finally:
        environments.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=9_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    starts: dict[str, torch.Tensor] = {}
    gains: list[float] = []
    for run in args.runs:
        experiment = parse.load(run / "config.yaml")
        task, end = leaves.make("tasks", experiment.task, PERSON), saved(run)
        key = str(experiment.policy)
        if key not in starts:
            start = make_policy(control_model(experiment.policy, task, None, PERSON), end.sampler)
            starts[key] = success(start, task, args.episodes, args.seed)
        after = success(end.load(), task, args.episodes, args.seed)
        gain, low, high = paired(starts[key], after, args.episodes)
        gains.append(gain)
        print(
            f"{run}: {starts[key].mean():.3f} -> {after.mean():.3f},"
            f" paired {gain:+.3f} [{low:+.3f}, {high:+.3f}], n {args.episodes}",
            flush=True,
        )
    if len(gains) > 1:
        values = torch.tensor(gains)
        half = float(t.ppf(0.975, len(gains) - 1)) * float(values.std()) / math.sqrt(len(gains))
        mean = float(values.mean())
        print(f"over {len(gains)} runs: {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]")


if __name__ == "__main__":
    main()
