"""Warm starts against the full chain: success from the same starts, and network evaluations.

    python -m benchmarks.rti assets/assembly-clone --env assembly-v3
    python -m benchmarks.rti RUN --env push-v3 --out runs/rti/push.jsonl

The policy is a diffusion policy of MetaWorld states that was trained with any number of steps; its
own K is that of its deployed sampler. The reference is DDPM's whole chain at every step of the
environment. Every other row is held against it, paired on the starts: the mean difference, and the
95 % interval (Student's t over episodes) whose lower end says how much worse it may be. "cold" rows
begin from noise, with DDIM on as many steps as the warm ones. The levels are the rule's, from the
spread of the policy's samples in four episodes of other starts; the last rows take few levels.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.config import leaves
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import ControlTask, Environments
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.statistics import interval, paired
from genpolicy.evaluation.warm_levels import samples, settled
from genpolicy.policy.files import Saved, saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy

REPORT = range(41_000_000, 41_001_000)
"""Reset seeds of every rate: n = 1000, looked at by nothing else."""
LEVELS_FROM = 3_000_000
"""Seed of the episodes that the levels are chosen on: hashes of it."""
GRIPPER = 3
"""The column of MetaWorld's actions that opens and closes the gripper."""
SLOTS, FEW = 100, 3
DDPM: dict[str, Any] = {"name": "ddim", "eta": 1.0}
DDIM: dict[str, Any] = {"name": "ddim", "eta": 0.0}
MEAN: dict[str, Any] = {"name": "mean", "kernel": DDPM}
REFERENCE = "whole chain"


def rows(K: int, levels: list[int]) -> dict[str, ChainConfig]:
    """The samplers by name, the reference first."""
    n, few = len(levels), list(range(FEW))[::-1]
    clip = {"discrete_dims": [GRIPPER]}

    def warm(name: str, kernel: dict[str, Any] = DDPM, **settings: Any) -> ChainConfig:
        return ChainConfig(K, kernel, execute=1, warm={"name": name, **settings})

    return {
        REFERENCE: ChainConfig(K, DDPM, execute=1),
        "whole chain, in chunks": ChainConfig(K, DDPM),
        "whole chain, mean": ChainConfig(K, MEAN, execute=1),
        "whole chain, mean, in chunks": ChainConfig(K, MEAN),
        "cold": ChainConfig(n, DDIM, execute=1),
        "cold, in chunks": ChainConfig(n, DDIM),
        "sdedit": warm("sdedit", steps=n),
        "rti": warm("rti", levels=levels),
        "rti, clip": warm("rti", levels=levels, **clip),
        "rti, mean": warm("rti", MEAN, levels=levels),
        "rti, mean, clip": warm("rti", MEAN, levels=levels, **clip),
        f"cold, {FEW}": ChainConfig(FEW, DDIM, execute=1),
        f"sdedit, {FEW}": warm("sdedit", steps=FEW),
        f"rti, {FEW}": warm("rti", levels=few),
        f"rti, {FEW}, clip": warm("rti", levels=few, **clip),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy")
    parser.add_argument("--env", required=True)
    parser.add_argument("--episodes", type=int, default=len(REPORT))
    parser.add_argument("--skip", nargs="*", default=[], help="rows to leave out")
    parser.add_argument("--out", type=Path, default=Path("runs/rti/results.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found, task = (
        saved(args.policy),
        leaves.make("tasks", {"name": "metaworld", "env": args.env}, PERSON),
    )
    policy = found.load()
    levels, told = chosen(found, policy, task)
    print(json.dumps({"policy": args.policy, "K": found.sampler.steps, **told}), flush=True)
    reference: Tensor | None = None
    environments = task.environments(min(SLOTS, args.episodes), policy.model.history)
    for name, sampler in rows(found.sampler.steps, levels).items():
        if name in args.skip:
            continue
        success, line = measured(make_policy(policy.model, sampler), environments, args.episodes)
        reference = success if reference is None else reference
        mean, low, high = paired(reference, success, args.episodes)
        line |= {"difference": mean, "difference_ci95": [low, high]}
        tell(args.out, {"policy": args.policy, "env": args.env, "row": name, **told, **line})
    environments.close()


def chosen(
    found: Saved, policy: ChainPolicy, task: ControlTask
) -> tuple[list[int], dict[str, Any]]:
    """The rule's levels, and the spread and contraction behind them."""
    environments = task.environments(4, policy.model.history)
    drawn = samples(policy, environments, LEVELS_FROM)
    environments.close()
    asked = ChainConfig(found.sampler.steps, DDPM, execute=1, warm={"name": "rti"})
    sampler, contraction = settled(asked, policy, drawn)
    levels = (sampler.warm or {})["levels"]
    return levels, {"levels": len(levels), **asdict(contraction)}


def measured(
    policy: ChainPolicy, environments: Environments, episodes: int
) -> tuple[Tensor, dict[str, Any]]:
    """Success of each episode, and the row's own numbers."""
    before = policy.model.evaluations
    found = evaluate_control(policy, environments, episodes=episodes, seed=REPORT.start)
    spent = policy.model.evaluations - before
    return found.success, {
        "n": episodes,
        "success": float(found.success.mean()),
        "ci95": list(interval(found.success)),
        "per_decision": spent / found.decisions,
        "per_action": spent / float(found.lengths.sum()),
    }


def tell(out: Path, line: dict[str, Any]) -> None:
    low, high = line["difference_ci95"]
    print(
        f"{line['row']:>28}  {line['success']:.3f} [{line['ci95'][0]:.3f}, {line['ci95'][1]:.3f}]"
        f"  {line['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        f"  {line['per_action']:6.2f} per action  {line['per_decision']:6.2f} per decision",
        flush=True,
    )
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
