"""DiffusionNFT (arXiv 2509.16117): RL on the forward process. It takes samples and their rewards;
no likelihood is needed, so that any solver may draw them.

An old policy draws groups of samples. A sample's advantage becomes the probability r that it is
good,

    r = clip(1/2 + A / (2 A_max), 0, 1),

and the samples, noised anew at times of the sampler's grid, teach the network towards the good and
away from the bad ones through two implicit policies, mixtures of what it and the old policy say at
the same x_t = alpha x0 + sigma eps:

    out+ = b out + (1 - b) out_old,    out- = (1 + b) out_old - b out
    loss = mean over samples and times of  A_max/b [ r l+ + (1 - r) l- ] + beta |out - out_ref|^2

    form plain    l = mean over E of (out' - target)^2, target the output that says x0
    form x0       l = mean over E of (x0' - x0)^2 / sg(mean over E of |x0' - x0|)

``out`` is the network's own output, whatever its head. At given x_t and t the x0 and eps that it
stands for are affine in it, and the weights of a mixture add up to 1: x0+ is the same mixture of
x0's, so that the two policies do not depend on the head; only the weight of each time in the plain
form does, as in any training by regression. Where old says E[target | x_t], the plain form is least
at

    out* = out_old + (2 alpha/b) (out_pos - out_old)

with alpha = E[r | x_t] and out_pos the mean of the targets weighted by r: a smaller b is a larger
step. The form x0 makes a far and a near miss equally important; a head whose x0 is amplified a
hundredfold (epsilon on a robot's schedule) would hear nothing but its noisiest time there, and is
refused.

After every iteration old <- d old + (1 - d) new, with d = d(n) of n optimiser steps:

    on_policy  d = 0        rising  d = min(.001 n, .5)
    delayed    d = 0 until n = 75, then min(.0075 (n - 75), .999)

On robots a sample is the plan that a decision carried out, x0, and r is of its episode, among those
of the same start state: all decisions of a good episode are good, and no learned value can be
wrong. With advantage "critic", which is ours, a value V learns beside the policy and A is GAE of
the decision, in stds: it tells a good decision of a bad episode. What is trained is the network
without guidance, which the paper does away with.

Differs from the public code (NVlabs/DiffusionNFT): the plain form is a setting; ``b`` is their
config.beta and ``beta`` their config.train.beta.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from genpolicy.chain.values import expand, output_gain, reduce_event
from genpolicy.config.errors import ConfigError, at_least, choice, divides, positive, share
from genpolicy.learning.advantage import Advantage, Combine, Kind
from genpolicy.methods.parts.baseline import DecisionValue
from genpolicy.methods.parts.distillation import AMPLIFIED
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.weights import Weights
from genpolicy.rollout.minibatch import Batch
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run

MODES = ("all", "positive_only", "negative_only", "one_only", "binary")
FORMS = ("x0", "plain")
SCHEDULES = ("on_policy", "rising", "delayed")
ORDER = 1
"""The ``k`` of the draw that orders a row's noise times; the noise itself is drawn at 0."""
LEAST = 1e-5
"""The least size of an error that the form x0 divides by."""


@dataclass
class Critic:
    """The value of a robot's decisions. Defaults are DPPO's, but for the last three, which are
    ours.
    """

    gamma: float = 0.99  # discount per environment step
    lam: float = 0.95  # of GAE, in [0, 1]
    lr: float = 1e-3  # learning rate
    epochs: int = 10  # passes over a rollout's decisions
    minibatch: int = 256  # decisions per update
    warm_up: int = 2  # iterations that train the value alone

    def __post_init__(self) -> None:
        at_least("method: critic", self, epochs=1, minibatch=1, warm_up=0)
        positive("method: critic", self, "lr")
        share("method: critic", self, "gamma", "lam")

    def of(self, run: Run) -> DecisionValue:
        """A new value that learns beside a run's policy."""
        return DecisionValue(run, self.gamma, self.lam, self.lr, self.epochs, self.minibatch)


