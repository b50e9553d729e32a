"""Imported by LeRobot's commands; registers --env.type=metaworld_state."""

from lerobot_policy_genpolicy import metaworld_state

__all__ = ["metaworld_state"]
