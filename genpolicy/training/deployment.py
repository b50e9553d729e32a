"""The deployed policy of a run: evaluated, tried in real episodes, kept at milestones, saved."""

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import ChainConfig, Experiment
from genpolicy.evaluation import metrics_file
from genpolicy.policy.files import save_policy
from genpolicy.policy.policy import ChainPolicy, Part
from genpolicy.policy.sampler import (
    deployed_sampler,
    make_policy,
    without_idle_window,
)
from genpolicy.training.evaluator import Evaluator
from genpolicy.training.workspace import Workspace

STAGES = "stages"
"""In a run's folder: the policies of its milestones."""
KEPT = ("before", "last", "best", "evaluated_at")
"""The metrics that a checkpoint keeps, and when they were taken."""


class Deployment:
    """The run's network with the sampler of ``eval.sampler`` and the parts of the policy.

    averaged: puts the averaged weights, if any, in the parameters' place; they are what is
    evaluated and saved. before, last, best: metrics of the first and the latest evaluation, and the
    best value of ``eval.select``. It has a state_dict.
    """

    def __init__(
        self,
        experiment: Experiment,
        policy: ChainPolicy,
        evaluator: Evaluator,
        workspace: Workspace,
        averaged: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.experiment, self.evaluator, self.folder = experiment, evaluator, workspace.folder
        self.processes, self.micro_batches = workspace.processes, workspace.micro_batches
        self.averaged, self.say = averaged, workspace.display.say
        overrides = experiment.eval.sampler
        sampler = deployed_sampler(experiment.chain, overrides, evaluator.of_actions)
        if "kernel" in overrides and "window" not in overrides:
            # the window was that of another kernel: a deterministic one stays deterministic
            sampler = without_idle_window(policy.model, sampler)
        self.sampler = sampler
        # the experiment is the person's
        self.policy = make_policy(policy.model, self.sampler, policy.parts, origin=PERSON)
        self.before: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.best = -math.inf
        self.evaluated_at = -1

    def attach(self, name: str, part: Part) -> None:
        """Give the deployed policy a part."""
        self.policy = self.policy.attach(name, part)

    def choose_among(self, samples: int) -> None:
        """Let the deployed policy draw so many samples per decision, by the sampler that
        `deployed_sampler` picks from, for its critic to pick one.
        """
        overrides = {**self.experiment.eval.sampler, "best_of": samples}
        self.sampler = deployed_sampler(self.experiment.chain, overrides, control=True)
        model, parts = self.policy.model, self.policy.parts
        self.policy = make_policy(model, self.sampler, parts, origin=PERSON)

    def evaluate(self, iteration: int) -> dict[str, Any]:
        """Return the policy's metrics on the fixed evaluation set, and keep the best policy."""
        metrics = self.examine(self.policy, iteration)
        if self.processes.main:
            self._record("eval", iteration, metrics)
            # of equals the one that has learned longer
            selected = metrics[self.experiment.eval.select or self.evaluator.measured[0]]
            if iteration and selected >= self.best:
                self.best = selected
                self.save(self.folder / "policy_best")
            self._tell(f"evaluation after {iteration} iterations", metrics)
        self.last, self.evaluated_at = metrics, iteration
        return metrics

    def examine(self, policy: ChainPolicy, iteration: int) -> dict[str, Any]:
        """Return a policy's metrics with the averaged weights; the cost does not count."""
        counted = policy.model.evaluations
        with self.averaged():
            folder = self.folder / "samples" / str(iteration)
            metrics = self.evaluator(policy, self.processes, self.micro_batches, folder)
        policy.model.evaluations = counted
        return metrics

    def milestone(self, name: str, iteration: int, best_of: int = 1) -> None:
        """Evaluate the policy as it stands, log NAME/metric, and keep it as stages/NAME.

        best_of: with more than 1 sample, instead of the deployed sampler the best of so many
        samples of the one that `deployed_sampler` picks from. Raises `ConfigError` for a name that
        is no folder's.
        """
        _require_folder_name(name)
        if best_of == 1:
            sampler, policy, metrics = self.sampler, self.policy, self.evaluate(iteration)
        else:
            sampler = deployed_sampler(self.experiment.chain, {"best_of": best_of}, control=True)
            model, parts = self.policy.model, self.policy.parts
            policy = make_policy(model, sampler, parts, origin=PERSON)
            metrics = self.examine(policy, iteration)
        if self.processes.main:
            self._tell(name, metrics)
            self._record(name, iteration, metrics)
        self.keep(name, policy, sampler)

    def keep(
        self, name: str, policy: ChainPolicy | None = None, sampler: ChainConfig | None = None
    ) -> None:
        """Save the policy as it stands, with the deployed sampler or another, as stages/NAME.

        Raises `ConfigError` for a name that is no folder's.
        """
        _require_folder_name(name)
        if self.processes.main:
            (self.folder / STAGES).mkdir(parents=True, exist_ok=True)
            self.save(self.folder / STAGES / name, policy, sampler)
        self.processes.wait()

    def save(
        self, folder: Path, policy: ChainPolicy | None = None, sampler: ChainConfig | None = None
    ) -> None:
        """Write a policy, by default the deployed one, with the averaged weights."""
        with self.averaged():
            section = self.experiment.policy
            save_policy(policy or self.policy, section, sampler or self.sampler, folder)

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics, and when they were taken."""
        return {name: getattr(self, name) for name in KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up metrics."""
        for name in KEPT:
            setattr(self, name, state[name])

    def _record(self, name: str, iteration: int, metrics: dict[str, Any]) -> None:
        line = {"iteration": iteration, **{f"{name}/{key}": v for key, v in metrics.items()}}
        metrics_file.append(self.folder, line)
        self.processes.log(line, iteration)

    def _tell(self, text: str, metrics: dict[str, Any]) -> None:
        measured = self.evaluator.measured
        shown = "  ".join(
            f"{name.removeprefix('reward/')} {metrics[name]:.3f}" for name in measured
        )
        self.say(f"{text} (n {metrics['n']}): {shown}")


def _require_folder_name(name: str) -> None:
    """Raise `ConfigError` for a name that would lead out of the folder of the stages."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(
            f"a policy can't be kept as stages/{name}: a stage's name has letters, digits, hyphens"
            " and underscores only"
        )
