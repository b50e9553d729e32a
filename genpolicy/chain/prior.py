"""The distribution in which a chain starts."""

from dataclasses import dataclass

import torch

from genpolicy.chain.values import Condition, Gaussian


@dataclass(frozen=True)
class StandardNormal:
    """x at the first grid time ~ N(0, scale^2 I), with the chain's `Chain.scale`: from the noisiest
    time 1 on flows and VP, and sqrt(1 + sigma_max^2) on EDM.
    """

    def __call__(
        self, condition: Condition, shape: tuple[int, ...], scale: float, device: torch.device
    ) -> Gaussian:
        mean = torch.zeros((len(condition), *shape), device=device)
        return Gaussian(
            mean, torch.full((len(condition),) + (1,) * len(shape), scale, device=device)
        )
