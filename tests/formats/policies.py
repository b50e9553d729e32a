"""Tiny policies of every kind that acts, with every part that a policy can have."""

import math
from collections.abc import Callable
from typing import Any

import torch

from genpolicy.chain.prior import Bounds
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Context
from genpolicy.learning.critic import Critic, Support
from genpolicy.models.mlp import MLP
from genpolicy.models.tokens import Tokens
from genpolicy.policy.parts.base import Base
from genpolicy.policy.parts.best_of import BestOf
from genpolicy.policy.parts.editor import Editor
from genpolicy.policy.parts.learned_start import LearnedStart
from genpolicy.policy.parts.learned_std import LearnedStd
from genpolicy.policy.parts.noise_actor import NoiseActor
from genpolicy.policy.parts.refiner import Refiner
from genpolicy.policy.policy import ChainPolicy, Part
from genpolicy.policy.sampler import make_policy

STATE, PICTURE, CLOUD = "observation.state", "observation.images.top", "observation.points"
ODE, DDPM = {"name": "ddim", "eta": 0.0}, {"name": "ddim", "eta": 1.0}


class Recorded:
    """Statistics and frames of sixty observations far from the unit box."""

    fps = 10

    def __init__(self, *names: str) -> None:
        generator = torch.Generator().manual_seed(1)
        dims = {STATE: (3,), PICTURE: (3, 16, 16), CLOUD: (8, 3), "action": (2,)}
        self.shapes = {name: dims[name] for name in (*names, "action")}
        self.values = {
            name: torch.rand(60, *shape, generator=generator) * (1 if len(shape) == 3 else 40)
            for name, shape in self.shapes.items()
        }
        self.stats = {
            name: {"mean": v.mean(0), "std": v.std(0), "min": v.amin(0), "max": v.amax(0)}
            for name, v in self.values.items()
        }

    def __len__(self) -> int:
        return 60

    def rows(self, index: Any, history: int, actions: range) -> Any:
        seen = {
            name: value[index][:, None].repeat(1, history, *[1] * (value.ndim - 1))
            for name, value in self.values.items()
            if name != "action"
        }
        return Context([""] * len(index), seen), None, None


def mlp(*names: str, **settings: Any) -> MLP:
    model = MLP(**{"hidden": 32, "blocks": 1, **settings})
    model.initialise(Recorded(*(names or (STATE,))))  # type: ignore[arg-type]
    return model


def tokens(**settings: Any) -> Tokens:
    model = Tokens(**{"hidden": 32, "blocks": 1, "bins": 16, **settings})
    model.initialise(Recorded(STATE))  # type: ignore[arg-type]
    return model


def policy(model: Any, parts: dict[str, Part] | None = None, **chain: Any) -> ChainPolicy:
    return make_policy(model, ChainConfig(**chain), parts)


def _features(model: Any) -> int:
    seen = {name: torch.zeros(1, model.history, *shape) for name, shape in model.shapes.items()}
    return model.features(model.encode(Context([""], seen))).shape[1]


def _shaken[T: torch.nn.Module](module: T) -> T:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1)
    return module


def _critic(model: Any) -> BestOf:
    inputs = _features(model) + math.prod(model.event_shape)
    critic = Critic(inputs, members=2, hidden=16, support=Support(-1, 1))
    with torch.no_grad():
        critic.weights[-1].mul_(30)  # samples are worth different amounts
    return BestOf(critic.requires_grad_(False), 0.5)


def _best_of() -> ChainPolicy:
    model = mlp(family="flow")
    return policy(model, {"critic": _critic(model)}, steps=3, kernel=DDPM, best_of=4)


def _refined() -> ChainPolicy:
    model = mlp(family="flow")
    parts = {"critic": _critic(model), "refiner": Refiner(2, 0.1)}
    return policy(model, parts, steps=2, kernel=DDPM, best_of=2)


def _refined_best() -> ChainPolicy:
    model = mlp(family="flow")
    parts = {"critic": _critic(model), "refiner": Refiner(2, 0.1, refined=2)}
    return policy(model, parts, steps=2, kernel=DDPM, best_of=4)


def _edited() -> ChainPolicy:
    model = mlp(family="flow")
    editor = _shaken(Editor(_features(model), math.prod(model.event_shape), 0.2, edited=2))
    parts = {"critic": _critic(model), "editor": editor}
    return policy(model, parts, steps=2, kernel=DDPM, best_of=4)


def _noise_actor() -> ChainPolicy:
    model = mlp(family="flow")
    start = _shaken(NoiseActor(_features(model), model.event_shape, 1.5))
    return policy(model, {"start": start}, steps=2, kernel=ODE)


def _learned_start(band: float | None = None) -> ChainPolicy:
    model = mlp(family="flow")
    start = _shaken(LearnedStart(_features(model), model.event_shape, Bounds(band=band)))
    return policy(model, {"start": start}, steps=2, kernel=ODE)


def _learned_std() -> ChainPolicy:
    model = mlp(family="flow")
    std = _shaken(LearnedStd(_features(model), math.prod(model.event_shape), 0.05, 0.3))
    return policy(model, {"std": std}, steps=3, kernel=DDPM)


def _based() -> ChainPolicy:
    model = mlp(family="flow")
    base = Base.of(model, 0.5)
    base.weights = {
        name: value + torch.randn_like(value) / 9 for name, value in base.weights.items()
    }
    return policy(model, {"base": base}, steps=4, kernel=ODE)


FLOOR = {"name": "floorstd", "floor": 0.1, "kernel": ODE}
POLICIES: dict[str, Callable[[], ChainPolicy]] = {
    "ten steps": lambda: policy(mlp(), steps=10, kernel=ODE),
    "two steps": lambda: policy(mlp(history=2), steps=2, kernel=ODE),
    "one step": lambda: policy(mlp(prediction_type="sample"), steps=1, kernel=ODE),
    "unet": lambda: policy(mlp(network="unet", blocks=2), steps=2, kernel=ODE),
    "gaussian": lambda: policy(mlp(family="gaussian"), steps=1, kernel=FLOOR, window=(0, 1)),
    "tokens": lambda: policy(tokens(), steps=1, kernel=ODE),
    "noisy steps": lambda: policy(mlp(family="flow"), steps=3, kernel=DDPM, window=(0, 2)),
    "pictures": lambda: policy(mlp(STATE, PICTURE, family="flow"), steps=2, kernel=ODE),
    "points": lambda: policy(mlp(STATE, CLOUD, family="flow"), steps=2, kernel=ODE),
    "heun": lambda: policy(mlp(family="flow"), steps=3, kernel={"name": "heun"}),
    "dpmsolver": lambda: policy(mlp(family="flow"), steps=3, kernel={"name": "dpmsolver"}),
    "best of 4": _best_of,
    "refined": _refined,
    "the best two of four refined": _refined_best,
    "edited": _edited,
    "noise actor": _noise_actor,
    "learned start": _learned_start,
    "typical start": lambda: _learned_start(0.1),
    "learned std": _learned_std,
    "base": _based,
}
DRAWS = {
    "gaussian": 2,
    "noisy steps": 3,
    "best of 4": 12,
    "refined": 4,
    "the best two of four refined": 8,
    "edited": 8,
    "learned std": 3,
}
"""Draws of a decision; of those that are not named, one."""
