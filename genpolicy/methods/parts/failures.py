"""Starts from which a policy failed, to be played again: they are rare, and without that they are
hardly ever met twice.
"""

from collections.abc import Sequence

from torch import Tensor

from genpolicy.training.run import Run


class Failures:
    """Starts from which an episode failed and none has succeeded since; saved and resumed with the
    run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seeds: list[int] = []
        run.register(failures=self)

    def mixed(self, fresh: Sequence[int], share: float) -> list[int]:
        """Returns the reset seeds ``fresh``, the last ``share`` of them replaced by failures as far
        as there are any.
        """
        count = min(round(share * len(fresh)), len(self.seeds))
        drawn = self.run.generator("failures").permutation(len(self.seeds))[:count]
        return [*fresh[: len(fresh) - count], *(self.seeds[number] for number in drawn)]

    def note(self, starts: Sequence[int], success: Tensor | None) -> None:
        """Notes which episodes from ``starts`` succeeded: success [M,N], None where the task does
        not judge.
        """
        if success is None:
            return
        for seed, good in zip(starts, success.mean(1).tolist(), strict=True):
            if seed in self.seeds and good == 1:
                self.seeds.remove(seed)
            elif seed not in self.seeds and good < 1:
                self.seeds.append(seed)

    def state_dict(self) -> dict[str, list[int]]:
        return {"seeds": list(self.seeds)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self.seeds = list(state["seeds"])
