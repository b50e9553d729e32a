"""The policies that another library can hold: one network, and steps that the library takes too."""

from dataclasses import fields, replace

from genpolicy.chain import Chain
from genpolicy.chain.kernel import Kernel
from genpolicy.chain.solver import Solver
from genpolicy.config.errors import ConfigError
from genpolicy.policy.policy import ChainPolicy

EQUAL = 1e-9
"""Coefficients of a step that differ by less are the same: they are computed in fp64."""


def require_network_alone(policy: ChainPolicy, holder: str) -> None:
    """Raises `ConfigError` where a part of the policy acts beside its network, which ``holder``,
    as a sentence names it, has no place for. A critic that picks nothing, and a std of a sampler
    without noise, do not act.
    """
    for name, part in policy.parts.items():
        picks_nothing = policy.best_of == 1 and policy.refiner is None
        idle = {"best_of": picks_nothing, "learned_std": policy.noise is None}
        if not idle.get(part.kind, False):
            raise ConfigError(
                f"{holder} can't carry the policy's part {name!r} ({part.kind}), which acts beside"
                " its network"
            )


def takes_steps_of(chain: Chain, kernel: Kernel, within: float = EQUAL) -> bool:
    """True where every step of a chain is the one that ``kernel`` takes at all but the last, which
    it takes at its mean: the four coefficients of each differ by at most ``within``.
    """
    if isinstance(chain.kernel, Solver):
        return False
    other = replace(chain, kernel=kernel, window=None)
    return all(
        bool((getattr(one, field.name) - getattr(two, field.name)).abs().max() <= within)
        for one, two in zip(chain.acting, other.acting, strict=True)
        for field in fields(one)
    )
