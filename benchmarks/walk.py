"""Counts the walk of one policy update through the package, for whoever reads or debugs it.

    python -m benchmarks.walk                                       # seconds

It profiles one `Run.update` of GRPO-Guard on the toy model, in one micro-batch over all rows: on
two denoising steps unless --steps says otherwise. A file is visited if one of its functions runs.
A hop is a call whose nearest caller inside the package lies in another file of the package; frames
of torch and the standard library between the two are skipped, and the call of `Run.update` itself
comes from outside and is no hop. Every resumption of a generator counts as a call, because Python
reports it as one. Methods that `dataclass` generates belong to no file and are not counted.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

import genpolicy
from genpolicy.config.parse import parse
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes

PACKAGE = Path(genpolicy.__file__).parent
GROUPS, MEMBERS = 4, 4
CHAIN_STEPS = 5


@dataclass(frozen=True)
class Walk:
    """Calls by file of the package, and those of them that came from another file."""

    calls: Counter[str] = field(default_factory=Counter)
    entries: Counter[str] = field(default_factory=Counter)

    def record(self, frame: FrameType, event: str, argument: Any) -> None:
        """Counts one event of `sys.setprofile`."""
        file = frame.f_code.co_filename
        if event != "call" or not inside(file):
            return
        self.calls[file] += 1
        caller = frame.f_back
        while caller is not None and not inside(caller.f_code.co_filename):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != file:
            self.entries[file] += 1


def inside(file: str) -> bool:
    return file.startswith(f"{PACKAGE}/")


def update(folder: Path, steps: int) -> Callable[[], Any]:
    """One update of GRPO-Guard that is ready to run: its rollout is there, its advantages drawn."""
    prompts = folder / "prompts.txt"
    prompts.write_text("bright\ndark\nbright picture\ndark picture\n")
    raw = {
        "policy": {"name": "toy"},
        "chain": {
            "steps": CHAIN_STEPS,
            "kernel": {"name": "ddim", "eta": 1.0},
            "window": [0, steps],
        },
        "task": {"name": "prompts", "prompts": str(prompts)},
        "reward": {"jpeg_compressibility": 1.0},
        "method": {
            "name": "grpo_guard",
            "groups": GROUPS,
            "group": MEMBERS,
            "updates": 1,
            "reduce": "sum",
            "clip": 0.2,
        },
        "budget": {"iterations": 1},
        "output": str(folder / "run"),
    }
    run, method = prepare(parse(raw), folder / "run", Processes(Accelerator(cpu=True)))
    run.spent.iteration = 1
    rollout = run.collect(GROUPS, MEMBERS)
    advantage = torch.randn(GROUPS, MEMBERS)
    (batch,) = run.minibatches(rollout, 1)
    return lambda: run.update(rollout, batch, advantage, method.loss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        choices=range(1, CHAIN_STEPS),
        help="denoising steps that the update trains (default: %(default)s)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    walk = Walk()
    with tempfile.TemporaryDirectory() as folder:
        ready = update(Path(folder), args.steps)
        sys.setprofile(walk.record)
        try:
            ready()
        finally:
            sys.setprofile(None)
    print(f"files {len(walk.calls)}, hops {walk.entries.total()} ({args.steps} denoising steps)")
    print("\n| file | entries from another file | calls |\n|---|---|---|")
    for file, calls in sorted(walk.calls.items(), key=lambda item: -walk.entries[item[0]]):
        print(f"| {Path(file).relative_to(PACKAGE)} | {walk.entries[file]} | {calls} |")


if __name__ == "__main__":
    main()