@dataclass
class DiffusionNFT:
    """The settings of DiffusionNFT. Defaults are those of its SD3.5-M configuration (config/nft.py)
    unless a line says otherwise.
    """

    groups: int = 48  # prompts or start states per iteration
    group: int = 24  # samples or episodes of each, N
    updates: int = 1  # optimiser steps per pass over a rollout; 2 for OCR; divides groups
    epochs: int = 1  # passes over a rollout
    times: int = 9  # noise times of a sample per pass, of the sampler's, each once
    b: float = 1.0  # how far the implicit policies are from old; .1 for OCR and several rewards
    form: Literal["x0", "plain"] = "x0"  # of the loss
    beta: float = 1e-4  # weight of the distance to the policy at step 0
    # baseline and scale of the rewards: "all" (global_std), "group", "none", "leave_one_out",
    # "prompt_history" (see `Advantage`); "critic", ours: GAE of each decision by a learned value
    advantage: Kind | Literal["critic"] = "all"
    combine: Combine = "sum"  # of several rewards: "sum" or "z_sum" (see `Advantage`)
    advantage_clip: float = 5.0  # A_max, bound of |A|
    critic: Critic = field(default_factory=Critic)  # of advantage "critic"
    # advantages that teach: "all"; "positive_only" or "negative_only", the others are 0;
    # "one_only", 1 for the positive and else 0; "binary", their signs
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    # d(n) of the old policy: "on_policy", "rising", or "delayed" (OCR)
    old: Literal["on_policy", "rising", "delayed"] = "rising"

    needs: ClassVar[Needs] = Needs(denoising=True, whole_updates=True)

    def __post_init__(self) -> None:
        choice("method diffusion_nft: advantage", self.advantage, (*get_args(Kind), "critic"))
        choice("method diffusion_nft: form", self.form, FORMS)
        choice("method diffusion_nft: mode", self.mode, MODES)
        choice("method diffusion_nft: old", self.old, SCHEDULES)
        at_least("method diffusion_nft", self, groups=1, updates=1, epochs=1, times=1, beta=0)
        at_least("method diffusion_nft", self, group=1 if self.advantage == "critic" else 2)
        if self.advantage == "critic" and self.combine != "sum":
            raise ConfigError(
                f"method diffusion_nft: combine is {self.combine}, and advantage critic learns the"
                " value of one sum of rewards: leave combine at sum"
            )
        positive("method diffusion_nft", self, "b", "advantage_clip")
        divides("method diffusion_nft", self, "updates", "groups")

    def train(self, run: Run) -> None:
        self.require_teachable(run.policy)
        reference = run.weights() if self.beta else None
        old = run.weights()
        run.register(old=old)
        judge = self.judge(run)
        warm_up = self.critic.warm_up if self.advantage == "critic" else 0
        for iteration in run.iterations():
            with old.using():
                rollout = run.collect(self.groups, self.group, updates=self.updates)
            good = self.goodness(judge(rollout))
            if iteration <= warm_up:
                continue
            for number, batch in enumerate(run.minibatches(rollout, self.updates, self.epochs)):
                self.learn(run, rollout, batch, good, old, reference, number)
            old.follow(self.decay((iteration - warm_up) * self.updates * self.epochs))

    def judge(self, run: Run) -> Callable[[Rollout], Tensor]:
        """The judge of a rollout: every row's advantage, [R], bounded by A_max."""
        if self.advantage == "critic":
            value = self.critic.of(run)

            def by_value(rollout: Rollout) -> Tensor:
                advantage, returns = value.advantage(rollout)
                run.show(rollout, rollout.rewards)
                value.learn(rollout, returns)
                advantage = run.normalised(advantage).to(rollout.trajectory.x0)
                return advantage.clamp(-self.advantage_clip, self.advantage_clip)

            return by_value
        estimate = Advantage(self.advantage, self.combine, self.advantage_clip)
        run.register(advantage=estimate)

        def by_group(rollout: Rollout) -> Tensor:
            advantage = estimate(rollout.parts, rollout.weights, rollout.prompts)
            run.show(rollout, advantage)
            return rollout.rows(advantage)

        return by_group

    def goodness(self, advantage: Tensor) -> Tensor:
        """r of advantages that are bounded by A_max; of the same shape, in [0, 1]."""
        if self.mode == "positive_only":
            advantage = advantage.clamp_min(0)
        elif self.mode == "negative_only":
            advantage = advantage.clamp_max(0)
        elif self.mode == "one_only":
            advantage = (advantage > 0).to(advantage)
        elif self.mode == "binary":
            advantage = advantage.sign()
        return (0.5 + advantage / (2 * self.advantage_clip)).clamp(0, 1)

    def decay(self, n: int) -> float:
        """d(n), the share of the old policy that stays after n optimiser steps."""
        if self.old == "on_policy":
            return 0.0
        if self.old == "rising":
            return min(0.001 * n, 0.5)
        return min(0.0075 * max(n - 75, 0), 0.999)

    def learn(
        self,
        run: Run,
        rollout: Rollout,
        batch: Batch,
        good: Tensor,
        old: Weights,
        reference: Weights | None,
        number: int,
    ) -> None:
        """One optimiser step, the ``number``-th of its iteration, on rows of a rollout at ``times``
        noise times each; good [R].
        """
        model, grid = run.policy.model, run.policy.chain.grid[:-1]
        rows = torch.arange(len(good))[batch.rows]

        # a random order of the sampler's times for every row, of which it takes the first
        times = min(self.times, len(grid))
        noise = run.noise("forward", rollout.decisions.place[rows], number)
        time = noise(ORDER, (len(grid),)).argsort(1)[:, :times].flatten()
        every = torch.arange(len(rows)).repeat_interleave(times)
        noise, rows = noise[every].at(time), rows[every]

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            row, t = rows[part], grid[time[part]]
            x0, condition = rollout.trajectory.x0[row], rollout.trajectory.condition[row]
            eps = noise[part](0, model.event_shape, x0.device)

            def error() -> Tensor:
                return model.scored(run.policy.output_error(condition, x0, t, eps))

            # those without a graph first: the network's own weights are back when it has one
            with torch.no_grad(), old.using():
                then = error()
            first = None
            if reference is not None:
                with torch.no_grad(), reference.using():
                    first = error()
            gain, _ = output_gain(
                model.parametrisation, model.schedule.alpha(t), model.schedule.sigma(t)
            )
            return self.loss(error(), then, first, good[row], gain)

        run.descend(losses, len(rows), "nft")

    def loss(
        self, now: Tensor, old: Tensor, first: Tensor | None, good: Tensor, gain: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b samples at a noise time each, [b], and its metrics [b].

        now, old, first [b,*E]: out - target of the network, of the old policy and of the one at
        step 0. good [b]: r. gain [b]: d x0 / d out, which makes errors of x0 out of them.
        """

        def far(error: Tensor) -> Tensor:
            if self.form == "plain":
                return reduce_event(error**2, "mean")
            error = expand(gain, error) * error
            size = reduce_event(error.detach().abs(), "mean").clamp_min(LEAST)
            return reduce_event(error**2, "mean") / size

        positive_error = self.b * now + (1 - self.b) * old
        negative_error = (1 + self.b) * old - self.b * now
        contrast = good * far(positive_error) + (1 - good) * far(negative_error)
        loss = self.advantage_clip / self.b * contrast
        metrics = {"moved": reduce_event((now - old).detach() ** 2, "mean"), "good": good}
        if first is not None:
            anchor = reduce_event((now - first) ** 2, "mean")
            loss = loss + self.beta * anchor
            metrics["anchor"] = anchor
        return loss, metrics

    def require_teachable(self, policy: ChainPolicy) -> None:
        """Raise `ConfigError` where the policy could not learn from its own samples so."""
        if policy.guidance != 1.0:
            raise ConfigError(
                f"chain.guidance is {policy.guidance:g}: diffusion_nft teaches the network that is"
                " sampled without guidance; set it to 1"
            )
        model, times = policy.model, policy.chain.grid[:-1]
        gain, _ = output_gain(
            model.parametrisation, model.schedule.alpha(times), model.schedule.sigma(times)
        )
        largest = float(gain.abs().max())
        if self.form == "x0" and not largest <= AMPLIFIED:
            raise ConfigError(
                f"method diffusion_nft: form x0 counts errors of x0, and this head says"
                f" {model.parametrisation}, whose x0 is {largest:.0f} times the output at some"
                " noise time: set form to plain"
            )
