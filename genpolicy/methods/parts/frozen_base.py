"""The base of a chain whose last steps alone are trained (DPPO's K' < K)."""

from genpolicy.config.errors import ConfigError
from genpolicy.policy.parts.base import Base
from genpolicy.training.run import Run


def freeze_base(run: Run) -> None:
    """Freezes the steps before the window: the policy as it is now takes them for good, as a part
    of the policy that learns. Call it before `Run.iterations`; it does nothing where the window
    begins with the chain.

    Raises `ConfigError` where the policy has a base already that ends at another noise time.
    """
    if not run.window.start:
        return
    above = float(run.policy.chain.grid[run.window.start])
    base = run.policy.parts.get("base")
    if base is None:
        run.attach(base=Base.of(run.policy.model, above))
    elif isinstance(base, Base) and abs(base.above - above) > 1e-9:
        raise ConfigError(
            f"the policy's base denoises above noise time {base.above:.3f}, and chain.window begins"
            f" at {above:.3f}: begin the window there, so that what is frozen stays so"
        )
