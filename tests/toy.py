"""The toy that the tests train:
a model, rewards with one right answer, and experiments as raw YAML mappings.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.contracts.task import Context
from genpolicy.models.toy import Toy

ToyModel = Toy
"""``policy: {name: "tests.toy:ToyModel"}``, the same as ``policy: toy``."""

PROMPTS = ("bright", "dark", "bright picture", "dark picture")


def brightness(outputs: Tensor, context: Context) -> Tensor:
    """The brightness of a "bright" picture, or the darkness of any other, in [-.5, .5]:
    all white or all black is right.
    """
    sign = torch.tensor([1.0 if "bright" in prompt else -1.0 for prompt in context.prompts]).to(
        outputs
    )
    return sign * (outputs.flatten(1).mean(1) - 0.5)


def brightness_strict(outputs: Tensor, context: Context) -> Tensor:
    """1 where `brightness` is over .05, else 0."""
    return (brightness(outputs, context) > 0.05).float()


def constant(outputs: Tensor, context: Context) -> Tensor:
    """The same for every picture: no advantage, nothing to learn."""
    return torch.ones(len(outputs))


def nan(outputs: Tensor, context: Context) -> Tensor:
    """A reward that no run may learn from."""
    return torch.full((len(outputs),), float("nan"))


def wrong_shape(outputs: Tensor, context: Context) -> Tensor:
    """One number for all rows."""
    return outputs.mean()


def experiment(folder: Path, **sections: Any) -> dict[str, Any]:
    """A raw experiment on the toy: prompt file in ``folder``, output folder/run;
    ``sections`` replace sections.
    """
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{p}\n" for p in PROMPTS))
    raw: dict[str, Any] = {
        "policy": {"name": "tests.toy:ToyModel"},
        "chain": {"steps": 4, "kernel": {"name": "ddim", "eta": 1.0}},
        "task": {"name": "prompts", "prompts": str(prompts)},
        "reward": {"tests.toy:brightness": 1.0, "tests.toy:brightness_strict": 0.0},
        "method": {"name": "flow_grpo", "groups": 4, "group": 4, "clip": 0.2, "advantage": "group"},
        "optimizer": {"lr": 3e-3},
        "budget": {"iterations": 4},
        "eval": {"every": 2, "samples": 16, "select": "reward/brightness"},
        "seed": 0,
        "output": str(folder / "run"),
    }
    return {**raw, **sections}
