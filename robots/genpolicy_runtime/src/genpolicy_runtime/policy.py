"""An exported policy that acts, tick by tick."""

import operator
import threading
from collections import deque
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np

from genpolicy_runtime import manifest as manifests
from genpolicy_runtime.errors import ExportError, shown
from genpolicy_runtime.graphs import Graphs
from genpolicy_runtime.manifest import Manifest
from genpolicy_runtime.noise import SEEDS, noise
from genpolicy_runtime.observation import Frame, frame
from genpolicy_runtime.order import ACTIONS, NOISE

THREADS = 1024
"""Threads of the CPU, at most."""


class Policy:
    """An exported policy and its place in an episode.

    The actions of an episode are a function of its seed and of what was observed since `reset`.
    ``Policy(policy.manifest, policy.graphs)`` is another one with the same graphs in memory, which
    acts in an episode of its own. Calls from several threads are carried out one after another.
    """

    def __init__(self, manifest: Manifest, graphs: Graphs) -> None:
        self.manifest = manifest
        self.graphs = graphs
        self._lock = threading.RLock()  # `act` plans while it holds it
        low, high = manifest.action.low, manifest.action.high
        self._low = None if low is None else np.array(low, np.float32)
        self._high = None if high is None else np.array(high, np.float32)
        said = manifest.instruction
        self._tokens: Mapping[str, np.ndarray] = {} if said is None else said.tokens
        self.reset()

    @classmethod
    def load(
        cls, folder: "str | PathLike[str]", provider: str = "cpu", threads: int = 1
    ) -> "Policy":
        """Returns the policy that `genpolicy export` wrote into ``folder``.

        provider: "cpu", "cuda" or "tensorrt". threads: of the CPU, per graph. Raises `ExportError`
        with one sentence where a file is missing, damaged or newer than this runtime, or where this
        machine can't run it. Nothing in the folder is code.
        """
        if not isinstance(threads, int) or not 1 <= threads <= THREADS:
            raise ExportError(
                f"threads is {shown(threads)}; it must be a whole number from 1 to {THREADS}"
            )
        try:
            manifest = manifests.read(Path(folder))
            return cls(manifest, Graphs(Path(folder), manifest, provider, threads))
        except OSError as error:
            file = shown(str(error.filename))
            raise ExportError(f"{file} can't be opened: {error.strerror}") from None

    def reset(self, seed: int = 0) -> None:
        """Begins an episode: nothing is observed, planned or drawn yet.

        seed: names the episode's noise, from 0 to 2^64 - 1.
        """
        try:
            word = operator.index(seed)
        except TypeError:
            word = -1
        if not 0 <= word < SEEDS:
            raise ValueError(f"seed is {shown(seed)}; it must be a whole number from 0 to 2^64 - 1")
        with self._lock:
            self._seed = word
            self._decisions = 0
            self._frames: list[Frame] = []
            self._queue: deque[np.ndarray] = deque()
            self._previous: np.ndarray | None = None

    def instruct(self, tokens: Mapping[str, np.ndarray]) -> None:
        """Tells the policy what to do from its next decision on, until it is told otherwise, in the
        episodes that follow, too. Without this it does what it was exported with.

        tokens: name -> array, exactly those of the manifest's ``instruction.tokens``, in their
        shapes and dtypes, as `genpolicy.formats.onnx.tokens` makes them. Raises `ValueError` with
        one sentence; the policy is then as it was before.
        """
        said = self.manifest.instruction
        needed = {} if said is None else said.tokens
        if not needed:
            raise ValueError("the policy reads no instruction: none of its graphs takes tokens")
        kinds = {name: f"{array.dtype} {list(array.shape)}" for name, array in needed.items()}
        given = {name: np.asarray(array) for name, array in tokens.items()}
        for name in (*kinds, *given):
            has = f"{given[name].dtype} {list(given[name].shape)}" if name in given else "missing"
            if has != kinds.get(name):
                raise ValueError(
                    f"tokens {name} is {has}; the policy takes"
                    f" {', '.join(f'{name} as {kind}' for name, kind in kinds.items())}"
                )
        with self._lock:
            self._tokens = {name: array.copy() for name, array in given.items()}

    def observe(self, observation: Mapping[str, np.ndarray]) -> None:
        """Takes note of a tick in which nothing is asked: `act` and `plan` do so themselves.

        Raises `ObservationError` with one sentence; the policy is then as it was before.
        """
        with self._lock:
            self._frames = self._after(observation)

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the action of this tick, float32 [D], in the environment's units, clipped to the
        limits that the manifest names.

        The policy plans when all actions of its last plan have been returned; to be called once per
        tick, so that the frames that it sees are a tick apart.
        """
        with self._lock:
            if not self._queue:
                self._queue.extend(self.plan(observation))
            else:
                self.observe(observation)
            return self._queue.popleft()

    def plan(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the actions of a new decision, float32 [executed,D], clipped as those of `act`,
        and keeps none for it.

        It observes, as `act` does. Raises `FloatingPointError` where the graph's answer is no
        finite number, and `ExportError` where onnxruntime fails; the policy is then as it was
        before, so that the same observation may be tried again.
        """
        with self._lock:
            return self._plan(observation)

    def _plan(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """`plan`, by whoever holds the lock."""
        frames = self._after(observation)
        outputs = self.graphs.run(self._given(frames), first=self._previous is None)
        actions = outputs[ACTIONS][0].astype(np.float32, copy=False)
        finite = np.isfinite(actions).all()
        if self._low is not None or self._high is not None:
            actions = actions.clip(self._low, self._high)
        if not (finite and np.isfinite(actions).all()):
            raise FloatingPointError(
                f"decision {self._decisions} of seed {self._seed} is not finite: the policy has"
                " diverged, and there is no action to carry out"
            )
        self._frames = frames
        self._decisions += 1
        if self.manifest.state is not None:
            self._previous = outputs[self.manifest.state.output]
        return actions

    def _after(self, observation: Mapping[str, np.ndarray]) -> list[Frame]:
        """The frames that the policy sees once it has seen this one; it keeps them not yet."""
        seen = frame(observation, self.manifest.observation)
        history = self.manifest.history
        # an episode's first frame stands for those before it
        return [*self._frames, seen][-history:] if self._frames else [seen] * history

    def _given(self, frames: list[Frame]) -> dict[str, np.ndarray]:
        """The arrays of this decision, by the names of the graphs' inputs."""
        given = {
            name: np.array([[seen[name] for seen in frames]]) for name in self.manifest.observation
        }
        given[NOISE] = noise(self._seed, self._decisions, self.manifest.noise)[None]
        given.update(self._tokens)
        if self.manifest.state is not None and self._previous is not None:
            given[self.manifest.state.input] = self._previous
        return given
