"""A signal that asks a run to stop: the first finishes the iteration, the second stops at once."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
"""The signals that ask to stop; Windows has no SIGUSR1."""


class StopRequest:
    """While it is entered, ``asked`` tells that Ctrl-C, SIGTERM or SIGUSR1 has come."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        name = signal.Signals(number).name
        self.say(f"{name}: finishing this iteration, saving, then stopping (again: stop at once)")
