"""The workspace of a run:
its folder, its processes, and what counts, divides and shows its work.
"""

from dataclasses import dataclass
from pathlib import Path

from genpolicy.rollout.micro_batch import MicroBatches
from genpolicy.training.display import Display
from genpolicy.training.iteration_metrics import IterationMetrics
from genpolicy.training.processes import Processes

CONFIG = "config.yaml"
"""In a run's folder: the resolved experiment, which is trained to resume the run."""


@dataclass(frozen=True)
class Workspace:
    """The things that the pieces of a run share."""

    folder: Path  # everything that the run writes lies in it
    processes: Processes
    metrics: IterationMetrics  # of the iteration that is running
    micro_batches: MicroBatches
    display: Display
