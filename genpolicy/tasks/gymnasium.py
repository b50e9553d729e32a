"""Any registered Gymnasium environment with continuous actions: MuJoCo's, gymnasium_robotics',
gym_pusht's, yours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from genpolicy.config.errors import ConfigError, at_least
from genpolicy.config.origin import PERSON, Origin
from genpolicy.contracts.task import Demonstration
from genpolicy.tasks._environments import Environments
from genpolicy.tasks._gym import Gym


@dataclass
class Gymnasium:
    """A Gymnasium environment as a `genpolicy.contracts.task.ControlTask`; rewards, ends and
    success are its own.
    """

    env: str  # its id, e.g. Hopper-v5, PointMaze_UMaze-v3, gym_pusht/PushT-v0, or module:id
    limit: int | None = None  # environment steps of an episode; None takes the registered one
    workers: int = 0  # processes that simulate; 0 is this one
    # the arguments that the environment is made with, e.g. {obs_type: pixels}
    kwargs: dict[str, Any] = field(default_factory=dict)
    origin: Origin = field(default=PERSON, repr=False)  # of this section

    def __post_init__(self) -> None:
        at_least("task gymnasium", self, limit=1, workers=0)
        probe = Gym(self.env, self.kwargs, self.origin)
        self.limit = self.limit or probe.spec.max_episode_steps
        if self.limit is None:
            raise ConfigError(
                f"task gymnasium: {self.env} has no limit of its own; "
                "set limit to a number of steps"
            )
        seen, _ = probe.reset(seed=0)
        low, high = probe.action_space.low, probe.action_space.high
        probe.step(np.zeros_like(low).clip(low, high))
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: value.shape for name, value in seen.items()
        }
        self.action_dim = len(low)
        self.action_low, self.action_high = low.tolist(), high.tolist()
        self.fps = probe.fps
        self.instruction = probe.spec.name.replace("_", " ").replace("-", " ")
        self.has_success = probe.reports_success
        probe.close()

    def environments(self, count: int, history: int) -> Environments:
        assert self.limit is not None  # see __post_init__
        make = partial(Gym, self.env, self.kwargs, self.origin)
        return Environments(make, count, history, self.limit, self.instruction, self.workers)

    def demonstrate(self, seed: int, noise: float) -> Demonstration:
        """Raises `ValueError`: there is no expert."""
        raise ValueError(
            f"task gymnasium has no expert for {self.env}; give a recorded data set instead"
        )
