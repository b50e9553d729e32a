"""Samplers: from a chain section to the chain that acts, and which sampler is deployed."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from genpolicy import chain
from genpolicy.chain import Chain, kernel, solver
from genpolicy.chain.kernel import StdKernel
from genpolicy.chain.warm_start import WarmStart
from genpolicy.config.errors import ConfigError, choice, nearest, shown
from genpolicy.config.leaves import leaf, settings
from genpolicy.config.origin import PERSON, STRANGER, Origin
from genpolicy.config.parse import decode
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.model import Model, TokenModel
from genpolicy.policy.policy import ChainPolicy, Part

ODE = {"name": "ddim", "eta": 0.0}
"""The kernel without noise."""


def kernels() -> dict[str, type[Any]]:
    """The kernels and solvers that genpolicy.chain exports, by name: ddim, sde, cps, consistency,
    heun, dpmsolver, and the wrappers.
    """
    return {
        attribute.lower(): entry
        for attribute, entry in vars(chain).items()
        if isinstance(entry, type) and entry.__module__ in (kernel.__name__, solver.__name__)
    }


def make_kernel(raw: Mapping[str, Any], origin: Origin) -> Any:
    """A kernel or solver of `kernels` by name, or a dotted path where its origin may import it."""
    name = raw.get("name")
    if not isinstance(name, str):
        raise ConfigError("chain: kernel needs a name, for example {name: ddim, eta: 1.0}")
    if ":" in name:
        entry = leaf("kernels", name, origin)
        if not (isinstance(entry, type) and dataclasses.is_dataclass(entry)):
            raise ConfigError(f"kernel {name} is no @dataclass, whose fields would be its settings")
        if not any(callable(getattr(entry, verb, None)) for verb in ("coefficients", "integrate")):
            raise ConfigError(f"{name} is no kernel: it has no coefficients or integrate to call")
        return decode(entry, settings(raw), f"kernel {name}")
    valid = kernels()
    if name not in valid:
        raise ConfigError(f"there is no kernel {shown(name)}{nearest(name, list(valid))}")
    entry, own = valid[name], settings(raw)
    kinds = {f.name: f.type for f in dataclasses.fields(entry)}  # type: ignore[arg-type]
    if "kernel" in kinds and "kernel" not in own:
        raise ConfigError(
            f"kernel {name} goes around another one: name it as its key kernel, for example"
            f" {{name: {name}, kernel: ddim}}"
        )
    given: dict[str, Any] = {}
    if "kernel" in kinds:
        given["kernel"] = _wrapped(name, kinds["kernel"], own.pop("kernel"), origin)
    return decode(entry, own, f"kernel {name}", given)


def _wrapped(name: str, kind: Any, value: Any, origin: Origin) -> Any:
    """The kernel inside of a kernel, by its section or bare name."""
    made = make_kernel(value if isinstance(value, Mapping) else {"name": value}, origin)
    asked = "std" if kind is StdKernel else "coefficients"
    if not callable(getattr(made, asked, None)):
        valid = [
            other for other, entry in kernels().items() if callable(getattr(entry, asked, None))
        ]
        why = "has no std of its own" if asked == "std" else "is no kernel"
        raise ConfigError(
            f"kernel {name} can't go around {type(made).__name__.lower()}, which {why}; valid are"
            f" {', '.join(sorted(valid))}"
        )
    return made


WARM = {"rti": chain.RTI, "sdedit": chain.SDEdit}
"""The warm starts by name."""


def make_warm(raw: Mapping[str, Any]) -> WarmStart:
    """A warm start of `WARM` by its name."""
    name = raw.get("name")
    choice("chain: warm: name", name, list(WARM))
    return decode(WARM[str(name)], settings(raw), f"chain: warm start {name}")


def require_trainable(chain: ChainConfig, origin: Origin) -> None:
    """Raise `ConfigError` for a sampler that acts but can't be trained, or whose kernel is none."""
    make_kernel(chain.kernel, origin)
    deployed = [name for name in ("warm", "execute") if getattr(chain, name) is not None]
    if deployed:
        raise ConfigError(
            f"chain: {deployed[0]} is of a policy that is deployed, and what is trained begins from"
            f" noise and carries out whole chunks: put it into eval.sampler"
        )
    if chain.best_of > 1:
        raise ConfigError(
            f"chain: best_of is {chain.best_of}, and what is picked from several samples has no"
            " likelihood to train on: leave it at 1 (eval.sampler.best_of is for a policy that has"
            " a critic already, and method rl100, which learns one, has offline.best_of)"
        )


