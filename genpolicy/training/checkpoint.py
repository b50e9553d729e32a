"""Checkpoints: written whole or not at all, read with care, one run to a folder."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from genpolicy.config.errors import ConfigError
from genpolicy.rollout import tensor_file

STATE = "state.pt"
LOCK = ".lock"
"""Marks a run's folder, and is held while the run lives."""


class Stateful(Protocol):
    """An object that is saved and resumed with a run."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class RunState:
    """All that a run saves and resumes beside its own counters: objects by name, each owned once.

    registered: counters, and what only trains. parts: those of the policy that the method attached;
    one that came with a saved policy and that nobody attached does not change. unclaimed: states of
    parts that a resumed run has not attached again; a method attaches them before it changes what
    they share.
    """

    def __init__(self) -> None:
        self.registered: dict[str, Stateful] = {}
        # states of what a resumed run has not registered again
        self.waiting: dict[str, Any] = {}
        self.parts: dict[str, Stateful] = {}
        self.unclaimed: dict[str, Any] = {}

    def register(self, objects: Mapping[str, Stateful]) -> None:
        """Take what only trains; `ValueError` for a part of the policy, which has one owner, and
        for a name that another object has.
        """
        for name, value in objects.items():
            self._require_new(name, value, self.parts)
            if self.registered.get(name, value) is not value:
                raise ValueError(f"another object is registered as {name}: choose another name")
            if name in self.waiting:
                value.load_state_dict(self.waiting.pop(name))
            self.registered[name] = value

    def own_part(self, name: str, part: Stateful) -> None:
        """Take a part of the policy, and give it the state that it had in the checkpoint."""
        self._require_new(name, part, self.registered)
        if name in self.unclaimed:
            part.load_state_dict(self.unclaimed.pop(name))
        self.parts[name] = part

    def _require_new(self, name: str, value: Stateful, others: Mapping[str, Stateful]) -> None:
        if name in others or any(value is other for other in others.values()):
            raise ValueError(
                f"{name} is both registered and a part of the policy: it has one owner"
            )

    def require_claimed(self) -> None:
        """Raise `ConfigError` where a part of the checkpoint has not been attached again."""
        if self.unclaimed:
            raise ConfigError(
                f"the checkpoint holds the policy's parts {', '.join(self.unclaimed)}, which the"
                " method has not attached in the first iteration since the run was resumed: they"
                " would be lost"
            )

    def parts_state(self) -> dict[str, Any]:
        """The states of the parts, those that nobody has attached yet among them."""
        return self.unclaimed | {name: part.state_dict() for name, part in self.parts.items()}

    def load_parts(self, states: Mapping[str, Any]) -> None:
        """Give every part its state; parts that a later stage attaches take up theirs then."""
        self.unclaimed = dict(states)
        for name, part in self.parts.items():
            if name in self.unclaimed:
                part.load_state_dict(self.unclaimed.pop(name))


def write(folder: Path, iteration: int, state: Any, keep: int = 2) -> None:
    """checkpoints/ITERATION/state.pt, whole or not at all; only the last ``keep`` stay, and none of
    a later iteration: a run that goes on from before a damaged one comes there again.
    """
    root = folder / "checkpoints"
    tensor_file.write(root / str(iteration) / STATE, state)
    there = iterations(folder)
    later = [number for number in there if number > iteration]
    for old in later + there[: len(there) - len(later)][:-keep]:
        shutil.rmtree(root / str(old))


def iterations(folder: Path) -> list[int]:
    """The iterations that a run's folder has a checkpoint of, in order."""
    found = (path.parent.name for path in (folder / "checkpoints").glob(f"[0-9]*/{STATE}"))
    return sorted(int(name) for name in found if name.isdigit())


def latest(folder: Path, say: Callable[[str], None] = lambda text: None) -> Any | None:
    """The newest checkpoint's state on the CPU, or None where there is none. ``say`` is told of
    every damaged one, in the place of which the one before is taken; where all are damaged, raises
    `ConfigError`.
    """
    there = iterations(folder)
    for number in reversed(there):
        try:
            return tensor_file.read(folder / "checkpoints" / str(number) / STATE)
        except ValueError as error:
            say(f"{error}; it is left out, and an older checkpoint is looked for")
    if there:
        raise ConfigError(
            f"checkpoint {folder / 'checkpoints' / str(there[-1])} is damaged (cut short or not"
            " ours), and there is no older one: put it back from a copy, or delete the run's folder"
            " to start again"
        )
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder; a second run in it raises.
    However the process ends, the lock goes with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # the file stays, because it marks the folder; a lock that outlives its process is none of ours
    lock = FileLock(folder / LOCK, timeout=0, fallback_to_soft=False, preserve_lock_file=True)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"folder {folder} is in use by another run: choose another output"
        ) from None
    try:
        yield
    finally:
        lock.release()
