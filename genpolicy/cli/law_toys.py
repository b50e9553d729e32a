"""The toys that `genpolicy check` trains a method on: pictures and robots, in seconds."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from genpolicy.cli.reward_laws import PROMPTS, law_pictures
from genpolicy.config import leaves
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.dataset import frames
from genpolicy.contracts.task import Context
from genpolicy.policy.files import save_policy
from genpolicy.policy.sampler import make_policy
from genpolicy.training.requirements import Needs, World

# Methods

STATE = "observation.state"
"""The observation that the toy robots act on: the point's place."""


ITERATIONS = 6
"""Iterations of a run: the shipped methods of several stages reach their last one in so many."""


SMALL = {
    "groups": 4,
    "group": 4,
    "size": 2,
    "episodes": 16,
    "updates": 1,
    "epochs": 1,
    "warm_up": 0,
    "first": 4,
    "every": 2,
    "samples": 3,
    "best": 2,
    "edited": 2,
    "minibatch": 2**20,
    "batch": 16,
    "iterations": 1,
    "members": 2,
    "candidates": 1,
    "sweeps": 1,
    "states": 16,
    "starts": 4,
    "horizon": 2,
    "best_of": 2,
    "critic_updates": 2,
    "critic_epochs": 1,
    "model_updates": 2,
}
"""The values that whole numbers of these names take, in a method's settings and in the settings of
its stages: little to do, and one update per rollout.
"""


ODE = {"name": "ddim", "eta": 0.0}


LONG, SHORT = 100, 1
"""Environment steps in which even a new policy reaches a goal, and in which none can."""


def constant(outputs: Tensor, context: Context) -> Tensor:
    """A reward that is the same for every output: there is nothing to learn."""
    return torch.ones(len(outputs))


def brightness(outputs: Tensor, context: Context) -> Tensor:
    """A reward that teaches something."""
    return outputs.flatten(1).mean(1)


@dataclass
class Walks:
    """Recorded episodes of the toy robots' expert in memory, as a
    `genpolicy.contracts.dataset.Dataset`: their places, actions, rewards and successes.
    """

    episodes: int = 8  # reset seeds 0, 1, ...

    def __post_init__(self) -> None:
        task = leaves.make("tasks", robots_task(LONG), PERSON)
        self.fps = task.fps
        self._instruction: str = task.instruction
        made = [task.demonstrate(seed, 0.1) for seed in range(self.episodes)]
        lengths = torch.tensor([len(one.actions) for one in made])
        self.episode = torch.arange(len(made)).repeat_interleave(lengths)
        self._last = (lengths.cumsum(0) - 1)[self.episode]
        self._first = self._last + 1 - lengths[self.episode]
        place = torch.cat([one.observation[STATE] for one in made])
        actions = torch.cat([one.actions for one in made])
        ends = torch.arange(len(self.episode)) == self._last
        succeeded = torch.tensor([one.success for one in made])[self.episode]
        self.columns: Mapping[str, Tensor] = {
            STATE: place,
            "action": actions,
            "next.reward": torch.cat([one.rewards for one in made])[:, None],
            "next.success": (ends & succeeded).float()[:, None],
        }
        seen = {STATE: place, "action": actions}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(value.shape[1:]) for name, value in seen.items()
        }
        self.stats: Mapping[str, Mapping[str, Tensor]] = {
            name: _statistics(value) for name, value in seen.items()
        }

    def __len__(self) -> int:
        return len(self.episode)

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        """See `genpolicy.contracts.dataset.Dataset`."""
        first, last = self._first[index], self._last[index]
        past, asked, outside = frames(index, first, last, history, actions)
        context = Context([self._instruction] * len(index), {STATE: self.columns[STATE][past]})
        return context, self.columns["action"][asked], outside


def _statistics(value: Tensor) -> dict[str, Tensor]:
    return {
        "min": value.amin(0),
        "max": value.amax(0),
        "mean": value.mean(0),
        "std": value.std(0),
        "q01": value.quantile(0.01, 0),
        "q99": value.quantile(0.99, 0),
    }


def robots_task(limit: int) -> dict[str, Any]:
    """A point among goals in all four quarters: whichever way it goes it reaches one, and one of
    four is rewarded.
    """
    return {"name": "point_instructions", "goals": 4, "limit": limit}


