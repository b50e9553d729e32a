"""Other samplers of a policy that acts, by name: its score depends on them as much as on its
weights.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from genpolicy.config import parse
from genpolicy.config.errors import ConfigError, choice
from genpolicy.config.origin import Origin
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Environments
from genpolicy.evaluation.warm_levels import Contraction, samples, settled, with_fewest_levels
from genpolicy.policy.files import Saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.pretrained import native_sampler
from genpolicy.policy.sampler import make_policy, resampled, without_last_noise

DEPLOYED = "deployed"
PRESETS = {
    DEPLOYED: "what the policy was saved with",
    "ode": "no noise after the first",
    "mean": "the mean of the kernel that it was trained with",
    "stochastic": "the kernel that it was trained with, in its whole window",
    "last_mean": "the same, its last step without noise",
    "best_of_16": "of 16 samples of last_mean, or any other number, "
    "the one that the policy's critic picks",
    "native": "LeRobot's own, of a LeRobot policy",
    "rti": "real-time iteration: one action per decision, each from the plan before it, called a "
    "noisy one, through DDPM's steps at levels that the measured spread asks for",
    "rti_mean": "the same without noise",
    "sdedit": "the same from the plan before with noise, through the deployed sampler's last steps",
}
"""The samplers' names, and what each is in words."""
WARM_STARTS = {"rti": "rti", "rti_mean": "rti", "sdedit": "sdedit"}
"""The presets with a warm start, and its name."""
DDPM = {"name": "ddim", "eta": 1.0}
"""The kernel of real-time iteration, as published."""
BEST_OF = re.compile(r"best_of_([1-9]\d*)")


@dataclass(frozen=True)
class Variant:
    """A sampler by the name that it was asked for."""

    name: str
    sampler: ChainConfig
    origin: Origin  # of the sampler's section
    contraction: Contraction | None = None  # of its warm start, once its levels are known

    def of(self, policy: ChainPolicy) -> ChainPolicy:
        """The policy with this sampler: the same model and the same parts."""
        return make_policy(policy.model, self.sampler, policy.parts, origin=self.origin)

    def require_fit(self, policy: ChainPolicy) -> None:
        """Raise `ConfigError` where the policy can't have this sampler, whatever its levels."""
        sampler = with_fewest_levels(self.sampler)
        make_policy(policy.model, sampler, policy.parts, origin=self.origin)

    def settled(self, policy: ChainPolicy, drawn: Tensor) -> "Variant":
        """The same with the levels of its warm start and their contraction (see `settled`)."""
        sampler, contraction = settled(self.sampler, policy, drawn, self.origin)
        return replace(self, sampler=sampler, contraction=contraction)

    def description(self) -> dict[str, Any]:
        """The sampler's entry in eval.json."""
        return asdict(self.sampler)


def variants(asked: Sequence[str], found: Saved) -> list[Variant]:
    """The deployed sampler, and the ones that are asked for, each once: names of `PRESETS`, of
    which only best_of_N draws several samples, or K=V of `ChainConfig`: the deployed one but for
    this key. (best_of=N of a deployed mean is N times the work for nearly the same action: what the
    mean leaves of the noise is hardly a choice.)
    """
    return [_variant(name, found) for name in dict.fromkeys([DEPLOYED, *asked])]


def with_levels(
    asked: Sequence[Variant], policy: ChainPolicy, environments: Environments, seed: int
) -> list[Variant]:
    """The same samplers; those with a warm start have its levels, chosen where they name none, and
    its contraction, for the spread of the policy's samples in a few episodes.
    """
    if all(variant.sampler.warm is None for variant in asked):
        return list(asked)
    drawn = samples(policy, environments, seed)
    return [
        variant if variant.sampler.warm is None else variant.settled(policy, drawn)
        for variant in asked
    ]


def _variant(name: str, found: Saved) -> Variant:
    if "=" in name:
        asked: dict[str, Any] = {}
        parse.override(asked, f"--{name}")
        own = asdict(found.sampler)
        return Variant(name, resampled(own, asked), found.origin.naming(asked))
    return Variant(name, _preset(name, found), found.origin)


def _preset(name: str, found: Saved) -> ChainConfig:
    """The sampler of one of `PRESETS`."""
    deployed = replace(found.sampler, warm=None)
    several = BEST_OF.fullmatch(name)
    if several:
        # .975 on 200 episodes of peg-insert-side; with noise in the last step too .96, the ODE .91
        return replace(_preset("last_mean", found), best_of=int(several[1]))
    choice("--samplers: a sampler", name, list(PRESETS))
    if name == DEPLOYED:
        return found.sampler
    if name in WARM_STARTS:
        warm = replace(deployed, execute=1, warm={"name": WARM_STARTS[name]}, best_of=1)
        if name == "sdedit":
            return warm
        kernel = dict(DDPM) if name == "rti" else {"name": "mean", "kernel": dict(DDPM)}
        return replace(warm, kernel=kernel, window=None, window_size=None)
    if name == "ode":
        ode = {"name": "ddim", "eta": 0.0}
        # no step is inside the window, so that a learned std acts nowhere either
        return replace(deployed, kernel=ode, window=(0, 0), window_size=None, best_of=1)
    if name == "native":
        own = native_sampler(str(found.policy.get("pretrained")))
        if own is None:
            raise ConfigError(
                "--samplers: native is LeRobot's own sampler, "
                f"and {found.where} is no LeRobot policy"
            )
        return resampled(own, {"grid": "native"})
    stochastic = replace(
        resampled(asdict(_trained(name, found)), {"steps": deployed.steps}), window_size=None
    )
    if name == "mean":
        return replace(stochastic, kernel={"name": "mean", "kernel": stochastic.kernel})
    return without_last_noise(stochastic) if name == "last_mean" else stochastic


def _trained(name: str, found: Saved) -> ChainConfig:
    """The sampler that the policy was trained with: its run's, or the one whose mean is saved."""
    if found.run is not None:
        return replace(parse.load(found.run / "config.yaml").chain, execute=found.sampler.execute)
    if found.sampler.kernel["name"] == "mean":
        return replace(found.sampler, kernel=found.sampler.kernel["kernel"], best_of=1, warm=None)
    raise ConfigError(
        f"--samplers: {name} needs the kernel that the policy was trained with, "
        f"which {found.where} does not say; name a run's folder, or give it as kernel.name=..."
    )