def make_policy(
    model: Model,
    sampler: ChainConfig,
    parts: Mapping[str, Part] | None = None,
    *,
    origin: Origin = STRANGER,
) -> ChainPolicy:
    """A model with a sampler and the parts of its policy, attached in their order.

    origin: of the sampler's section; a stranger's has the kernels of genpolicy.chain alone.

    Raises `ConfigError` where sampler, parts and model do not fit together.
    """
    try:
        if sampler.grid == "native":
            grid = model.native_grid(sampler.steps)
        else:
            grid = model.grid(sampler.steps, sampler.start)
        kernel = make_kernel(sampler.kernel, origin)
        built = Chain(model.schedule, grid, kernel, window=sampler.window)
        interval = sampler.guidance_interval or (0.0, float("inf"))
        policy = ChainPolicy(model, built, sampler.guidance, interval, sampler.negative_gradient)
        _require_said(model, built)
        if bool((grid.diff(dim=0) > 0).any()):
            raise ConfigError(
                f"chain: {sampler.steps} steps do not fit below noise time {float(grid.max()):g}"
            )
        for k in built.stochastic:
            std = policy.std(k)
            if not bool(((std >= 0) & std.isfinite()).all()):
                raise ConfigError(
                    f"chain: kernel {shown(sampler.kernel)} has std"
                    f" {float(std[~(std.isfinite() & (std >= 0))][0]):g} at step {k}; it must be"
                    " at least 0 and finite"
                )
        for name, part in (parts or {}).items():
            policy = policy.attach(name, part)
        policy = _replanning(policy, sampler)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"chain: {error}") from None
    if sampler.window_size is not None and not 1 <= sampler.window_size <= len(built.stochastic):
        raise ConfigError(
            f"chain: window_size {sampler.window_size} does not fit into the window of"
            f" {len(built.stochastic)} steps"
        )
    if sampler.best_of > 1 and policy.judge is None:
        raise ConfigError(
            f"best_of is {sampler.best_of}, but the policy has no critic that could pick one sample"
            " of several: leave best_of at 1, or go on from a policy that has one;"
            " method rl100 learns one, evaluates it with method.offline.best_of samples, and saves"
            " it with its policies"
        )
    return replace(policy, best_of=sampler.best_of)


def _require_said(model: Model, chain: Chain) -> None:
    """Raise `ConfigError` where a chain would draw noise behind a policy of tokens, whose only
    chance is the noise that it begins from.
    """
    if isinstance(model, TokenModel) and (chain.window or (0, 0))[1] > 0:
        raise ConfigError(
            "chain: window names steps that draw noise, and a policy of tokens draws all of its"
            " chance before its only step: leave window out"
        )


def _replanning(policy: ChainPolicy, sampler: ChainConfig) -> ChainPolicy:
    """The policy that carries out ``execute`` actions and begins as ``warm`` says."""
    if sampler.execute is None and sampler.warm is None:
        return policy
    if not policy.model.acts:
        raise ConfigError("chain: execute and warm are of policies that act, and this one draws")
    executed = policy.model.executed  # type: ignore[attr-defined]  # it acts
    if sampler.execute is not None and sampler.execute > executed:
        raise ConfigError(
            f"chain: execute is {sampler.execute}; the policy says {executed} actions at a time"
        )
    warm = None if sampler.warm is None else make_warm(sampler.warm)
    if warm is not None and isinstance(policy.model, TokenModel):
        raise ConfigError(
            "chain: warm goes on from a plan that is made noisy again, and a policy of tokens says"
            " every chunk anew: leave warm out"
        )
    if warm is not None:
        warm.require_fit(policy.chain, tuple(policy.model.event_shape), sampler.best_of)
    return replace(policy, execute=sampler.execute, warm=warm)


