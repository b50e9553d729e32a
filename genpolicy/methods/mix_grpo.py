"""MixGRPO (arXiv 2507.21802): the window of noisy, trained steps slides along the chain.

Only the ``size`` steps of a window are stochastic and trained, the others are the ODE's. The window
begins at the noisiest step and moves on by ``stride`` steps every tau iterations; behind the last
place it begins again:

    schedule "progressive"  tau_l = every
    schedule "exp_decay"    tau_l = ceil(every exp(-0.1 max(l - after, 0))),  l the window's first
                            step: the later ones, which matter less, are passed faster
    schedule "decay"        tau_l = ceil(every (1 - l / places)), linear instead; ours
    schedule "random"       a place drawn in every iteration

Each reward is scored by itself in its group and the weighted scores are added (``combine:
z_sum``). The loss is Flow-GRPO's, without a KL:

    loss = mean over rows and steps of max(-A rho, -A clip(rho, 1-eps, 1+eps))

Flash: ``solver_steps`` evaluations of DPM-Solver++(2M) take the place of the steps behind the
window, at times of the chain's own grid. Before the window it is not used: the start of a window is
then off the ODE that the noisy steps spread around.

Differs from the public code (Tencent-Hunyuan/MixGRPO): the std of a group is biased (ddof 0), and a
last window that does not fit is moved back inside.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from genpolicy.chain.solver import DPMSolver
from genpolicy.chain.values import Gaussian, Reduce
from genpolicy.config.errors import ConfigError, at_least, choice, divides, positive
from genpolicy.learning.advantage import Advantage, Combine
from genpolicy.learning.objective import Scored, clip_metrics, clipped_surrogate, log_ratio
from genpolicy.policy.policy import ChainPolicy
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run

SCHEDULES = ("progressive", "exp_decay", "decay", "random")
"""The ways in which the window moves."""


@dataclass
class MixGRPO:
    """The settings of MixGRPO. Defaults are those of scripts/finetune/finetune_flux_grpo_MixGRPO.sh
    unless a line says otherwise.
    """

    groups: int = 8  # prompts per iteration; one per GPU there
    group: int = 12  # samples per prompt, N
    size: int = 4  # steps of the window
    every: int = 25  # iterations at a place, tau
    stride: int = 1  # steps by which it moves
    schedule: Literal["progressive", "exp_decay", "decay", "random"] = "progressive"
    after: int = 13  # step behind which exp_decay begins; of 25 steps
    # evaluations of the second-order solver in the place of the steps behind the window (Flash);
    # None: the chain's own steps
    solver_steps: int | None = None
    combine: Combine = "z_sum"  # of several rewards: "z_sum" or "sum" (see `Advantage`)
    # optimiser steps per pass over a rollout; divides groups; ours (N/4 there, of a GPU's prompt)
    updates: int = 4
    epochs: int = 1  # passes over a rollout
    clip: float = 1e-4  # eps, range of the ratio, read beside ``reduce``
    reduce: Reduce = "mean"  # of the log-ratio over the event's dims
    advantage_clip: float = 5.0  # bound of |A|

    needs: ClassVar[Needs] = Needs(likelihoods=True, whole_updates=True)

    def __post_init__(self) -> None:
        choice("method mix_grpo: reduce", self.reduce, ("sum", "mean"))
        choice("method mix_grpo: schedule", self.schedule, SCHEDULES)
        least = {"groups": 1, "group": 2, "size": 1, "every": 1, "stride": 1, "after": 0}
        at_least("method mix_grpo", self, **least, solver_steps=1, updates=1, epochs=1)
        positive("method mix_grpo", self, "clip", "advantage_clip")
        divides("method mix_grpo", self, "updates", "groups")

    def train(self, run: Run) -> None:
        whole = run.window
        if self.size > len(whole):
            raise ConfigError(
                f"method mix_grpo: size is {self.size}, and chain.window has {len(whole)} steps"
            )
        if run.experiment.chain.window_size is not None:
            raise ConfigError("method mix_grpo moves its own window: leave out chain.window_size")
        estimate = Advantage("group", self.combine, self.advantage_clip)
        for iteration in run.iterations():
            first = self.place(run, iteration, whole)
            window = first, first + self.size
            policy = self.flash(run.policy, window)
            rollout = run.collect(
                self.groups, self.group, updates=self.updates, policy=policy, window=window
            )
            rollout = run.verified(rollout, self.log_ratio, self.clip / 10)
            advantage = estimate(rollout.parts, rollout.weights, rollout.prompts)
            run.show(rollout, advantage)
            run.log("mix/first", first)
            for batch in run.minibatches(rollout, self.updates, self.epochs):
                run.update(rollout, batch, advantage, self.loss)

    def place(self, run: Run, iteration: int, whole: range) -> int:
        """The window's first step in an iteration."""
        places = len(whole) - self.size + 1
        if self.schedule == "random":
            return whole.start + int(run.generator("window's place").integers(places))
        return whole.start + self.slid(iteration, places)

    def slid(self, iteration: int, places: int) -> int:
        """The place 0 .. places - 1 of a window that slides, in iteration 1, 2, ..."""
        stops = [*range(0, places - 1, self.stride), places - 1]
        stays = [self.stay(stop, places) for stop in stops]
        left = (iteration - 1) % sum(stays)
        for stop, stay in zip(stops, stays, strict=True):
            if left < stay:
                return stop
            left -= stay
        raise AssertionError("the stays of a round sum to its length")

    def stay(self, place: int, places: int) -> int:
        """The iterations tau_l at a place."""
        if self.schedule == "exp_decay":
            return math.ceil(self.every * math.exp(-0.1 * max(place - self.after, 0)))
        if self.schedule == "decay":
            return math.ceil(self.every * (1 - place / places))
        return self.every

    def flash(self, policy: ChainPolicy, window: tuple[int, int]) -> ChainPolicy:
        """The policy whose chain goes on behind the window with the solver, at no more steps than
        there were.
        """
        chain, stop = policy.chain, window[1]
        left = chain.K - stop
        if self.solver_steps is None or not left:
            return policy
        steps = min(self.solver_steps, left)
        later = stop + torch.linspace(0, left, steps + 1).round().long()
        grid = torch.cat([chain.grid[:stop], chain.grid[later]])
        return replace(policy, chain=replace(chain, grid=grid, window=window, finish=DPMSolver()))

    def log_ratio(self, new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
        """log rho of b transitions, [b]."""
        return log_ratio(new, old, x, reduce=self.reduce)

    def loss(self, step: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b transitions, [b], and its metrics [b]."""
        log_rho = self.log_ratio(step.new, step.old, step.x)
        surrogate = clipped_surrogate(log_rho, step.advantage, self.clip)
        return surrogate.loss, clip_metrics(log_rho, step.advantage, surrogate)
