"""Measures on this machine, in real time, whether a policy keeps up with a robot."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from genpolicy_runtime.manifest import Manifest
from genpolicy_runtime.policy import Policy

Observation = dict[str, np.ndarray]

MODES: dict[str, Callable[[Policy, Observation], np.ndarray]] = {
    "chunks": Policy.act,
    "every tick": Policy.plan,
}
"""The ways to run a policy: plan when a chunk of actions is used up, or plan at every tick."""
WARM_UP = 3
"""Plans that go before and are not measured: onnxruntime makes its memory ready in them."""


@dataclass(frozen=True)
class Timing:
    """The latencies of a policy's ticks."""

    threads: int
    mode: str  # one of `MODES`
    hz: float  # ticks per second
    milliseconds: np.ndarray  # [n], of each tick

    @property
    def misses(self) -> int:
        """Ticks whose action came later than the next tick."""
        return int((self.milliseconds > 1000 / self.hz).sum())

    def line(self) -> str:
        """The timing's line under `HEAD`."""
        low, middle, high = (
            self.milliseconds.min(),
            np.median(self.milliseconds),
            np.percentile(self.milliseconds, 99),
        )
        late = f"{self.misses} of {len(self.milliseconds)}"
        return (
            f"{self.threads:7}  {self.mode:10}  {low:8.3f}  {middle:9.3f}  {high:8.3f}  {late:>12}"
        )


HEAD = (
    f"{'threads':>7}  {'plans':10}  {'least ms':>8}  {'median ms':>9}  {'p99 ms':>8}  {'late':>12}"
)
"""The heading of the lines of `Timing`."""


def measure(policy: Policy, threads: int, mode: str, hz: float, seconds: float) -> Timing:
    """Runs a policy in real time for ``seconds`` at ``hz`` ticks per second, as a controller does:
    between two ticks this thread sleeps, and the caches cool down as they will on the robot.
    """
    tick, observation = MODES[mode], example(policy.manifest)
    policy.reset()
    for _ in range(WARM_UP):
        policy.plan(observation)
    policy.reset()
    taken = np.empty(max(round(seconds * hz), 1))
    due = time.perf_counter()
    for place in range(len(taken)):
        time.sleep(max(due - time.perf_counter(), 0))
        begun = time.perf_counter()
        tick(policy, observation)
        ended = time.perf_counter()
        taken[place] = 1000 * (ended - begun)
        # after a late tick the next one begins at once, and the clock from there
        due = max(due + 1 / hz, ended)
    return Timing(threads, mode, hz, taken)


def example(manifest: Manifest) -> Observation:
    """An observation of random numbers in [0,1): what is seen changes nothing of the time."""
    draw = np.random.Generator(np.random.Philox(key=0)).random
    return {name: draw(one.shape, dtype=np.float32) for name, one in manifest.observation.items()}
