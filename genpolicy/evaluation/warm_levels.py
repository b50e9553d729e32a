"""Warm starts of which nobody said how far back they go: the levels that follow from the policy."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genpolicy.chain import DDIM, Noise
from genpolicy.chain.contraction import choose_levels
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import STRANGER, Origin
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Context, Environments
from genpolicy.evaluation.prompt_scores import EVALUATION
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from genpolicy.rollout.episodes import play, reset_seed

J_MAX = 0.3
"""The share of a plan's error that a decision may leave: .43 of a decision's movement behind."""
EPISODES, OBSERVATIONS, DRAWS = 4, 64, 16
"""Episodes that are looked at, observations of them, and samples N for each."""
LEAST: dict[str, dict[str, Any]] = {"rti": {"levels": [0]}, "sdedit": {"steps": 0}}
"""The settings of a warm start that `settled` chooses, at their least."""


@dataclass(frozen=True)
class Contraction:
    """The contraction of a policy's warm start by the rule for Gaussian data."""

    spread: float  # s, the std of the policy's samples given what is seen, event units
    J: float  # the share of a plan's error that a decision leaves

    def described(self, sampler: ChainConfig) -> str:
        """The warm start, its levels and what they do, in one line."""
        warm = dict(sampler.warm or {})
        name, steps = warm.pop("name"), sampler.steps
        said = ", ".join(f"{key} {value}" for key, value in warm.items())
        # a plan that is not denoised at all never follows
        behind = f"{self.J / (1 - self.J):.2f}" if self.J < 1 else "ever more"
        return (
            f"{name} on a grid of {steps} steps: {said}; J {self.J:.3f} from s {self.spread:.3f}:"
            f" {behind} decisions behind what moves"
        )


@torch.no_grad()
def samples(policy: ChainPolicy, environments: Environments, seed: int) -> Tensor:
    """N samples [O,N,*E] of the policy's ODE, which keeps their distribution, for each of O
    observations that it meets in a few episodes (whose starts are hashes of ``seed``).
    """
    chain = replace(policy.chain, kernel=DDIM(0.0), window=(0, 0))
    bare = {"best_of": 1, "refiner": None, "noise": None, "warm": None, "execute": None}
    ode = replace(policy, chain=chain, **bare)
    numbers = torch.arange(EPISODES)
    seeds = [reset_seed(seed, EVALUATION, number) for number in numbers.tolist()]
    names = Noise.rows(seed, EVALUATION, numbers, 1)
    met = Context.cat([d.context for d in play(ode, environments, seeds, names, keep=(0, 0))])
    chosen = torch.linspace(0, len(met) - 1, min(OBSERVATIONS, len(met))).long()
    every = chosen.repeat_interleave(DRAWS)
    condition = ode.model.encode(met[every])
    noise = Noise.rows(seed, EVALUATION, EPISODES + torch.arange(len(chosen)), DRAWS)
    return ode.sample(condition, noise, keep=(0, 0)).x0.unflatten(0, (len(chosen), DRAWS))


def spread(drawn: Tensor, discrete_dims: list[int] | None = None) -> float:
    """s: the root of the mean variance of samples [O,N,T,D] of one observation, over O, T and the
    columns D that are not discrete.
    """
    dims = [dim for dim in range(drawn.shape[-1]) if dim not in (discrete_dims or ())]
    if not dims:
        raise ConfigError(
            "chain.warm: every dim of the action is discrete, and no plan contracts there: leave at"
            " least one out of discrete_dims"
        )
    return float(drawn[..., dims].double().var(1).mean().sqrt())


def with_fewest_levels(sampler: ChainConfig) -> ChainConfig:
    """The same sampler; a warm start that names no levels (or steps) has the fewest."""
    if sampler.warm is None:
        return sampler
    named = {key: value for key, value in sampler.warm.items() if value is not None}
    return replace(sampler, warm={**LEAST.get(str(named.get("name")), {}), **named})


def settled(
    sampler: ChainConfig, policy: ChainPolicy, drawn: Tensor, origin: Origin = STRANGER
) -> tuple[ChainConfig, Contraction]:
    """A sampler with a warm start, its levels (or steps) chosen where it names none, and what they
    do. policy: any of the same model and parts. drawn: its `samples`. origin: of the sampler.

    Raises `ConfigError` where no levels do.
    """
    warm = dict(sampler.warm or {})
    s = spread(drawn, warm.get("discrete_dims"))
    (key,) = LEAST[warm["name"]]
    if warm.get(key) is None:
        cold = make_policy(policy.model, replace(sampler, warm=None), policy.parts, origin=origin)
        try:
            levels = choose_levels(cold.chain, s, J_MAX)
        except ValueError as error:
            raise ConfigError(f"warm start {warm['name']}: {error}") from None
        warm[key] = levels if key == "levels" else len(levels)
        sampler = replace(sampler, warm=warm)
    made = make_policy(policy.model, sampler, policy.parts, origin=origin)
    assert made.warm is not None
    return sampler, Contraction(s, made.warm.contraction(made.chain, s))
