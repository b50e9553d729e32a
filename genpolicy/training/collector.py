"""The contract of a collector: an iteration's rollout, by however many processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from genpolicy.config.errors import at_least
from genpolicy.contracts.model import Model
from genpolicy.contracts.task import Context
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.person import Intervention
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.iteration_metrics import IterationMetrics


@dataclass(frozen=True)
class Request:
    """The request of a method for a rollout; `ConfigError` for counts below 1."""

    groups: int  # M, prompts or start states
    members: int  # N, samples or episodes of each
    updates: int = 1  # minibatches that the rollout will be split into, which get whole groups
    # the step up to which a group's samples share their chain, and from which on steps are kept;
    # None: nothing is shared, and the window is kept (prompts only)
    branch_at: int | None = None
    # True: every episode, or sample of a prompt, is written into the store; episodes as they end,
    # and those that are there already are taken
    keep: bool = False
    # reset seeds of the M groups in the place of the iteration's own (episodes only)
    starts: Sequence[int] | None = None
    # the rule by which a person takes over (episodes only); None: nobody is there
    person: Intervention | None = None

    def __post_init__(self) -> None:
        at_least("collect", self, groups=1, members=1, updates=1)


class Collector(Protocol):
    """Collects the rollouts of one task."""

    def __call__(self, policy: ChainPolicy, iteration: int, request: Request) -> Rollout:
        """Return what is asked for of an iteration. Raises `ConfigError` for what the task does not
        have.
        """
        ...

    def example(self) -> Context:
        """Return one row of what the policy is shown."""
        ...

    def contexts(self, iteration: int, place: Tensor, total: int) -> Context:
        """Return the rows ``place`` [B] of the ``total`` that an iteration is shown."""
        ...

    def trim(self, iteration: int) -> None:
        """Forget episodes of iterations before the oldest checkpoint, but for those pinned."""
        ...

    def pin(self, iteration: int) -> None:
        """Keep an iteration's episodes for good."""
        ...

    def kept(self, iteration: int) -> Any:
        """Return the episodes that were kept of an iteration; `ConfigError` where none was."""
        ...


@contextmanager
def acting(policy: ChainPolicy, learns: Model, metrics: IterationMetrics) -> Iterator[None]:
    """Count the network evaluations of a policy that acts while the block runs, where its model is
    another than the one that learns, whose own are counted anyhow.
    """
    counted = policy.model.evaluations
    yield
    if policy.model is not learns:
        metrics.evaluations += policy.model.evaluations - counted
