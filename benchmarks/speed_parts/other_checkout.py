"""Part d: one iteration of the quickstart's pictures, beside another checkout."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

import genpolicy
from benchmarks.speed_parts.timing import Comparison

POLL = 0.005
"""Seconds between two looks at a process's metrics."""


@dataclass(frozen=True)
class Child:
    """The quickstart's training in a process of its own, one iteration at a time."""

    checkout: Path
    folder: Path
    process: psutil.Popen

    @classmethod
    @contextlib.contextmanager
    def started(cls, checkout: Path, folder: Path, iterations: int) -> Iterator["Child"]:
        """A process that is ended with the block."""
        command = [sys.executable, "-m", "genpolicy", "train", "quickstart"]
        command += [f"--budget.iterations={iterations}", "--eval.every=0", "--eval.samples=44"]
        command += ["--threads=1", f"--output={folder}"]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        with open(folder.with_suffix(".log"), "w") as log:
            process = psutil.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log)
        process.suspend()
        try:
            yield cls(checkout, folder, process)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def reach(self, iteration: int) -> float:
        """Runs it until it has written the metrics of ``iteration``, and suspends it; returns its
        CPU seconds so far.
        """
        self.process.resume()
        while len(self.metrics()) < iteration:
            if self.process.poll() is not None:
                log = self.folder.with_suffix(".log").read_text()
                raise SystemExit(f"training in {self.checkout} ended early:\n{log[-2000:]}")
            time.sleep(POLL)
        self.process.suspend()
        spent = self.process.cpu_times()
        return spent.user + spent.system

    def metrics(self) -> list[dict[str, float]]:
        """The whole lines of metrics.jsonl that belong to iterations, not to evaluations."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if "nfe_per_sample" in row]


def against(checkout: Path, iterations: int) -> Iterator[Comparison]:
    """``iterations`` of each checkout after the first, which warms up: A B B A ..., the one that
    does not run is suspended. Start-up and evaluations are not in them. The row names what both did
    in their first iteration.
    """
    here = Path(genpolicy.__file__).resolve().parents[1]
    seconds: tuple[list[float], list[float]] = ([], [])
    with (
        tempfile.TemporaryDirectory() as folder,
        Child.started(here, Path(folder) / "ours", iterations + 2) as ours,
        Child.started(checkout, Path(folder) / "other", iterations + 2) as other,
    ):
        spent = [ours.reach(1), other.reach(1)]
        for iteration in range(iterations):
            order = (0, 1) if iteration % 2 == 0 else (1, 0)
            for side in order:
                now = (ours, other)[side].reach(iteration + 2)
                seconds[side].append(now - spent[side])
                spent[side] = now
        first = ours.metrics()[0], other.metrics()[0]
    done = ", ".join(
        f"{what} {first[0][key]:.4g} against {first[1][key]:.4g}"
        for what, key in (("evaluations per sample", "nfe_per_sample"), ("reward", "reward/total"))
    )
    yield Comparison(f"d: iteration of the quickstart's pictures; {done}", *seconds)
