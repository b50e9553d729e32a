"""Speed beside others that do the same work, in CPU time of one thread on one machine.

    python -m benchmarks.speed                                # a, b and c: two minutes
    python -m benchmarks.speed --only a c --repeats 200
    python -m benchmarks.speed --only d --against CHECKOUT    # another checkout of this repository

a: one decision of 40 environments by a small network, beside DPPO's arithmetic
   (`benchmarks.speed_parts.two_network_sampler`).
b: one decision of LeRobot's DiffusionPolicy, beside LeRobot (needs lerobot).
c: one update of implicit Q-learning, beside plain torch (needs metaworld).
d: one iteration of the quickstart's pictures, beside another checkout.

Both sides of a row run in turn, first one, then the other, then in the opposite order. In a, b
and c they must agree in what they compute before they are timed; d says what both did. A ratio
below 1 means that genpolicy, or this checkout, is the faster one. The interval is that of the
median at 95 %, by order statistics.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.speed_parts.critic_update import critic
from benchmarks.speed_parts.lerobot_decision import lerobot
from benchmarks.speed_parts.other_checkout import against
from benchmarks.speed_parts.small_network import sampling
from benchmarks.speed_parts.timing import COLUMNS, Comparison

PARTS: dict[str, Callable[[int], Iterator[Comparison]]] = {
    "a": sampling,
    "b": lerobot,
    "c": critic,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "d"], help="default: all")
    parser.add_argument(
        "--repeats", type=int, default=60, help="timed calls of each side (default: %(default)s)"
    )
    parser.add_argument("--against", type=Path, help="another checkout of this repository, for d")
    parser.add_argument(
        "--iterations", type=int, default=24, help="of each checkout in d (default: %(default)s)"
    )
    args = parser.parse_args()
    chosen = args.only or [*PARTS, *(["d"] if args.against else [])]
    if "d" in chosen and args.against is None:
        parser.error("d needs --against, another checkout of this repository")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, 1 thread, CPU time\n\n| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for part in chosen:
        if part == "d":
            found = against(args.against.resolve(), args.iterations)
        else:
            found = PARTS[part](args.repeats)
        for comparison in found:
            print(comparison.row(), flush=True)


if __name__ == "__main__":
    main()