def deployed_sampler(
    rollout: ChainConfig, overrides: Mapping[str, Any], control: bool = False
) -> ChainConfig:
    """The sampler that is evaluated and saved: the rollout's steps and guidance, unless overridden.

    Pictures are drawn with the ODE, which keeps their diversity; actions (``control``) with the
    mean of the kernel that they were trained with. Where a part of the window is drawn for every
    iteration (``window_size``), training walks along the ODE but for that part, and the mean at all
    steps is a chain that it never walked: actions then are drawn with the ODE too.

    A consistency sampler is deployed as it is: the noise that it puts back is a part of it, and a
    network that was taught at noisy states has never seen others. So is a solver: it draws none.

    The best of several actions is picked from the kernel's own samples, because its means are
    nearly the same for all noise; those of the ODE differ by the noise that they start with.
    """
    name = rollout.kernel.get("name")
    entry = kernels().get(name) if isinstance(name, str) else None
    as_it_is = entry is chain.Consistency or callable(getattr(entry, "integrate", None))
    if as_it_is and "kernel" not in overrides:
        own = dataclasses.asdict(replace(rollout, window_size=None))
        return resampled(own, overrides, "eval: sampler")
    along_ode = not control or rollout.window_size is not None
    if along_ode and not (control and "kernel" in overrides):
        default = replace(rollout, kernel=dict(ODE), window=None, window_size=None)
    else:
        mean = {"name": "mean", "kernel": rollout.kernel}
        default = replace(rollout, kernel=mean, window_size=None)
    sampler = resampled(dataclasses.asdict(default), overrides, "eval: sampler")
    if along_ode or sampler.best_of == 1 or "kernel" in overrides:
        return sampler
    sampler = replace(sampler, kernel=rollout.kernel)
    return sampler if "window" in overrides else without_last_noise(sampler)


def without_idle_window(model: Model, sampler: ChainConfig) -> ChainConfig:
    """The same sampler, naming no window where its kernel draws no noise.

    Such a window changes nothing but where a learned std would draw. A kernel ``mean`` keeps its
    window: its steps outside are the ODE's.
    """
    made = make_policy(model, replace(sampler, best_of=1), origin=PERSON).chain
    idle = not made.noisy and not isinstance(made.kernel, chain.Mean)
    return replace(sampler, window=None) if idle else sampler


def without_last_noise(sampler: ChainConfig) -> ChainConfig:
    """The same sampler, whose kernel does not act at the last step."""
    low, high = sampler.window or (0, sampler.steps)
    return replace(sampler, window=(low, max(min(high, sampler.steps - 1), low)))


def resampled(
    own: Mapping[str, Any], overrides: Mapping[str, Any], where: str = "the sampler"
) -> ChainConfig:
    """A sampler with some keys replaced. Where they change the number of steps and name no window,
    the window goes with it (`_rescaled`). ``where`` begins the sentences on what does not fit.
    """
    merged = decode(ChainConfig, {**own, **overrides}, where)
    before = int(own.get("steps", ChainConfig.steps))
    if "window" in overrides or merged.window is None or merged.steps == before:
        return merged
    return replace(merged, window=_rescaled(merged.window, before, merged.steps))


def _rescaled(window: tuple[int, int], before: int, steps: int) -> tuple[int, int]:
    """The window of a chain of ``before`` steps on one of ``steps`` steps: the same share of it.

    A window to the end, or to the last step but one, stays that; it never begins earlier in the
    chain than it did, where the base of a policy that trains its last steps denoises, and it keeps
    at least a step if it had one. A window that does not lie in its own chain stays as it is.
    """
    low, high = window
    if not 0 <= low < high <= before:
        return window
    left = before - high
    end = steps - left if left <= 1 < steps else round(high * steps / before)
    end = max(end, 1)
    return min(-(-low * steps // before), end - 1), end
