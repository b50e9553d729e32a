"""Scoring a stored rollout again under unchanged weights: how exact replay is, and the means of the
training forward.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genpolicy.chain import Gaussian, Trajectory
from genpolicy.config.errors import ConfigError
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.micro_batch import MicroBatches
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.workspace import Workspace

LogRatio = Callable[[Gaussian, Gaussian, Tensor], Tensor]
"""(new, old, x) -> log-ratio [b], in the reduction of the objective it belongs to."""
CHECK = "replay check"
"""The phase of a run in which this is done."""


class ReplayCheck:
    """Replay must be exact: on a run's first rollout, |log-ratio| of unchanged weights must stay
    below a tolerance.

    Over it, the rollout's means are scored again with the training forward (counted as
    evaluations), from then on for every rollout; if even two training forwards disagree, the run
    refuses to start and names the step. gap: what was found; again: whether rollouts are scored
    again (both None: not looked yet). Saved and resumed with the run.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.metrics, self.micro_batches = workspace.metrics, workspace.micro_batches
        self.processes, self.say = workspace.processes, workspace.display.say
        self.gap: float | None = None
        self.again: bool | None = None

    def __call__(
        self, policy: ChainPolicy, rollout: Rollout, log_ratio: LogRatio, tolerance: float
    ) -> Rollout:
        """The rollout, whose old means are those of the training forward
        to within ``tolerance``.
        """
        if self.again is None:
            self.metrics.phase(CHECK)
            counted = policy.model.evaluations
            self._look(policy, rollout.trajectory, log_ratio, tolerance)
            policy.model.evaluations = counted
            self.metrics.phase(None)
        if not self.again:
            return rollout
        self.metrics.phase("rescore")
        return replace(
            rollout, trajectory=scored_again(policy, rollout.trajectory, self.micro_batches)
        )

    def _look(
        self, policy: ChainPolicy, trajectory: Trajectory, log_ratio: LogRatio, tolerance: float
    ) -> None:
        self.gap, k = self._worst(policy, trajectory, log_ratio)
        if math.isnan(self.gap):
            raise ConfigError(
                f"replay is not exact: at step {k} the log-ratio of unchanged weights is NaN, so"
                " the network (or its std) says what is not finite there; use precision bf16 or"
                " fp32"
            )
        self.again = self.gap > tolerance
        if not self.again:
            return
        self.say(
            f"replay: log-ratio {self.gap:.1e} at step {k} exceeds a tenth of the clip range"
            f" ({tolerance:.1e}): log-probs are"
            " scored again with the training forward (one more evaluation per trained step)"
        )
        again = scored_again(policy, trajectory, self.micro_batches)
        gap, k = self._worst(policy, again, log_ratio)
        if not gap <= tolerance:
            raise ConfigError(
                f"replay is not exact: at step {k} two training forwards of the same state differ"
                f" by a log-ratio of {gap:.1e}, more than a tenth of the clip range"
                f" ({tolerance:.1e}); use precision fp32,"
                " a smaller window or a larger clip"
            )

    def _worst(
        self, policy: ChainPolicy, trajectory: Trajectory, log_ratio: LogRatio
    ) -> tuple[float, int]:
        """The gap of whichever process finds the largest: all must decide alike."""
        gap, k = replay_gap(policy, trajectory, log_ratio, self.micro_batches)
        found = self.processes.gather(torch.tensor([[gap, float(k)]], dtype=torch.float64))
        worst = found[found[:, 0].argmax()]  # a NaN, where there is one
        return float(worst[0]), int(worst[1])

    def state_dict(self) -> dict[str, Any]:
        return {"gap": self.gap, "again": self.again}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gap, self.again = state["gap"], state["again"]


def replay_gap(
    policy: ChainPolicy, trajectory: Trajectory, log_ratio: LogRatio, micro_batches: MicroBatches
) -> tuple[float, int]:
    """The largest |log-ratio| of the same weights over all rows and kept steps, and the step it is
    found at; a NaN counts as the largest.
    """
    policy = policy.along(trajectory)
    gaps: list[Tensor] = []
    for k in trajectory.steps:

        def gap(rows: slice, k: int = k) -> float:
            part = trajectory[rows]
            with torch.enable_grad():
                new = policy.transition(part, k)
            now, acted = (
                policy.scored(Gaussian(new.mean.detach(), new.std.detach())),
                policy.scored(part.acted(k)),
            )
            return float(log_ratio(now, acted, policy.model.scored(part.after(k))).abs().max())

        gaps.append(torch.tensor(micro_batches(gap, len(trajectory), trajectory.shared)).max())
    worst = int(torch.stack(gaps).argmax())
    return float(gaps[worst]), trajectory.steps[worst]


def scored_again(
    policy: ChainPolicy, trajectory: Trajectory, micro_batches: MicroBatches
) -> Trajectory:
    """The trajectory with the means that the training forward gives: one more evaluation per row
    and kept step.
    """
    policy, means = policy.along(trajectory), []
    for k in trajectory.steps:

        def mean(rows: slice, k: int = k) -> Tensor:
            return policy.transition(trajectory[rows], k).mean.detach()

        means.append(torch.cat(micro_batches(mean, len(trajectory), trajectory.shared)))
    return replace(trajectory, mean=torch.stack(means, 1))
