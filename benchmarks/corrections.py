r"""ALOE beside simpler rules, where a person corrects the robot.

    python -m benchmarks.corrections train --seeds 0 1 2
    python -m benchmarks.corrections table

The clones of benchmarks/off_policy learn from their demonstrations, from their own episodes, half
of which fail at first, and from a scripted person who watches half of the start states and takes
over after 30 environment steps without a centimetre of progress, for the rest of the episode. All
rules see the same kind of data, make the same number of updates and play as many environment steps,
a person's among them; they differ in what they imitate and how much (`genpolicy.methods.aloe`,
setting ``weigh``). What is reported is the last policy, alone, on the fresh starts of
benchmarks/off_policy.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.off_policy import Run, learn, measured, rates
from genpolicy.evaluation import metrics_file

TASK = "shelf-place-v3"
RULES = ("critic", "returns", "success", "person", "alike")
TOLD = {
    "critic": "ALOE",
    "returns": "weighted by observed returns (AWR)",
    "success": "clones successes",
    "person": "clones demonstrations and the person (DAgger)",
    "alike": "clones everything",
}
STEPS, WATCHED = 60_000, 0.5


def table(out: Path) -> str:
    """A line per rule."""
    lines = [
        "| rule | success by seed (n 500) | mean [95 %] | ALOE minus it, by seed | a person's share"
        " of the steps |",
        "|---|---|---|---|---|",
    ]
    runs = measured(out / TASK)
    by_rule = {
        rule: {
            name[-1]: run for name, run in runs.items() if name.startswith(f"corrections-{rule}-")
        }
        for rule in RULES
    }
    aloe = by_rule[RULES[0]]
    for rule, found in by_rule.items():
        if not found:
            continue
        gains = [
            f"{_rate(aloe[seed]) - _rate(run):+.3f}" for seed, run in found.items() if seed in aloe
        ]
        told = ", ".join(gains) if rule != RULES[0] else ""
        shares = [_person(out / TASK / f"corrections-{rule}-{seed}") for seed in found]
        part = ", ".join(f"{share:.2f}" for share in shares)
        lines.append(f"| {TOLD[rule]} | {rates(list(found.values()))} | {told} | {part} |")
    return "\n".join(lines)


def _method(rule: str) -> list[str]:
    """The overrides of ALOE's preset for a rule; three of the rules read no critic."""
    if rule in ("critic", "returns"):
        return [f"--method.weigh={rule}", f"--method.practice.person.share={WATCHED}"]
    person = f"practice: {{person: {{share: {WATCHED}}}}}"
    return [f"--method={{name: aloe, weigh: {rule}, updates: 200, {person}}}"]


def _rate(run: Run) -> float:
    """The share of the fresh starts from which a run's last policy succeeds."""
    return sum(run.success) / len(run.success)


def _person(folder: Path) -> float:
    """The person's share of a run's environment steps."""
    lines = [m for m in metrics_file.read(folder) if "env_steps" in m]
    return sum(m.get("person/steps", 0.0) for m in lines) / lines[-1]["env_steps"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("train", "table"))
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=RULES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/off_policy"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "train":
        for seed in args.seeds:
            for rule in args.rules:
                folder = args.out / TASK / f"corrections-{rule}-{seed}"
                data = args.out / TASK / "demonstrations"
                section = f"--data={{name: lerobot_dataset, root: {data}}}"
                own = [section, "--eval.every=0", *_method(rule)]
                learn(args.out, TASK, "metaworld_aloe", seed, folder, STEPS, *own)
    print(table(args.out))


if __name__ == "__main__":
    main()