@dataclass(frozen=True)
class Toy:
    """Sections of an experiment on small inputs.

    sections: all but method, budget and output. idle: what replaces some where there is nothing to
    learn from rewards.
    """

    sections: Mapping[str, Any]
    idle: Mapping[str, Any]


def small(settings: Any) -> dict[str, Any]:
    """The settings of a dataclass, and of those in it, that `SMALL` names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            if own := small(
                value
            ):  # a section of its own may ask for what it is the default to lack
                found[field.name] = own
        elif field.name in SMALL and type(value) is int and value:  # 0 leaves a thing out
            found[field.name] = SMALL[field.name]
    return found


def toys(needs: Needs, world: World, folder: Path) -> list[Toy]:
    """The toys of a world that give the method what it needs; a method may refuse some."""
    chain: dict[str, Any] = {"steps": 4}
    if needs.window and not needs.likelihoods:  # it brings its own noise
        chain |= {"kernel": ODE, "window": [0, 4]}
    if world == "prompts":
        return _picture_toys(needs, chain, folder)
    common = {
        "chain": chain,
        "task": robots_task(LONG),
        "data": {"name": "genpolicy.cli.law_toys:Walks"},
        "environments": 16,
    }
    network = {"name": "mlp", "hidden": 16, "blocks": 1, "chunk": 4, "inputs": [STATE]}
    gaussian = {"steps": 1, "window": [0, 1]}
    gaussian["kernel"] = {"name": "floorstd", "floor": 0.1, "kernel": ODE}
    still = {"steps": 4, "kernel": ODE}
    idle = {"task": robots_task(SHORT)}
    if needs.teacher:
        return [
            Toy({**common, **taught({**network, "family": family}, folder, Walks())}, idle)
            for family in ("flow", "vp")
        ]
    return [
        Toy({**common, "policy": {**network, "family": "flow"}}, idle),
        Toy({**common, "policy": {**network, "family": "vp"}}, idle),
        Toy({**common, "policy": {**network, "family": "gaussian"}, "chain": gaussian}, idle),
        Toy({**common, "policy": {**network, "family": "flow"}, "chain": still}, idle),
    ]


def _picture_toys(needs: Needs, chain: dict[str, Any], folder: Path) -> list[Toy]:
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    common: dict[str, Any] = {
        "chain": chain,
        "task": {"name": "prompts", "prompts": str(prompts)},
        "reward": {"genpolicy.cli.law_toys:brightness": 1.0},
    }
    if needs.data:
        common["data"] = _captioned(folder / "pictures")
    idle = {"reward": {"genpolicy.cli.law_toys:constant": 1.0}}
    if needs.teacher:
        return [
            Toy({**common, **taught({"name": "toy", "family": family}, folder)}, idle)
            for family in ("flow", "vp")
        ]
    return [
        Toy({**common, "policy": {"name": "toy", "family": family}}, idle)
        for family in ("flow", "vp")
    ]


def taught(section: dict[str, Any], folder: Path, data: Any = None) -> dict[str, Any]:
    """The policy and chain of a student of two steps, whose teacher is a new policy of four steps
    that draws no noise. data: gives the teacher its shapes where it acts.
    """
    model = leaves.make("models", section, PERSON)
    if model.acts:
        model.initialise(data)
    sampler = ChainConfig(steps=4, kernel=ODE)
    teacher = folder / f"teacher-{section['family']}"
    save_policy(make_policy(model, sampler, origin=PERSON), section, sampler, teacher)
    head = "velocity" if section["family"] == "flow" else "sample"
    return {
        "policy": {**section, "teacher": str(teacher), "prediction_type": head},
        "chain": {"steps": 2, "kernel": {"name": "consistency"}},
    }


def _captioned(folder: Path) -> dict[str, Any]:
    """The data section of a new folder of pictures, a prompt each."""
    folder.mkdir()
    lines = []
    for number, (prompt, picture) in enumerate(zip(PROMPTS, law_pictures(), strict=True)):
        pixels = (picture.movedim(0, -1) * 255).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"name": "captioned_pictures", "root": str(folder), "height": 8, "width": 8}
