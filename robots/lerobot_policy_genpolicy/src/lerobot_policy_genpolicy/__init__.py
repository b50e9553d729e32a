"""Imported by LeRobot's commands; registers --env.type=metaworld_state and the policy type
genpolicy, which `genpolicy export --format lerobot_plugin` writes.
"""

from lerobot_policy_genpolicy import configuration_genpolicy, metaworld_state

__all__ = ["configuration_genpolicy", "metaworld_state"]
