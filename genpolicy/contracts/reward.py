"""Rewards: any callable (outputs, context) -> Float[B]; a plain function is a Reward. Sums keep
their parts by name.
"""

import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError
from genpolicy.config.outside import outside
from genpolicy.contracts.task import Context

Reward = Callable[[Tensor, Context], Tensor]
"""(outputs, context of B rows) -> Float[B], larger is better. It is called without gradients."""


class RewardError(ValueError):
    """A reward that can't be learned from: NaN, infinite, of the wrong shape, or no numbers."""


def require_arguments(name: str, reward: Reward) -> None:
    """Raises `ConfigError` where a reward can't be called with (outputs, context)."""
    try:
        taken = inspect.signature(reward)
    except (TypeError, ValueError):  # some that are written in C do not say what they take
        return
    try:
        taken.bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"{name} is no reward: it is called with (outputs, context), and takes {taken}: {error}"
        ) from None


def judged(name: str, reward: Reward, outputs: Tensor, context: Context) -> Tensor:
    """The scores of a reward, Float64 of the shape that it returned, on the CPU.

    It judges copies of the outputs and of the list of prompts, without gradients. Raises
    `RewardError`, with the place in its code, where it raises `ValueError`, and where what it
    returns is no tensor of numbers.
    """
    try:
        with torch.no_grad():
            shown = replace(context, prompts=list(context.prompts))
            returned = reward(outputs.clone(), shown)
    except ValueError as error:  # a caption that it can't read, a picture of the wrong shape
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise RewardError(f"reward {name} can't judge these outputs: {error} ({where})") from error
    try:
        return torch.as_tensor(returned).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise RewardError(
            f"reward {name} returned {_described(returned)}; it must return one number for each"
            f" output, a Float[{len(context)}]"
        ) from None


def _described(value: object) -> str:
    """The type of what a reward returned, in words."""
    if isinstance(value, tuple | list):
        kinds = ", ".join(dict.fromkeys(type(item).__name__ for item in value))
        return f"a {type(value).__name__} of {kinds}"
    return "None" if value is None else f"a {type(value).__name__}"


@dataclass(frozen=True)
class WeightedRewards:
    """Named rewards and their weights. The parts are kept; ``total`` is their weighted sum.

    patience: seconds that a reward may take for the rows it is given; None is no limit.
    """

    rewards: Mapping[str, tuple[Reward, float]]
    patience: float | None = None

    def parts(self, outputs: Tensor, context: Context) -> dict[str, Tensor]:
        """name -> Float64[B] on the CPU; every reward judges the outputs as they are, whatever
        another one writes into its copy. Raises `RewardError`, naming the reward and the row, on
        NaN or infinity, where what it returns is not one number per output, and where the reward
        hangs or ends the program.
        """
        parts = {}
        for name, (reward, _) in self.rewards.items():
            with outside(f"reward {name}", self.patience, RewardError):
                value = judged(name, reward, outputs, context)
            if value.shape != (len(context),):
                raise RewardError(
                    f"reward {name} returned shape {tuple(value.shape)} for {len(context)} outputs,"
                    f" not ({len(context)},)"
                )
            if not bool(value.isfinite().all()):
                row = int((~value.isfinite()).nonzero()[0])
                raise RewardError(
                    f"reward {name} is {float(value[row])} for {context.prompts[row]!r};"
                    " rewards must be finite"
                )
            parts[name] = value
        return parts

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward."""
        return {name: weight for name, (_, weight) in self.rewards.items()}

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the parts, Float64[B]. Raises `RewardError` where finite parts have
        none that is finite.
        """
        weighted = torch.stack([weight * parts[name] for name, weight in self.weights.items()])
        total = weighted.sum(0)
        wrong = ~total.isfinite()
        if bool(wrong.any()):
            terms = zip(self.weights.items(), weighted[:, wrong][:, 0].tolist(), strict=True)
            said = ", ".join(
                f"{name} {value:g} (weight {weight:g})" for (name, weight), value in terms
            )
            raise RewardError(
                f"the weighted sum of the rewards is {float(total[wrong][0])}: {said}; it must be"
                " finite"
            )
        return total
