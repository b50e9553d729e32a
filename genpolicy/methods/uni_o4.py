"""Uni-O4 (arXiv 2311.03351), from which RL-100 grew: n Gaussian policies instead of one denoising
chain, and a gate that undoes nothing.

    imitation   pi_1 .. pi_n <- joint behaviour cloning:
                L_i = -log pi_i - alpha (log pi_i - max_j log pi_j)
    offline     D <- D + episodes of all members;  Q, V <- IQL(D);  T <- transition model(D)
                pi_i <- PPO(pi_i, A = Q - V of a ~ old_i) at recorded states
                old_i <- pi_i where J(pi_i) > J(old_i)
    online      pi <- PPO(old_i of the highest J, A = GAE);  V goes on from the offline one

    PPO's loss = max(-A rho, -A clip(rho, 1-eps, 1+eps)),   rho = pi_i / old_i of the whole chunk

J = E sum_h Q(s_h, mu(s_h)) in imagination (`genpolicy.methods.parts.gate`), of the mean action.
Where J falls short, old_i stays and pi_i learns on from where it is (RL-100 as we have it goes
back). A member's policy is N(mu, s^2) with the s of chain.kernel, so that -log pi_i is |E| / (2
s^2) times the mean square of its error, and L_i weighs a row with 1 where member i is the most
likely of all and with 1 + alpha elsewhere: it catches up with the others rather than away from
them. What makes the members differ is where they begin and what they draw.

Differs from the public code (Lei-Kun/Uni-O4): there the maximum is detached, so that L_i is (1 +
alpha) times plain cloning (its other form, kl_type "distribution", subtracts alpha KL(pi_i || the
likeliest) and does push them apart); the std is learned; the critics are by default the behaviour's
(SARSA), IQL is an option; clip stops falling after 200 updates; and the J of old_i is the number of
the check at which it was best, from other starts, while here both are imagined from the same
starts, with the same luck.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least, share
from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.model import ControlModel
from genpolicy.methods.parts.anchor import Anchor
from genpolicy.methods.parts.imitation import Imitation, recorded
from genpolicy.methods.parts.members import Members
from genpolicy.methods.parts.online import OnPolicy
from genpolicy.methods.parts.pipeline import constant, train_stages
from genpolicy.methods.parts.ppo import chunk_log_ratio, ppo_loss
from genpolicy.methods.parts.uni_o4_settings import Joint, Offline, Practice
from genpolicy.rollout.minibatch import Batch
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run
from genpolicy.training.stages import Stage


@dataclass
class UniO4:
    """The settings of Uni-O4. Defaults without a source are ours; main.py is the public code's.

    The policy that is evaluated and saved is the first member until there is a J, then the old
    policy of the highest. The budget is of the whole run; online RL goes on until it is spent.
    Policies of the stages' ends are kept in stages/.
    """

    members: int = 4  # n; main.py (the paper's number was not verified)
    gamma: float = 0.999  # discount per environment step; .99 there
    # True: nothing comes after an episode that its time limit cut, as in rl100
    cut_fails: bool = True
    imitation: Joint = field(default_factory=Joint)  # the first stage
    offline: Offline = field(default_factory=Offline)  # the second
    online: Practice = field(default_factory=Practice)  # the third

    needs: ClassVar[Needs] = Needs(("robots",), data=True, likelihoods=True)

    def __post_init__(self) -> None:
        at_least("method uni_o4", self, members=1)
        share("method uni_o4", self, "gamma")
        if 0 < self.offline.episodes < self.members:
            raise ConfigError(
                f"method uni_o4: offline.episodes is {self.offline.episodes}; it must be 0 or one"
                f" for each of the {self.members} members"
            )

    def train(self, run: Run) -> None:
        _Pipeline(self, run).train()


class _Pipeline:
    """The stages, in the verbs of a run."""

    def __init__(self, settings: UniO4, run: Run) -> None:
        self.settings = settings
        self.run = run
        self.model = cast(ControlModel, run.policy.model)
        _require_gaussian(self.model, run.policy.chain.K)
        assert run.data is not None
        for member in range(settings.members):
            name = f"method: offline.episodes, the share of member {member},"
            run.require_split(name, self._share(member))
        if not settings.online.floor:
            run.require_split("method: online.episodes", settings.online.episodes)
        run.plan(self._stages())
        self.members = Members(run, settings.members, self._optimizers())
        source = recorded(run.data, self.model)
        self.imitation = Imitation(run, source, len(run.data), settings.imitation.batch)
        self.offline = settings.offline.learner(run, settings.gamma, settings.cut_fails)
        self.anchor = Anchor(run)
        online = settings.online.online()
        self.on_policy = OnPolicy(run, online, settings.gamma, settings.cut_fails, self.anchor)

    def _stages(self) -> list[Stage]:
        """The stages in order, each with the run's own optimiser, which learns in the last only."""
        settings = self.settings
        common = self.run.experiment.optimizer
        plain = constant(common)
        collections = settings.members if settings.offline.episodes else 0
        return [
            Stage("imitate", settings.imitation.iterations, plain),
            *([Stage("collect", collections, plain)] if collections else []),
            Stage("criticise", 1, plain),
            Stage("improve", settings.offline.candidates, plain),
            Stage("online", None, settings.online.online().optimizer(common)),
        ]

    def _optimizers(self) -> dict[str, OptimizerConfig]:
        """The members' optimisers by stage, with the experiment's own betas, eps and decay."""
        common = self.run.experiment.optimizer
        cloning = self.settings.imitation.cloning().optimizer(common)
        improvement = replace(constant(common), lr=self.settings.offline.lr, final=0.0)
        return {"imitate": cloning, "improve": improvement}

    def train(self) -> None:
        acts = {
            "imitate": self.imitate,
            "collect": self.collect,
            "criticise": self.criticise,
            "improve": self.improve,
            "online": self.online,
        }
        ready = self.offline.experience.require_one_reward
        train_stages(self.run, acts, self._leave, {}, ready)

    def _leave(self, stage: str) -> None:
        """Ends a stage."""
        if stage == "imitate":
            self.members.enter("improve")
            self.run.milestone("imitation")
        if stage == "improve":
            self.run.milestone("offline")
            self.anchor.renew()
            self.on_policy.begin_with(self.offline.value.v)

    # Imitation

    def imitate(self) -> None:
        """pi_i <- joint behaviour cloning."""
        settings = self.settings.imitation
        count = len(self.members)
        for update in range(settings.updates):
            for member in range(count):
                self._imitate(member, update * count + member)
        self.run.seen(settings.batch * settings.updates * count)
        self.members.settled(0).restore()

    def _imitate(self, member: int, number: int) -> None:
        """One update of a member on L_i. number: of the update in its iteration."""
        run = self.run
        members = self.members
        rows, uniform, noise, _ = self.imitation.draw(number)
        times = self.model.times(uniform)

        def losses(part: slice) -> Tensor:
            context, event, mask = self.imitation.source(rows[part])
            condition = self.model.encode(context)
            drawn = noise[part].to(event)
            error = partial(run.policy.supervised_loss, condition, event, times[part], drawn, mask)
            others = []
            for other in range(len(members)):
                if other != member:
                    with torch.no_grad(), members.weights[other].using():
                        others.append(error())
            own = error()
            return joint_weight(own.detach(), others, self.settings.imitation.alpha) * own

        with members.learning(member):
            run.descend(losses, len(rows), "bc")

    # Offline

    def collect(self) -> None:
        """D <- D + the next member's share of the episodes, noise and all."""
        member = self.run.stages.done
        with self.members.weights[member].using():
            self.run.collect(self._share(member), 1, keep=True)
        self.offline.experience.add(self.run.iteration)

    def _share(self, member: int) -> int:
        """The number of episodes that a member plays in the offline stage."""
        count = self.settings.members
        return (self.settings.offline.episodes + count - 1 - member) // count

    def criticise(self) -> None:
        """Q, V <- IQL(D);  T <- transition model(D)."""
        settings = self.settings.offline
        self.offline.learn(settings.critic_updates, settings.model_updates)

    def improve(self) -> None:
        """pi_i <- PPO(pi_i, A = Q - V of old_i's actions), old_i <- the better of the two, for
        every member.
        """
        run = self.run
        members = self.members
        settings = self.settings.offline
        loss = partial(ppo_loss, clip=settings.clip * (1 - run.learner.pace))
        for member in range(len(members)):
            for update in range(settings.updates):
                number = update * len(members) + member
                with members.old[member].using():
                    rollout, advantage = self.offline.redraw(
                        settings.states, number, 1, settings.clip / 10
                    )
                everything = Batch(slice(0, len(rollout.trajectory)))
                better = run.normalised(advantage.cpu())
                with members.learning(member):
                    run.update(rollout, everything, better, loss)
            with members.weights[member].using():
                verdict = self.offline.verdict(members.old[member])
            run.log("gate/accepted", float(members.judge(member, verdict)))
            run.log("gate/gain", verdict.difference)
            run.log("gate/value", verdict.old)
        members.best.restore()

    # Online

    def online(self) -> None:
        """pi <- PPO(pi, A = GAE), and V."""
        run = self.run
        settings = self.settings.online
        rollout, advantage, returns = self.on_policy.rollout(chunk_log_ratio)
        if run.stages.done >= settings.warm_up:
            better = run.normalised(advantage)
            loss = partial(ppo_loss, clip=settings.clip)
            updates = math.ceil(rollout.decisions.total / settings.minibatch)
            for batch in run.minibatches(rollout, updates, settings.epochs):
                run.update(rollout, batch, better, loss)
        self.on_policy.critic.learn(rollout, returns)


def _require_gaussian(model: ControlModel, steps: int) -> None:
    """Raises `ConfigError` unless the policy is a Gaussian of vectors. steps: of its chain."""
    if getattr(model, "family", None) != "gaussian" or steps != 1:
        raise ConfigError(
            "method uni_o4 needs policies whose likelihood is known: policy {name: mlp, family:"
            " gaussian} and chain {steps: 1, kernel: {name: floorstd, floor: 0.1, kernel:"
            " {name: ddim, eta: 0.0}}, window: [0, 1]}"
        )
    if any(len(shape) != 1 for shape in model.shapes.values()):
        raise ConfigError(
            "method uni_o4 sees vectors only: its members would each have an encoder of their own,"
            " and the critics none; name observations in policy.inputs"
        )


def joint_weight(own: Tensor, others: list[Tensor], alpha: float) -> Tensor:
    """d L_i / d(-log pi_i) of every row, [b]: 1 where the member's error is the smallest, that is,
    it is the most likely of all, and 1 + alpha elsewhere. own and others [b]: errors at the same
    std.
    """
    likeliest = torch.stack([own, *others]).argmin(0) == 0
    return torch.where(likeliest, 1.0, 1.0 + alpha)
