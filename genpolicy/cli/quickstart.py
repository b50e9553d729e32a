"""The verb quickstart: both worlds learn by reinforcement on the embedded models, and what changed
is measured afresh.
"""

import importlib.util
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from genpolicy.cli import quickstart_pictures, quickstart_robot
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import Experiment
from genpolicy.training.experiment import Rehearsal, finished, rehearse, train


def run(args: Namespace) -> int:
    """Runs both worlds side by side, each on a core of its own, pictures in this process and the
    robot in another; or one alone.

    Returns the exit code. Deterministic given the seed, times aside.
    """
    out, seed = Path(args.out), args.seed
    if args.world != "both":
        return _one_world(args.world, out / args.world, seed)
    if importlib.util.find_spec("metaworld") is None:
        print(
            "The robot's half needs a simulator: "
            'pip install "genpolicy[simulation]". Here is the other half.\n'
        )
        return _one_world("pictures", out / "pictures", seed)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "robot.log"
    print(
        f"Two worlds, one method each, side by side. The robot's half writes to {log} meanwhile.\n"
    )
    command = [sys.executable, "-m", "genpolicy", "quickstart", "--world", "robot"]
    with open(log, "w") as file:
        robot = subprocess.Popen(
            [*command, "--out", str(out), "--seed", str(seed)], stdout=file, stderr=file
        )
    try:
        code = _one_world("pictures", out / "pictures", seed)
        print("\n" + "-" * 80 + "\nThe robot:\n", flush=True)
        code = robot.wait() or code
    except BaseException:
        robot.terminate()
        robot.wait()
        raise
    lines = log.read_text().split("\n")
    print("\n".join(line for line in lines if "\r" not in line))  # all but the progress bar
    return code


def _one_world(world: str, out: Path, seed: int) -> int:
    """Trains one half, measures it before and after, and prints what to look at."""
    half = quickstart_pictures if world == "pictures" else quickstart_robot
    started = time.perf_counter()
    experiment = _learn(half.CONFIG, out, seed, half.announce)
    if experiment is None:
        return 0
    shown = half.report(experiment, out, seed)
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes in all. Look at")
    for line in shown:
        print(f"  {line}")
    return 0


def _learn(
    name: str, out: Path, seed: int, announce: Callable[[Experiment, Rehearsal], None]
) -> Experiment | None:
    """Trains a shipped configuration into ``out``, or goes on with it; returns None where a signal
    stopped it.
    """
    overrides = [f"--seed={seed}", f"--output={out}"]
    experiment = parse.load(name, overrides)
    file = out / "config.yaml"
    resumed = file.is_file()
    if resumed and parse.load(file) != experiment:
        raise ConfigError(
            f"{out} holds another run, or a quickstart with another seed: choose another --out"
        )
    if resumed:
        print(f"Going on with the run in {out}.\n")
    else:
        announce(experiment, rehearse(name, overrides)[1])
        print(
            f"Everything is written to {out}. Ctrl-C stops after the current iteration; "
            "the same command goes on.\n"
        )
    train(file if resumed else experiment)
    if not finished(out):
        print("\nStopped; the same command goes on from here.")
        return None
    return experiment
