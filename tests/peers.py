"""Several processes in one: each is a thread, and their accelerators meet where real ones would."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genpolicy.learning.critic import StateValue

PATIENCE = 20.0
"""Seconds after which a peer that waits for others gives up: they do not call the same things."""


class Meeting:
    """The place where ``count`` peers exchange values, all at once."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=PATIENCE)
        self.values: list[Any] = [None] * count

    def exchange(self, index: int, value: Tensor) -> list[Tensor]:
        self.values[index] = value.clone()
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        if len({v.shape for v in values}) > 1:
            raise RuntimeError(
                f"peers exchange different shapes: {[tuple(v.shape) for v in values]}"
            )
        return values


class Peer:
    """The part of accelerate's Accelerator that `genpolicy.training.processes.Processes` needs."""

    trackers: Sequence[Any] = ()
    device = torch.device("cpu")

    def __init__(self, index: int, meeting: Meeting) -> None:
        self.process_index, self.num_processes, self.meeting = index, meeting.count, meeting
        self.is_main_process = index == 0

    def gather(self, value: Tensor) -> Tensor:
        return torch.cat(self.meeting.exchange(self.process_index, value))

    def reduce(self, value: Tensor, how: str) -> Tensor:
        assert how == "sum"
        return torch.stack(self.meeting.exchange(self.process_index, value)).sum(0)

    def wait_for_everyone(self) -> None:
        self.meeting.exchange(self.process_index, torch.zeros(1))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Nobody listens."""


def peers(count: int) -> list[Peer]:
    """``count`` accelerators that know each other."""
    meeting = Meeting(count)
    return [Peer(index, meeting) for index in range(count)]


def together[T](works: Sequence[Callable[[], T]], accelerators: Sequence[Peer]) -> list[T]:
    """Returns the results of these peers' works, done at the same time;
    raises the first exception of one of them.
    """
    results: list[Any] = [None] * len(works)
    failures: list[tuple[bool, BaseException]] = []

    def do(place: int) -> None:
        try:
            results[place] = works[place]()
        except BaseException as error:
            failures.append((isinstance(error, threading.BrokenBarrierError), error))
            accelerators[place].meeting.barrier.abort()  # nobody waits for one who does not come

    threads = [threading.Thread(target=do, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]
    return results


def alike(inputs: int) -> StateValue:
    """A value with the same weights in every thread: threads share torch's generator."""
    value, draw = StateValue(inputs), torch.Generator().manual_seed(0)
    for layer in value.network:
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = torch.randn(layer.weight.shape, generator=draw) / inputs**0.5
            layer.bias.data.zero_()
    return value
