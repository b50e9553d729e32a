"""MetaWorld from its state for LeRobot's commands: lerobot-eval --env.type=metaworld_state
--env.task=assembly-v3.

LeRobot's own metaworld environment shows pictures alone, and draws one every step.
"""

from dataclasses import dataclass, field
from typing import Any

import gymnasium
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import FreezeAfterEpisodeEnd

from genpolicy.tasks.metaworld import MetaWorld
from lerobot_policy_genpolicy.control_env import NAMES, ControlEnv

KINDS = {"agent_pos": FeatureType.STATE, "environment_state": FeatureType.ENV}


def make(env: str, reward: str, limit: int, draw: bool) -> gymnasium.Env:
    """A MetaWorld task that stands still once its episode has ended,
    as LeRobot's rollouts expect.
    """
    return FreezeAfterEpisodeEnd(ControlEnv(MetaWorld(env=env, reward=reward, limit=limit), draw))


gymnasium.register(
    "genpolicy/metaworld_state", entry_point="lerobot_policy_genpolicy.metaworld_state:make"
)


@EnvConfig.register_subclass("metaworld_state")
@dataclass
class MetaWorldState(EnvConfig):
    """A genpolicy MetaWorld task: its name, reward ("sparse" or "dense"), steps of an episode, and
    whether LeRobot's videos show it.
    """

    task: str | None = "assembly-v3"
    fps: int = 80
    reward: str = "sparse"
    episode_length: int = 150
    draw: bool = False
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        task = MetaWorld(**self._settings)
        self.features = {"action": PolicyFeature(FeatureType.ACTION, (task.action_dim,))}
        self.features_map = {"action": "action"}
        for name, shape in task.shapes.items():
            self.features[NAMES[name]] = PolicyFeature(KINDS[NAMES[name]], tuple(shape))
            self.features_map[NAMES[name]] = name

    @property
    def _settings(self) -> dict[str, Any]:
        return {"env": self.task, "reward": self.reward, "limit": self.episode_length}

    @property
    def gym_id(self) -> str:
        """The registered environment."""
        return "genpolicy/metaworld_state"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """The arguments that the environment is made with."""
        return {**self._settings, "draw": self.draw}
