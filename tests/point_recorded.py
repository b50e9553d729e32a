"""Demonstrations of `point_instructions` in memory, so that what sees and is told learns in seconds."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from genpolicy.contracts.dataset import frames
from genpolicy.contracts.task import Context
from genpolicy.tasks.point_instructions import CAMERA, STATE, PointInstructions


@dataclass
class Recorded:
    """``data: {name: "tests.point_recorded:Recorded"}``: episodes of the task's expert, seeds 0, 1, ..."""

    episodes: int = 12
    noise: float = 0.3
    mistaken: float = 0.0

    def __post_init__(self) -> None:
        task = PointInstructions(mistaken=self.mistaken)
        made = [task.demonstrate(seed, self.noise) for seed in range(self.episodes)]
        self.fps = task.fps
        lengths = torch.tensor([len(d.actions) for d in made])
        self.episode = torch.arange(len(made)).repeat_interleave(lengths)
        self.asked = [task.asked(seed) for seed in self.episode.tolist()]
        self.last = (lengths.cumsum(0) - 1)[self.episode]
        self.first = (lengths.cumsum(0) - lengths)[self.episode]
        self.values = {
            name: torch.cat([d.observation[name] for d in made]) for name in (STATE, CAMERA)
        }
        action = torch.cat([d.actions for d in made])
        reward = torch.cat([d.rewards for d in made])[:, None]
        self.columns = {"action": action, "next.reward": reward}
        shapes = {name: tuple(value.shape[1:]) for name, value in self.values.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {**shapes, "action": (2,)}
        both = {STATE: self.values[STATE], "action": action}
        self.stats = {
            name: {"mean": v.mean(0), "std": v.std(0), "min": v.amin(0), "max": v.amax(0)}
            for name, v in both.items()
        }

    def __len__(self) -> int:
        return len(self.episode)

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        past, wanted, outside = frames(index, self.first[index], self.last[index], history, actions)
        seen = {name: value[past] for name, value in self.values.items()}
        asked = [self.asked[row] for row in index.tolist()]
        return Context(asked, seen), self.columns["action"][wanted], outside
