r"""Preferences on a robot: SePPO beside more cloning, Diffusion-DPO beside Flow-GRPO.

    python -m benchmarks.robot_preferences train --seeds 0 1 2
    python -m benchmarks.robot_preferences table

MetaWorld's peg-insert-side from its state; ten noisy scripted demonstrations, one clone per seed,
from which every arm goes on with its preset. SePPO learns from the demonstrations alone, against
its own samples; beside it cloning goes on for as many passes through the network, of which one
forward and backward counts 3. Diffusion-DPO makes pairs of its own successes and failures from one
start state, and Flow-GRPO learns from the same kind of groups, for as many environment steps. What
is reported is the last policy as it is deployed, on 500 starts that nothing else uses.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.off_policy import clone, judge, learn, measured, of, rates
from genpolicy.evaluation.statistics import paired

TASK = "peg-insert-side-v3"
STEPS = 100_000
"""Environment steps of the arms that play."""
SEPPO = 20
"""Iterations of SePPO, each of 1024 samples of ten steps, of which both sides are differentiated
and go through the reference: 18,432 passes per iteration.
"""
CLONING = round(SEPPO * 18_432 / (100 * 128 * 3))
"""Iterations of cloning, of 100 updates on 128 rows each, that take as many."""
ARMS = {
    "clone": "the clone",
    "bc": "cloned for as long as SePPO",
    "seppo": "SePPO from the demonstrations",
    "flow_grpo": "Flow-GRPO",
    "diffusion_dpo": "Diffusion-DPO on its own successes and failures",
}
AGAINST = {"seppo": "bc", "diffusion_dpo": "flow_grpo"}
"""The arm that an arm is held against."""


def arm(out: Path, name: str, seed: int) -> None:
    """Trains an arm from the clone of its seed, and judges it."""
    folder = out / TASK / f"{name}-{seed}"
    if name == "clone":
        clone(out, TASK, seed)
        judge(folder, TASK)
        return
    shown = f"--data={{name: lerobot_dataset, root: {out / TASK / 'demonstrations'}}}"
    iterations = {"bc": CLONING, "seppo": SEPPO}
    own = (
        [shown, f"--budget={{iterations: {iterations[name]}}}", "--eval.every=0"]
        if name in iterations
        else []
    )
    learn(out, TASK, f"metaworld_{name}", seed, folder, STEPS, *own)


def table(out: Path) -> str:
    """A line per arm."""
    runs = measured(out / TASK)
    lines = [
        "| arm | success by seed (n 500) | mean [95 %] | beside it | difference [95 %] | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for name, told in ARMS.items():
        found = of(name, runs)
        if not found:
            continue
        seconds = sum(one.cpu_s for one in found) / len(found)
        other = AGAINST.get(name, "clone")
        seeds = [
            seed for seed in range(10) if f"{name}-{seed}" in runs and f"{other}-{seed}" in runs
        ]
        difference = ""
        if name != other and len(seeds) > 2:
            before, after = (
                torch.tensor([sum(runs[f"{x}-{seed}"].success) / 500 for seed in seeds]).double()
                for x in (other, name)
            )
            mean, low, high = paired(before, after, len(seeds))
            difference = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(
            f"| {told} | {rates(found)} | {ARMS[other] if name != other else ''} | {difference}"
            f" | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("train", "table"))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/off_policy"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "train":
        for seed in args.seeds:
            for name in args.arms:
                arm(args.out, name, seed)
    print(table(args.out))


if __name__ == "__main__":
    main()
