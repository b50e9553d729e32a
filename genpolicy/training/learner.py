"""The learner: the weights that a run trains, the method's stages, and the optimiser of each."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.model import Model
from genpolicy.policy.weights import Weights
from genpolicy.training.optimizer import Optimizer
from genpolicy.training.processes import Processes
from genpolicy.training.stages import Stage, Stages


class Learner:
    """The parameters of a model that learn, in stages with an optimiser each.

    parameters: they, in a fixed order. stages: of the method; one until it plans others. optimizer:
    of the stage that the run is in. pace: what learning rates go by, in [0, 1]. It has a
    state_dict.
    """

    def __init__(self, model: Model, settings: OptimizerConfig, processes: Processes) -> None:
        self.parameters = list(model.trainable().values())
        self.processes, self.fp16 = processes, model.precision == "fp16"
        self.pace = 0.0
        self.plan([Stage("whole", None, settings)])

    def plan(self, stages: Sequence[Stage]) -> None:
        """Give the method stages, and begin the first."""
        self.stages = Stages(stages)
        self.begin_stage()

    def begin_stage(self) -> None:
        """Begin the stage that the run is in, with its fresh optimiser."""
        settings = self.stages.now.optimizer
        self.optimizer = self.new_optimizer(self.parameters, settings, self.fp16)

    def begin_iteration(self, progress: float) -> None:
        """Set the pace: the share of the stage that is done, or the ``progress`` of the whole run
        where the stage has no end of its own.
        """
        done = self.stages.progress
        self.pace = progress if done is None else done

    def advance(self, through: bool, leave: Callable[[str], None]) -> None:
        """Count an iteration of the stage; see `Run.advance`."""
        stage = self.stages.now.name
        if not self.stages.advance(through):
            return
        if self.stages.over:
            leave(stage)
        elif self.stages.now.name != stage:
            leave(stage)
            # the averages are what was evaluated and saved
            if self.optimizer.ema is not None:
                Weights(self.parameters, self.optimizer.ema).restore()
            self.begin_stage()

    def new_optimizer(
        self,
        parameters: Iterable[torch.nn.Parameter],
        settings: OptimizerConfig,
        fp16: bool = False,
    ) -> Optimizer:
        """An optimiser whose gradients are summed over all processes."""
        reduce = self.processes.reduce if self.processes.count > 1 else None
        return Optimizer(settings, list(parameters), fp16, reduce)

    @contextmanager
    def using(self, weights: Weights, optimizer: Optimizer) -> Iterator[None]:
        """Learn with other weights and another optimiser."""
        own = self.optimizer
        with weights.using():
            self.optimizer = optimizer
            try:
                yield
            finally:
                self.optimizer = own

    def averaged(self) -> AbstractContextManager[None]:
        """The averaged weights of the stage, if any, in the parameters' place."""
        return self.optimizer.averaged()

    def save_point(self) -> tuple[Weights, Any]:
        """Everything that an update of the policy changes: weights, optimiser, averages."""
        return Weights(self.parameters), copy.deepcopy(self.optimizer.state_dict())

    def rewind(self, point: tuple[Weights, Any]) -> None:
        """Undo every update since a `save_point`."""
        weights, optimizer = point
        weights.restore()
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, the place among the stages, and the optimiser."""
        return {
            "parameters": [p.detach() for p in self.parameters],
            "stages": self.stages.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.stages.load_state_dict(state["stages"])
        if not self.stages.over:
            self.begin_stage()
            self.optimizer.load_state_dict(state["optimizer"])
        Weights(self.parameters, state["parameters"]).restore()
