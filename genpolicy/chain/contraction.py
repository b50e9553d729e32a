"""The share of a change of the plan that a warm start leaves, and the levels that follow from it.

For data N(mu, s^2) in each dim the denoiser is known: d x0_hat/dx = alpha s^2 / (alpha^2 s^2 +
sigma^2) = kappa and d eps_hat/dx = (1 - alpha kappa) / sigma, so that a step's mean moves by

    c_k = d mean / dx = x + x0 kappa + eps (1 - alpha kappa) / sigma

in the kernel's coefficients. A plan that is off by d is off by J d after the steps of a list, J
being the product of their c_k. Behind a target that moves by v per decision it stays J / (1 - J) v
behind.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from genpolicy.chain.chain import ODE, Chain
from genpolicy.chain.solver import Solver


def contractions(chain: Chain, spread: float) -> Tensor:
    """c_k of every step of the chain, [K] fp64, for data of std ``spread`` = s given what is seen
    (in event units). A solver stands for the ODE that it solves.
    """
    if isinstance(chain.kernel, Solver):
        chain = replace(chain, kernel=ODE, window=None)
    steps, s = chain.steps, spread
    kappa = steps.alpha_t * s**2 / (steps.alpha_t**2 * s**2 + steps.sigma_t**2)
    eps = (1 - steps.alpha_t * kappa) / steps.sigma_t
    acting = [torch.cat([getattr(c, name) for c in chain.acting]) for name in ("x", "x0", "eps")]
    return acting[0] + acting[1] * kappa + acting[2] * eps


def contraction(chain: Chain, levels: Sequence[int], spread: float) -> float:
    """J, the product of c over ``levels``: level l is step K-1-l of the chain."""
    steps = [chain.K - 1 - level for level in levels]
    return float(contractions(chain, spread)[steps].prod())


def choose_levels(chain: Chain, spread: float, j_max: float = 0.3) -> list[int]:
    """The shortest list n-1, ..., 1, 0 of consecutive levels whose J is at most ``j_max``.

    With J = .3 a plan stays .43 of a decision's movement behind. Raises `ValueError` where no list
    does it.
    """
    products = contractions(chain, spread).flip(0).cumprod(0)
    enough = (products <= j_max).nonzero().flatten()
    if not len(enough):
        raise ValueError(
            f"all {chain.K} levels together contract a plan to {float(products.min()):.2f} of its"
            f" error, which is more than {j_max:g}: this sampler can't follow what is seen from a"
            " warm start"
        )
    return list(range(int(enough[0]), -1, -1))
