"""The metrics of one iteration: numbers by name, seconds and memory by phase, rows collected and
seen.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Mapping

import torch

from genpolicy.training.processes import Processes


class IterationMetrics:
    """Numbers of the iteration that is running; `close` returns them and begins the next page.

    processes: all that run the experiment; each logs what it sees, and everybody's count alike.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._phase: str | None = None
        self._since = 0.0
        self._begin()

    def _begin(self) -> None:
        self.numbers: dict[str, list[float]] = defaultdict(list)
        self.clock: dict[str, float] = defaultdict(float)
        self.memory: dict[str, float] = defaultdict(float)
        self.collected, self.env_steps = 0, 0.0  # rows; steps of the environments
        self.seen = 0  # recorded rows that were learned from
        self.evaluations = 0.0  # of networks that act and do not learn, in rows

    def log(self, name: str, value: float) -> None:
        """Add a number; all of one name are averaged, those of other processes among them."""
        self.numbers[name].append(value)

    def log_all(self, values: Mapping[str, float]) -> None:
        """Add several numbers."""
        for name, value in values.items():
            self.numbers[name].append(value)

    def phase(self, name: str | None) -> None:
        """Start timing ``name``; None stops."""
        now = time.perf_counter()
        if self._phase is not None:
            self.clock[self._phase] += now - self._since
            self.memory[self._phase] = max(self.memory[self._phase], _peak_gigabytes())
        self._phase, self._since = name, now

    def close(self) -> dict[str, float]:
        """The mean of everything that any process logged under a name, this process's time/PHASE
        in seconds and memory/peak_gb; and a new page. All processes call it together.
        """
        totals = self.processes.sums({name: sum(values) for name, values in self.numbers.items()})
        counts = self.processes.sums({name: len(values) for name, values in self.numbers.items()})
        metrics = {name: total / counts[name] for name, total in totals.items()}
        metrics |= {f"time/{phase}": spent for phase, spent in self.clock.items()}
        metrics["memory/peak_gb"] = max(self.memory.values(), default=0.0)
        self._begin()
        return metrics


def _peak_gigabytes() -> float:
    """The accelerator's memory at its highest since the last call; without one, this process's at
    its highest so far, or 0 on Windows, where Python does not know it.
    """
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak
    if sys.platform == "win32":
        return 0.0
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
