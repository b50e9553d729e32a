"""DDPO (arXiv 2305.13301): denoising as a decision process of K steps, whose reward comes with the
sample, improved by policy gradients with a baseline of each prompt.

    A    = (R - mean) / (std + 1e-6) over the last rewards of the prompt
    rho  = p_new(x_s | x_t) / p_old(x_s | x_t)
    DDPO-IS    loss = mean over samples and steps of max(-A rho, -A clip(rho, 1-eps, 1+eps))
    DDPO-SF    loss = mean over samples and steps of -A log p(x_s | x_t)

DDPO-IS (importance sampling) makes several steps of the optimiser on a rollout, each on a random
part of the samples at all their steps. DDPO-SF (score function, REINFORCE) is right only for the
policy that acted, so that it makes one step on a rollout; at rho = 1 both have the same gradient.
Kernel: {name: ddim, eta: 1.0} on epsilon models, as published; any with a density on others.

On robots a sample is an episode, and what a prompt is to a picture its start state is to it. A
prompt comes again and its rewards can be remembered; a start state never does, and the history of
their common instruction cannot tell a hard start from a bad episode. There ``baseline: group``
compares the episodes of one start with each other, within the iteration.

Differs from the public code (kvablack/ddpo-pytorch): the log-ratio is computed without
cancellation, from the states that are stored, and every replay is verified; the last step is not
stochastic unless chain.window says so; a sample's steps are taken in order, which changes nothing,
because all their gradients are added before the optimiser moves; the unconditional branch is
outside the graph (chain.negative_gradient puts it inside).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from genpolicy.chain.values import Gaussian, Reduce
from genpolicy.config.errors import ConfigError, at_least, choice, positive
from genpolicy.learning.advantage import PromptHistory, group_relative
from genpolicy.learning.objective import (
    Scored,
    Surrogate,
    clip_metrics,
    clipped_surrogate,
    log_ratio,
)
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class DDPO:
    """The settings of DDPO. Defaults are those of ddpo-pytorch (config/base.py, config/dgx.py)
    unless a line says otherwise.
    """

    groups: int = 256  # prompts per iteration, one of them may come several times
    group: int = 1  # samples per prompt, N
    estimator: Literal["is", "sf"] = "is"  # DDPO-IS or DDPO-SF
    updates: int = 4  # optimiser steps per pass over a rollout; compressibility, 2 elsewhere
    epochs: int = 1  # passes over a rollout
    clip: float = 1e-4  # eps, range of the ratio, read beside ``reduce``; none in "sf"
    # of the log-ratio over the event's dims; "mean" there; "sum" is the textbook likelihood, with
    # clip .1 to .3
    reduce: Reduce = "mean"
    # what rewards are compared with: "prompt", the prompt's last ones; "batch", all of the
    # iteration (their per_prompt_stat_tracking off); "group", ours, those of the same group
    baseline: Literal["prompt", "batch", "group"] = "prompt"
    history: int = 32  # rewards of a prompt that are remembered; 16 in config/base.py
    min_count: int = 16  # with fewer of them, "prompt" takes the iteration's mean and std
    advantage_clip: float = 5.0  # bound of |A|

    needs: ClassVar[Needs] = Needs(likelihoods=True)

    def __post_init__(self) -> None:
        choice("method ddpo: reduce", self.reduce, ("sum", "mean"))
        choice("method ddpo: estimator", self.estimator, ("is", "sf"))
        choice("method ddpo: baseline", self.baseline, ("prompt", "batch", "group"))
        at_least(
            "method ddpo", self, groups=1, group=1, updates=1, epochs=1, history=1, min_count=1
        )
        positive("method ddpo", self, "clip", "advantage_clip")
        if self.estimator == "sf" and self.updates * self.epochs != 1:
            raise ConfigError(
                "method ddpo: estimator sf is right for the policy that acted alone, and updates"
                f" {self.updates} x epochs {self.epochs} would move it in between; set both to 1,"
                " or take estimator is"
            )
        if self.baseline == "group" and self.group < 2:
            raise ConfigError(
                f"method ddpo: baseline group compares the samples of a group, and group is"
                f" {self.group}; it must be at least 2"
            )
        if self.baseline == "prompt" and self.history < self.min_count:
            raise ConfigError(
                f"method ddpo: history is {self.history}, and never reaches min_count ="
                f" {self.min_count}; it must be at least that"
            )

    def train(self, run: Run) -> None:
        history = PromptHistory(self.history, self.min_count)
        run.register(history=history)
        for _ in run.iterations():
            rollout = run.collect(self.groups, self.group)
            rollout = run.verified(rollout, self.log_ratio, self.clip / 10)
            advantage = self.advantage(rollout, history)
            run.show(rollout, advantage)

            # random parts of the samples, whatever their prompt; each at all of its steps
            every = torch.ones(len(rollout.trajectory), dtype=torch.bool)
            for batch in run.minibatches(rollout, self.updates, self.epochs, chosen=every):
                run.update(rollout, batch, advantage, self.loss)

    def advantage(self, rollout: Rollout, history: PromptHistory) -> Tensor:
        """A of every sample, [M,N]; the rewards enter the history."""
        rewards = rollout.rewards
        if self.baseline == "prompt":
            advantage = history(rewards, rollout.prompts)
        elif self.baseline == "batch":
            advantage = group_relative(rewards.reshape(1, -1), eps=1e-8).view_as(rewards)
        else:
            advantage = group_relative(rewards)
        return advantage.clamp(-self.advantage_clip, self.advantage_clip)

    def log_ratio(self, new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
        """log rho of b transitions, [b]."""
        return log_ratio(new, old, x, reduce=self.reduce)

    def loss(self, step: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b transitions, [b], and its metrics [b].

        That of "sf" is -A log rho, which is -A log p_new but for a constant.
        """
        log_rho = self.log_ratio(step.new, step.old, step.x)
        if self.estimator == "is":
            surrogate = clipped_surrogate(log_rho, step.advantage, self.clip)
        else:
            never = torch.zeros_like(step.advantage, dtype=torch.bool)
            surrogate = Surrogate(-step.advantage * log_rho, never)
        return surrogate.loss, clip_metrics(log_rho, step.advantage, surrogate)
