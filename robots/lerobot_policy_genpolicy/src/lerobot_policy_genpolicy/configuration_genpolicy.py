"""The configuration of LeRobot's policy type genpolicy; LeRobot finds its class and its processors
by the names of this file, modeling_genpolicy and processor_genpolicy.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

from lerobot.configs.policies import PreTrainedConfig

REFUSED = "a policy of type genpolicy is trained by genpolicy train, not by LeRobot"


@PreTrainedConfig.register_subclass("genpolicy")
@dataclass
class GenpolicyConfig(PreTrainedConfig):
    """A folder that `genpolicy export --format lerobot_plugin` wrote."""

    @property
    def observation_delta_indices(self) -> list[int]:
        """The frames that a decision sees, counted from the current one."""
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> None:
        """No actions: it is not trained here."""

    @property
    def reward_delta_indices(self) -> None:
        """No rewards: it is not trained here."""

    def get_optimizer_preset(self) -> NoReturn:
        """Raises: it is not trained here."""
        raise NotImplementedError(REFUSED)

    def get_scheduler_preset(self) -> Any:
        """Raises: it is not trained here."""
        raise NotImplementedError(REFUSED)

    def validate_features(self) -> None:
        """Nothing to check: the policy itself says what is missing."""
