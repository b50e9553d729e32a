"""Rewards: any callable (outputs, context) -> Float[B]; a plain function is a Reward. Sums keep
their parts by name.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genpolicy.config.outside import outside
from genpolicy.contracts.task import Context

Reward = Callable[[Tensor, Context], Tensor]
"""(outputs, context of B rows) -> Float[B], larger is better."""


class RewardError(ValueError):
    """A reward that can't be learned from: NaN, infinite, or of the wrong shape."""


@dataclass(frozen=True)
class WeightedRewards:
    """Named rewards and their weights. The parts are kept; ``total`` is their weighted sum.

    patience: seconds that a reward may take for the rows it is given; None is no limit.
    """

    rewards: Mapping[str, tuple[Reward, float]]
    patience: float | None = None

    def parts(self, outputs: Tensor, context: Context) -> dict[str, Tensor]:
        """name -> Float64[B] on the CPU. Raises `RewardError`, naming the reward and the row, on
        NaN or infinity, and where the reward hangs or ends the program.
        """
        parts = {}
        for name, (reward, _) in self.rewards.items():
            try:
                with outside(f"reward {name}", self.patience, RewardError):
                    value = torch.as_tensor(reward(outputs, context)).detach().double().cpu()
            except RewardError:
                raise
            except ValueError as error:  # a caption that it can't read, a picture's wrong shape
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(place.filename).name}:{place.lineno}"
                raise RewardError(
                    f"reward {name} can't judge these outputs: {error} ({where})"
                ) from error
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
