"""Python files that leave a mark when they are run: what a stranger's file must not reach."""

from pathlib import Path
from uuid import uuid4

CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
import gymnasium, torch
from genpolicy.chain.kernel import DDIM
from genpolicy.models.toy import Toy
from diffusers import AutoencoderKL, ModelMixin, StableDiffusionPipeline

def brightness(outputs, context):
    return outputs.flatten(1).mean(1)

def touch(path):
    pathlib.Path(path).touch()

gymnasium.register("Marked-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=5)
gymnasium.register("{name}/Marked-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=5)
"""


class Marked:
    """A module of its own name in ``folder``, and whether it was run since the last time it was asked."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.name = f"marked_{uuid4().hex}"
        self.file = folder / f"{self.name}.py"
        self._mark = folder / f"{self.name}.ran"
        self.file.write_text(CODE.format(mark=str(self._mark), name=self.name) + more)

    def ran(self) -> bool:
        there = self._mark.exists()
        self._mark.unlink(missing_ok=True)
        return there
