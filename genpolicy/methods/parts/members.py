"""The members of an ensemble of policies that learn side by side (Uni-O4)."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.model import ControlModel
from genpolicy.learning.acceptance import Comparison
from genpolicy.policy.weights import Weights
from genpolicy.training.run import Run


class Members:
    """n policies of one network; saved and resumed with the run.

    Each has its weights, its optimiser, the weights with which it scored highest (its old policy),
    and that score. The first member begins as the run's own policy, the others with weights of
    their own, or, where the policy is a saved one, alike. settings: of the optimisers, by the
    run's stage.
    """

    def __init__(self, run: Run, count: int, settings: dict[str, OptimizerConfig]) -> None:
        self.run = run
        self.settings = settings
        self.weights = [run.weights(), *(self._drawn(member) for member in range(1, count))]
        self._begin("imitate")
        run.register(members=self)

    def __len__(self) -> int:
        return len(self.weights)

    def _drawn(self, member: int) -> Weights:
        """The weights that a member begins with, drawn by a seed of its own."""
        run = self.run
        model = cast(ControlModel, run.policy.model)
        if model.pretrained is not None:
            return run.weights()
        assert run.data is not None
        model = copy.deepcopy(model)
        with torch.random.fork_rng():
            torch.manual_seed(run.experiment.seed + member)
            model.initialise(cast(Dataset, run.data))
        return Weights(run.trainable, list(model.trainable().values()))

    def _begin(self, stage: str) -> None:
        """Begins a stage: fresh optimisers, and nothing scored yet."""
        self.optimizers = []
        for weights in self.weights:
            with weights.using():
                self.optimizers.append(
                    self.run.new_optimizer(self.run.trainable, self.settings[stage])
                )
        self.old = [self._copy(weights) for weights in self.weights]
        self.score = [-math.inf] * len(self)

    def enter(self, stage: str) -> None:
        """Goes on with fresh optimisers, from the averaged weights where there are any."""
        self.weights = [self._copy(self.settled(member)) for member in range(len(self))]
        self._begin(stage)

    def settled(self, member: int) -> Weights:
        """A member's averaged weights where its optimiser has some, else its weights."""
        averages = self.optimizers[member].ema
        return self.weights[member] if averages is None else Weights(self.run.trainable, averages)

    def _copy(self, weights: Weights) -> Weights:
        return Weights(self.run.trainable, weights.values)

    @contextmanager
    def learning(self, member: int) -> Iterator[None]:
        """Puts a member's weights and optimiser in the run's place: it learns what is learned
        inside.
        """
        with self.run.learning(self.weights[member], self.optimizers[member]):
            yield

    def judge(self, member: int, verdict: Comparison) -> bool:
        """Makes the member as it stands its old policy where it scored higher than that; True
        where it did.
        """
        better = verdict.difference > 0
        if better:
            self.old[member] = self._copy(self.weights[member])
        self.score[member] = verdict.old + max(verdict.difference, 0.0)
        return better

    @property
    def best(self) -> Weights:
        """The old policy that scored highest."""
        return self.old[self.score.index(max(self.score))]

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": [weights.values for weights in self.weights],
            "old": [weights.values for weights in self.old],
            "score": list(self.score),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = self.run.trainable
        self.weights = [Weights(parameters, values) for values in state["weights"]]
        self._begin("imitate" if self.run.stages.now.name == "imitate" else "improve")
        self.old = [Weights(parameters, values) for values in state["old"]]
        self.score = list(state["score"])
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)
