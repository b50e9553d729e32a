"""Requirements of methods on the chain that is trained: each raises one sentence."""

from genpolicy.config.errors import ConfigError
from genpolicy.policy.parts.base import Base
from genpolicy.training.run import Run


def require_density(run: Run) -> None:
    """Raise unless every step of the window has a density: likelihoods can't train a point."""
    for k in run.window:
        if float(run.policy.std(k)) == 0:
            raise ConfigError(
                f"step {k} of the window is deterministic (std 0) under kernel"
                f" {run.experiment.chain.kernel}: a method that needs likelihoods can't train it;"
                " use ddim with eta > 0, sde or cps, or another window"
            )
    if run.policy.refiner is not None:
        raise ConfigError(
            "the policy's actions are refined by gradient steps and have no likelihood: a method"
            " that needs likelihoods can't train it"
        )
    require_window(run)


def require_window(run: Run) -> None:
    """Raise unless there is a step to train, and the network that learns acts at every one."""
    if not run.window:
        raise ConfigError(
            "the chain has no stochastic step to train: widen chain.window or use a kernel with"
            " noise"
        )
    base = run.policy.parts.get("base")
    first = float(run.policy.chain.grid[run.window.start])
    if isinstance(base, Base) and first > base.above:
        raise ConfigError(
            f"the policy's base denoises above noise time {base.above:.3f}, and chain.window begins"
            f" at {first:.3f}: its frozen steps can't be trained, so begin the window later"
        )
