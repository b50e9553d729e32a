"""Micro-batches: as many rows at once as memory allows, without a change to any global number."""

from collections.abc import Callable

import torch

from genpolicy.config.errors import ConfigError
from genpolicy.policy.policy import ChainPolicy

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


class MicroBatches:
    """Work on rows in slices of ``size`` rows; "auto" takes all, and half as many whenever memory
    runs out.

    ``say`` tells the person.
    """

    def __init__(self, size: int | str, say: Callable[[str], None]) -> None:
        self.auto, self.say = size == "auto", say
        self.size: int | None = None if size == "auto" else int(size)

    def __call__[T](
        self,
        work: Callable[[slice], T],
        rows: int,
        whole: int = 1,
        restart: Callable[[], None] = lambda: None,
    ) -> list[T]:
        """[work(slice), ...] over ``rows``, in slices of multiples of ``whole`` rows (groups that
        share a start).

        When memory runs out the slices are halved, ``restart`` is called and everything begins
        again.
        """
        # this process's share of a minibatch may be nothing: names and graphs are still needed
        if rows == 0:
            return [work(slice(0, 0))]
        while True:
            size = rows if self.size is None else max(self.size // whole, 1) * whole
            try:
                return [
                    work(slice(start, min(start + size, rows))) for start in range(0, rows, size)
                ]
            except RuntimeError as error:
                exhausted = isinstance(error, torch.OutOfMemoryError) or any(
                    text in str(error) for text in OUT_OF_MEMORY
                )
                if not (self.auto and exhausted):
                    raise
                if min(size, rows) <= whole:
                    raise ConfigError(
                        f"out of memory with {whole} rows at a time, the smallest micro-batch:"
                        " lower the group size or the resolution, or set"
                        " policy.gradient_checkpointing and policy.offload"
                    ) from error
                self.size = max(min(size, rows) // 2 // whole, 1) * whole
                self.say(
                    f"out of memory: micro_batch is now {self.size} rows; global sizes are"
                    " unchanged"
                )
                restart()
                torch.cuda.empty_cache()


def recount(policy: ChainPolicy) -> Callable[[], None]:
    """Returns a function to call before work begins again: it forgets the evaluations since now,
    because aborted work does not count.
    """
    counted = policy.model.evaluations

    def restart() -> None:
        policy.model.evaluations = counted

    return restart
