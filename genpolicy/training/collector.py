"""The contract of a collector: an iteration's rollout, by however many processes."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.rollout import Rollout


class Collector(Protocol):
    """Collects the rollouts of one task."""

    def __call__(
        self,
        policy: ChainPolicy,
        iteration: int,
        groups: int,
        members: int,
        *,
        updates: int = 1,
        branch_at: int | None = None,
        keep: bool = False,
        starts: Sequence[int] | None = None,
    ) -> Rollout:
        """Return ``groups`` = M groups of ``members`` = N samples or episodes of an iteration.
        Raises `ConfigError` for what the task does not have, and for counts below 1.

        updates: minibatches that the rollout will be split into, which get whole groups.
        branch_at: the step up to which a group's samples share their chain (prompts only). keep:
        write every episode into the store as it ends, and take those that are there already
        (episodes only). starts: reset seeds of the M groups in the place of the iteration's own
        (episodes only).
        """
        ...

    def example(self) -> Context:
        """Return one row of what the policy is shown."""
        ...

    def contexts(self, iteration: int, place: Tensor, total: int) -> Context:
        """Return the rows ``place`` [B] of the ``total`` that an iteration is shown."""
        ...

    def trim(self, iteration: int) -> None:
        """Forget episodes of iterations before the oldest checkpoint, unless somebody needs them."""
        ...

    def pin(self, iteration: int) -> None:
        """Keep an iteration's episodes for good."""
        ...

    def kept(self, iteration: int) -> Any:
        """Return the episodes that were kept of an iteration; `ConfigError` where none was."""
        ...


def require_counts(**counts: int) -> None:
    """Raise `ConfigError` where a rollout is asked for of no group, no member or no update."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"collect: {name} is {count}; it must be at least 1")
