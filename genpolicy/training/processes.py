"""Many processes as one: who collects which groups, and sums and gathers over all. World size
enters nowhere else.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import Experiment

LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""The variables in which torchrun and mpirun say how many processes they have started."""


class Processes:
    """The processes that run an experiment together;
    ``accelerator`` is accelerate's view of them.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes

    @property
    def main(self) -> bool:
        """True in the process that writes and speaks."""
        return self.accelerator.is_main_process

    def groups(self, groups: int, updates: int) -> Tensor:
        """This process's groups [m] of M: whole ones, and the same number in each of the updates'
        minibatches.
        """
        if groups % (updates * self.count):
            raise ConfigError(
                f"{groups} groups can't be split evenly into {updates} updates on {self.count}"
                f" processes: the number of groups must be a multiple of {updates * self.count}"
            )
        return torch.arange(groups).view(updates, self.count, -1)[:, self.index].flatten()

    def require_split(self, setting: str, groups: int, updates: int = 1) -> None:
        """Raise `ConfigError` where so many groups, or episodes, can't be split into whole ones
        (see `groups`). setting: its name in the experiment.
        """
        multiple = updates * self.count
        if groups % multiple:
            over = f"into {updates} updates on" if updates > 1 else "over"
            raise ConfigError(
                f"{setting} is {groups}, which can't be split evenly {over} {self.count}"
                f" processes: it must be a multiple of {multiple}"
            )

    def gather_groups(self, local: Tensor, updates: int) -> Tensor:
        """[m,N] of this process to [M,N] of all, in the groups' global order."""
        if self.count == 1:
            return local
        gathered = self.gather(local)
        return (
            gathered.view(self.count, updates, -1, local.shape[1])
            .transpose(0, 1)
            .reshape(-1, local.shape[1])
        )

    def gather(self, value: Tensor) -> Tensor:
        """The rows of all processes, in their order, on the CPU."""
        return (
            value
            if self.count == 1
            else self.accelerator.gather(value.to(self.accelerator.device)).cpu()
        )

    def reduce(self, value: Tensor) -> Tensor:
        """The sum over all processes, on the value's device."""
        if self.count == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), "sum").to(value.device)

    def agreed(self, values: Sequence[float]) -> list[float]:
        """The main process's numbers, on every process. Each may have computed its own with another
        last bit; whoever decides by one asks here first, so that all decide alike.
        """
        if self.count == 1:
            return list(values)
        mine = torch.tensor([list(values)], dtype=torch.float64)
        return self.gather(mine)[0].tolist()

    def sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.count == 1:
            return value
        return float(self.reduce(torch.tensor([value], dtype=torch.float64)))

    def share(self, total: int) -> int:
        """This process's share of a count that is everybody's: the shares add up to the total."""
        return total // self.count + (self.index < total % self.count)

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums by name over all processes; a process has nothing under a name that it lacks."""
        if self.count == 1:
            return dict(values)
        # everybody learns the names of all
        written = "\n".join(values).encode()
        longest = int(self.gather(torch.tensor([len(written)])).max())
        if not longest:
            return {}
        padded = torch.tensor(list(written.ljust(longest)), dtype=torch.uint8)[None]
        rows = [bytes(row.tolist()).decode().rstrip() for row in self.gather(padded)]
        names = list(dict.fromkeys(name for row in rows if row for name in row.split("\n")))
        mine = torch.tensor([values.get(name, 0.0) for name in names], dtype=torch.float64)
        return dict(zip(names, self.reduce(mine).tolist(), strict=True))

    def moments(self, values: Tensor) -> tuple[float, float]:
        """The mean and the variance (ddof 0) over the rows [R] of all processes, in fp64; NaN where
        nobody has a row.
        """
        wide = values.double()
        count = self.sum(float(len(wide)))
        if not count:
            return math.nan, math.nan
        mean = self.sum(float(wide.sum())) / count
        return mean, self.sum(float(((wide - mean) ** 2).sum())) / count

    def normalised(self, values: Tensor) -> Tensor:
        """(values - mean) / std over the rows [R] of all processes."""
        mean, variance = self.moments(values)
        return (values - mean) / (variance**0.5 + 1e-8)

    def log(self, metrics: Mapping[str, Any], iteration: int) -> None:
        """Hand the numbers among an iteration's metrics to the trackers."""
        numbers = {name: v for name, v in metrics.items() if isinstance(v, int | float)}
        self.accelerator.log(numbers, step=iteration)

    def start_trackers(self, text: str) -> None:
        """Begin the trackers' records with the experiment as text; `ConfigError` where one can't
        (it has no key, or no server answers).
        """
        try:
            self.accelerator.init_trackers("genpolicy", config={"experiment": text})
        except Exception as error:  # each tracker has errors of its own
            raise ConfigError(
                f"the experiment: trackers: one can't begin: {' '.join(str(error).split())}"
            ) from error

    def finish_trackers(self) -> None:
        """End the trackers' records."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def wait(self) -> None:
        """Go on together."""
        self.accelerator.wait_for_everyone()


def start_processes(experiment: Experiment, folder: Path | None) -> Processes:
    """Join the processes that launched this run; its trackers will write to ``folder``.

    Raises `ConfigError` for a tracker that is unknown or not installed.
    """
    try:
        accelerator = Accelerator(log_with=list(experiment.trackers) or None, project_dir=folder)
    except ValueError as error:
        raise ConfigError(f"the experiment: trackers: {error}") from None
    started = max(int(os.environ.get(name, "1")) for name in LAUNCHED)
    if started > accelerator.num_processes:
        raise ConfigError(
            f"{started} processes were started, and accelerate has joined none of them, so that"
            " each would be the whole run: on CPUs, set ACCELERATE_USE_CPU=true for them"
        )
    # accelerate leaves out what is not installed without a word
    found = {str(tracker) for tracker in accelerator.log_with}
    missing = [name for name in experiment.trackers if name not in found]
    if missing:
        raise ConfigError(
            f"the experiment: trackers: {', '.join(missing)} can't be imported: install it, or"
            " leave it out"
        )
    return Processes(accelerator)


def launch_remark(processes: Processes) -> str | None:
    """A line for the person where a launcher was asked for several processes and started one;
    None elsewhere.
    """
    asked = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if processes.count > 1 or not (asked and cpu):
        return None
    return (
        "accelerate launch --cpu has started one process, whatever --num_processes says: for"
        " several, set ACCELERATE_USE_CPU=true and start them with torchrun --nproc_per_node N -m"
        " genpolicy"
    )


def end_processes() -> None:
    """Leave them: at the end of a program, not of a run, after which another may follow (`genpolicy
    compare`).
    """
    PartialState().destroy_process_group()
