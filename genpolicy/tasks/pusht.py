"""PushT (Chi et al., arXiv 2303.04137): push a T onto a target with a disc, in gym_pusht's version.

A step is 1/10 s; an action is where the disc is to go, x and y in [0, 512]. An episode succeeds,
and ends, when more than 95 % of the target is covered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

from genpolicy.config.errors import at_least, choice
from genpolicy.contracts.task import Demonstration
from genpolicy.tasks._demonstrations import record
from genpolicy.tasks._environments import Environments
from genpolicy.tasks._gym import IMAGES, WORLD
from genpolicy.tasks._pusht import Pushing


@dataclass
class PushT:
    """PushT as a `genpolicy.contracts.task.ControlTask`: it shows the disc (x, y) and eight corners
    of the T.
    """

    # "dense" is the covered share of the target over .95, at most 1, each step; "sparse" is 1 for
    # the step that succeeds
    reward: Literal["dense", "sparse"] = "dense"
    limit: int = 300  # environment steps of an episode; gym_pusht's
    workers: int = 0  # processes that simulate; 0 is this one
    pixels: bool = False  # show a picture of 96 x 96 as well (eight times slower)

    def __post_init__(self) -> None:
        choice("task pusht: reward", self.reward, ("dense", "sparse"))
        at_least("task pusht", self, limit=1, workers=0)
        pictures = {IMAGES + "top": (3, 96, 96)} if self.pixels else {}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            "observation.state": (2,),
            WORLD: (16,),
            **pictures,
        }
        self.action_dim = 2
        self.action_low, self.action_high = [0.0] * 2, [512.0] * 2
        self.fps = 10
        self.instruction = "Push the T-shaped block onto the T-shaped target."
        self.has_success = True

    def environments(self, count: int, history: int) -> Environments:
        make = partial(Pushing, self.reward, self.pixels)
        return Environments(make, count, history, self.limit, self.instruction, self.workers)

    def demonstrate(self, seed: int, noise: float) -> Demonstration:
        """Plays a planner's episode, which simulates its pushes first; noise in pixels. It does not
        always succeed.
        """
        from genpolicy.tasks._pusht_planner import Planner  # shapely and scipy are here only

        return record(self._stage, Planner(self._stage.world, seed), seed, self.limit, noise)

    @cached_property
    def _stage(self) -> Pushing:
        return Pushing(self.reward, self.pixels)
