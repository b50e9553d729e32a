"""A student that follows a policy while that learns: the regression of method ``consistency`` (loss
same_noise) after every iteration, with the policy as it stands for its teacher (RL-100, arXiv
2510.14830, distils "online" so).
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.chain import Condition
from genpolicy.chain.values import Parametrisation
from genpolicy.config.errors import ConfigError, at_least, positive
from genpolicy.config.schema import ChainConfig, OptimizerConfig
from genpolicy.methods.parts.distillation import distance, jump, require_teachable
from genpolicy.policy.files import save_policy, saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.weights import Weights
from genpolicy.training.deployment import STAGES
from genpolicy.training.run import Run

SAMPLER = ChainConfig(steps=1, kernel={"name": "consistency"})
"""The sampler of a student: one jump."""
NAME = "student"
"""The folder in stages/ in which it is kept."""


@dataclass
class Following:
    """A student of one step beside the policy. The defaults are ours."""

    updates: int = 0  # of the student per iteration; 0 is no student
    minibatch: int = 256  # rows per update
    lr: float = 3e-4  # learning rate, constant
    # meaning of the student's output; None is the policy's own, which must not be epsilon
    head: Parametrisation | None = "sample"

    def __post_init__(self) -> None:
        at_least("method: student", self, updates=0, minibatch=1)
        positive("method: student", self, "lr")


class Follower:
    """A student with weights and an optimiser of its own, which the run saves and resumes.

    It begins as the policy stands when it first follows, and is kept as stages/student.
    """

    def __init__(self, run: Run, settings: Following) -> None:
        self.run, self.settings = run, settings
        self.section = {**run.experiment.policy}
        if settings.head is not None:
            self.section["prediction_type"] = settings.head
        self.policy: ChainPolicy | None = None
        run.register(student=self)

    def follow(self, condition: Condition, place: Tensor, total: int) -> None:
        """Updates the student at these rows, [R] of the ``total`` of all processes: where the
        deployed policy goes from a noise, it shall jump to.
        """
        run, settings = self.run, self.settings
        student = self.policy or self._begin()
        teacher = run.deployed
        noise = run.noise("student", place)
        with torch.no_grad():
            taught = teacher.sample(condition, noise, keep=(0, 0))
        assert taught.start is not None
        x, target = taught.start, taught.x0
        t = student.chain.grid[:1].expand(len(x))
        scored = student.model.scored
        for update in range(settings.updates):
            order = run.generator("student's minibatch", update)
            drawn = torch.from_numpy(order.integers(total, size=settings.minibatch))
            mine = torch.isin(place, drawn).nonzero().flatten()

            def losses(part: slice, mine: Tensor = mine) -> Tensor:
                rows = mine[part]
                said = jump(student, x[rows], t[rows], condition[rows])
                return distance(scored(said), scored(target[rows]), 0.0)

            with run.counting(student):
                run.descend(losses, len(mine), NAME, self.optimizer)

    def keep(self) -> None:
        """Saves the student, if there is one, as stages/student."""
        if self.policy is not None and self.run.processes.main:
            folder = self.run.folder / STAGES / NAME
            folder.parent.mkdir(parents=True, exist_ok=True)
            save_policy(self.policy, self.section, SAMPLER, folder)
        self.run.processes.wait()

    def _begin(self) -> ChainPolicy:
        """The student, as the policy stands: a network of its own, read with its own head."""
        run = self.run
        bare = replace(run.policy, parts={}, best_of=1)
        with tempfile.TemporaryDirectory() as nowhere:
            save_policy(bare, run.experiment.policy, SAMPLER, Path(nowhere) / NAME)
            # this run's own, whose code is the person's
            found = saved(Path(nowhere) / NAME, trust=True)
            head = {"prediction_type": self.section.get("prediction_type")}
            self.policy = replace(found, policy=found.policy | head).load()
        try:
            require_teachable(self.policy, run.deployed)
        except ConfigError as error:
            raise ConfigError(f"method: student: {error}") from None
        settings = OptimizerConfig(lr=self.settings.lr, weight_decay=0.0)
        self.optimizer = run.new_optimizer(self.policy.model.trainable().values(), settings)
        return self.policy

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the optimiser; nothing before the student has begun."""
        if self.policy is None:
            return {}
        weights = Weights(list(self.policy.model.trainable().values()))
        return {"weights": weights.values, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a student that has begun."""
        if state:
            student = self._begin()
            Weights(list(student.model.trainable().values()), state["weights"]).restore()
            self.optimizer.load_state_dict(state["optimizer"])
