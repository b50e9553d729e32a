"""Uni-O4 (arXiv 2311.03351), what RL-100 grew from: n Gaussian policies instead of one denoising
chain, and a gate that undoes nothing.

    imitation   pi_1 .. pi_n <- joint behaviour cloning:
                L_i = -log pi_i - alpha (log pi_i - max_j log pi_j)
    offline     D <- D + episodes of all members;  Q, V <- IQL(D);  T <- transition model(D)
                pi_i <- PPO(pi_i, A = Q - V of a ~ old_i) at recorded states;   old_i <- pi_i where J(pi_i) > J(old_i)
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

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from genpolicy.chain.values import Gaussian
from genpolicy.config.errors import ConfigError, at_least, positive, share
from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.model import ControlModel
from genpolicy.learning.acceptance import Comparison, compare
from genpolicy.learning.objective import Scored, clip_metrics, clipped_surrogate, log_ratio
from genpolicy.methods.parts.anchor import Anchor
from genpolicy.methods.parts.gate import OfflineEvaluation
from genpolicy.methods.parts.imitation import Cloning, Imitation, recorded
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.methods.parts.online import Online, OnPolicy
from genpolicy.policy.weights import Weights
from genpolicy.rollout.minibatch import Batch
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run
from genpolicy.training.stages import Stage


@dataclass
class Joint(Cloning):
    """Of each member, with frames of its own. alpha: .1 in main.py. (Public: batch 512, 1e-4, 4e5
    updates.)
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("method uni_o4: imitation", self, alpha=0)


@dataclass
class Offline:
    """episodes: of all members together; 0 learns from the data section alone. critic_updates: of Q
    and V (IQL: ``expectile`` .7, main.py's omega). model_updates: of the model that J is imagined
    in.

    candidates: times that every member is scored; updates: in between (eval_step 100), each at
    ``states`` recorded states (512), with actions drawn anew. lr (1e-4) falls to 0 along a cosine,
    clip (.25) to 0 along a line, from one candidate to the next. horizon: imagined decisions;
    starts: imagined episodes (512).
    """

    episodes: int = 200
    critic_updates: int = 3000
    expectile: float = 0.7
    model_updates: int = 1000
    candidates: int = 10
    updates: int = 100
    states: int = 512
    lr: float = 1e-4
    clip: float = 0.25
    horizon: int = 20
    starts: int = 512

    def __post_init__(self) -> None:
        least = {
            "episodes": 0,
            "critic_updates": 1,
            "model_updates": 1,
            "candidates": 1,
            "updates": 1,
            "states": 2,
        }
        at_least("method uni_o4: offline", self, **least, horizon=1, starts=2)
        positive("method uni_o4: offline", self, "lr", "clip")
        share("method uni_o4: offline", self, "expectile")


@dataclass
class Practice(Online):
    """minibatch: decisions of one update. lr: 1e-5 to 2e-5 in public; at ten times that PPO leaves
    its clip behind (docs/rl100.md). The rest is as method rl100 has it, so that the two can be
    compared.
    """

    minibatch: int = 128
    lr: float = 1e-5


@dataclass
class UniO4:
    """members: n (main.py: 4; the paper's number was not verified). gamma: per environment step
    (.99 there). cut_fails: nothing comes after an episode that its time limit cut (as method rl100
    has it).

    Evaluated and saved is the first member until there is a J, then the old policy of the highest.
    The budget is of the whole run; online RL goes on until it is spent. Policies of the stages'
    ends are kept in stages/.
    """

    members: int = 4
    gamma: float = 0.999
    cut_fails: bool = True
    imitation: Joint = field(default_factory=Joint)
    offline: Offline = field(default_factory=Offline)
    online: Practice = field(default_factory=Practice)

    needs: ClassVar[Needs] = Needs(("robots",), data=True, likelihoods=True)

    def __post_init__(self) -> None:
        at_least("method uni_o4", self, members=1)
        share("method uni_o4", self, "gamma")
        if 0 < self.offline.episodes < self.members:
            raise ConfigError(
                f"method uni_o4: offline.episodes is {self.offline.episodes}; it must be 0 or one for each of the {self.members} members"
            )

    def train(self, run: Run) -> None:
        _Pipeline(self, run).train()


class Members:
    """n policies of one network: the weights of each, its optimiser, the best weights it has had
    (its old policy), and what those scored. Saved and resumed with the run.

    The first begins as the run's own policy, the others with weights of their own, or, where the
    policy is a saved one, alike. settings: of the optimisers, by the run's stage.
    """

    def __init__(self, run: Run, count: int, settings: dict[str, OptimizerConfig]) -> None:
        self.run, self.settings = run, settings
        self.weights = [run.weights(), *(self._drawn(i) for i in range(1, count))]
        self._begin("imitate")
        run.register(members=self)

    def __len__(self) -> int:
        return len(self.weights)

    def _drawn(self, member: int) -> Weights:
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
        """Fresh optimisers, and nothing scored yet."""
        self.optimizers = []
        for weights in self.weights:
            with weights.using():
                self.optimizers.append(self.run.learner(self.run.trainable, self.settings[stage]))
        self.old = [self._copy(weights) for weights in self.weights]
        self.score = [-math.inf] * len(self)

    def enter(self, stage: str) -> None:
        """Go on with fresh optimisers, from the averaged weights where there are any."""
        self.weights = [self._copy(self.settled(i)) for i in range(len(self))]
        self._begin(stage)

    def settled(self, member: int) -> Weights:
        """A member's averaged weights where its optimiser has some, else its weights."""
        averages = self.optimizers[member].ema
        return self.weights[member] if averages is None else Weights(self.run.trainable, averages)

    def _copy(self, weights: Weights) -> Weights:
        return Weights(self.run.trainable, weights.values)

    @contextmanager
    def learning(self, member: int) -> Iterator[None]:
        """A member's weights and optimiser in the run's place: what is learned in here is its own."""
        with self.run.learning(self.weights[member], self.optimizers[member]):
            yield

    def judge(self, member: int, verdict: Comparison) -> bool:
        """A member's old policy is what scored higher: itself as it stands, or the old one."""
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
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {
            "weights": [weights.values for weights in self.weights],
            "old": [weights.values for weights in self.old],
            "score": list(self.score),
            "optimizers": optimizers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = self.run.trainable
        self.weights = [Weights(parameters, values) for values in state["weights"]]
        self._begin("imitate" if self.run.stages.now.name == "imitate" else "improve")
        self.old = [Weights(parameters, values) for values in state["old"]]
        self.score = list(state["score"])
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)


class _Pipeline:
    """The stages, in the verbs of a run."""

    def __init__(self, settings: UniO4, run: Run) -> None:
        self.s, self.run = settings, run
        self.model = cast(ControlModel, run.policy.model)
        self._require_gaussian()
        assert run.data is not None
        o, n = settings.offline, settings.members
        course: list[tuple[str, int | None]] = [("imitate", settings.imitation.iterations)]
        course += [("collect", n)] if o.episodes else []
        course += [("criticise", 1), ("improve", o.candidates), ("online", None)]
        of_members, own = self._optimizers()
        run.plan([Stage(name, iterations, own[name]) for name, iterations in course])
        self.members = Members(run, n, of_members)
        rows = settings.imitation.batch
        self.imitation = Imitation(run, recorded(run.data, self.model), len(run.data), rows)
        self.experience = Experience(run, settings.cut_fails)
        self.value = ActionValue(run, settings.gamma, expectile=o.expectile)
        self.evaluation = OfflineEvaluation(
            run, self.value, horizon=o.horizon, starts=o.starts, caution=0.0
        )
        self.anchor = Anchor(run)
        self.on_policy = OnPolicy(
            run, settings.online, settings.gamma, settings.cut_fails, self.anchor
        )

    def _require_gaussian(self) -> None:
        run = self.run
        if getattr(self.model, "family", None) != "gaussian" or run.policy.chain.K != 1:
            raise ConfigError(
                "method uni_o4 needs policies whose likelihood is known: policy {name: mlp, family: gaussian} and chain {steps: 1,"
                " kernel: {name: floorstd, floor: 0.1, kernel: {name: ddim, eta: 0.0}}, window: [0, 1]}"
            )
        if any(len(shape) != 1 for shape in self.model.shapes.values()):
            raise ConfigError(
                "method uni_o4 sees vectors only: its members would each have an encoder of their own, and the critics none;"
                " name observations in policy.inputs"
            )

    def _optimizers(self) -> tuple[dict[str, OptimizerConfig], dict[str, OptimizerConfig]]:
        """The members', and the run's own in every stage, with the experiment's own betas, eps,
        decay and norm.
        """
        common = self.run.experiment.optimizer
        plain = replace(common, warmup=0, final=1.0, ema=0.0)
        own = dict.fromkeys(("imitate", "collect", "criticise", "improve"), plain)
        members = {
            "imitate": self.s.imitation.optimizer(common),
            "improve": replace(plain, lr=self.s.offline.lr, final=0.0),
        }
        return members, {**own, "online": self.s.online.optimizer(common)}

    def train(self) -> None:
        for _ in self.run.iterations():
            getattr(self, self.run.stages.now.name)()
            self.run.advance(leave=self._leave)

    def _leave(self, stage: str) -> None:
        """A stage is through."""
        if stage == "imitate":
            self.members.enter("improve")
            self.run.milestone("imitation")
        if stage == "improve":
            self.run.milestone("offline")
            self.anchor.renew()
            self.on_policy.critic.value.load_state_dict(self.value.v.state_dict())

    # Imitation

    def imitate(self) -> None:
        """pi_i <- joint behaviour cloning."""
        run, i = self.run, self.s.imitation
        for update in range(i.updates):
            for member in range(len(self.members)):
                self._imitate(member, update * len(self.members) + member)
        run.seen(i.batch * i.updates * len(self.members))
        self.members.settled(0).restore()

    def _imitate(self, member: int, number: int) -> None:
        run, members = self.run, self.members
        rows, uniform, noise, _ = self.imitation.draw(number)
        t = self.model.times(uniform)

        def losses(part: slice) -> Tensor:
            context, event, mask = self.imitation.source(rows[part])
            condition = self.model.encode(context)
            error = partial(
                run.policy.supervised_loss, condition, event, t[part], noise[part].to(event), mask
            )
            others = []
            for other in range(len(members)):
                if other != member:
                    with torch.no_grad(), members.weights[other].using():
                        others.append(error())
            own = error()
            return joint_weight(own.detach(), others, self.s.imitation.alpha) * own

        with members.learning(member):
            run.descend(losses, len(rows), "bc")

    # Offline

    def collect(self) -> None:
        """D <- D + the next member's share of the episodes, noise and all."""
        member, n = self.run.stages.done, len(self.members)
        with self.members.weights[member].using():
            self.run.collect((self.s.offline.episodes + n - 1 - member) // n, 1, keep=True)
        self.experience.add(self.run.iteration)

    def criticise(self) -> None:
        """Q, V <- IQL(D);  T <- transition model(D)."""
        e, o = self.experience, self.s.offline
        self.value.learn(e.replay, e.features, o.critic_updates)
        self.evaluation.learn(e.replay, e.features, o.model_updates)

    def improve(self) -> None:
        """pi_i <- PPO(pi_i, A = Q - V of old_i's actions), old_i <- the better of the two, for
        every member.
        """
        run, o, members = self.run, self.s.offline, self.members
        loss = partial(self.loss, clip=o.clip * (1 - (run.stages.progress or 0.0)))
        for member in range(len(members)):
            for update in range(o.updates):
                with members.old[member].using():
                    rollout, index = self.experience.redraw(
                        o.states, update * len(members) + member
                    )
                    rollout = run.verified(rollout, self.log_ratio, o.clip / 10)
                advantage = self.value.advantage(self.experience.seen(index), rollout.trajectory.x0)
                everything = Batch(slice(0, len(rollout.trajectory)))
                with members.learning(member):
                    run.update(rollout, everything, run.normalised(advantage.cpu()), loss)
            verdict = self._verdict(member)
            run.log("gate/accepted", float(members.judge(member, verdict)))
            run.log("gate/gain", verdict.difference)
            run.log("gate/value", verdict.old)
        members.best.restore()

    def _verdict(self, member: int) -> Comparison:
        """A member against its old policy, in imagination."""
        e = self.experience
        with self.members.weights[member].using():
            new = self.evaluation(e.replay, e.features)
        with self.members.old[member].using():
            return compare(new, self.evaluation(e.replay, e.features))

    # Online

    def online(self) -> None:
        """pi <- PPO(pi, A = GAE), and V."""
        run, o = self.run, self.s.online
        rollout, advantage, returns = self.on_policy.rollout(self.log_ratio)
        if self.run.stages.done >= o.warm_up:
            advantage, loss = run.normalised(advantage), partial(self.loss, clip=o.clip)
            for batch in run.minibatches(
                rollout, math.ceil(rollout.decisions.total / o.minibatch), o.epochs
            ):
                run.update(rollout, batch, advantage, loss)
        self.on_policy.critic.learn(rollout, returns)

    # PPO

    def log_ratio(self, new: Gaussian, old: Gaussian, x: Tensor) -> Tensor:
        """Summed over the chunk: the ratio of the policies' densities."""
        return log_ratio(new, old, x, reduce="sum")

    def loss(self, step: Scored, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of b decisions, [b], and its metrics [b]."""
        log_rho = self.log_ratio(step.new, step.old, step.x)
        surrogate = clipped_surrogate(log_rho, step.advantage, clip)
        return surrogate.loss, clip_metrics(log_rho, step.advantage, surrogate)


def joint_weight(own: Tensor, others: list[Tensor], alpha: float) -> Tensor:
    """d L_i / d(-log pi_i) of every row, [b]: 1 where the member's error is the smallest, that is,
    it is the most likely of all, and 1 + alpha elsewhere. own and others [b]: errors at the same
    std.
    """
    likeliest = torch.stack([own, *others]).argmin(0) == 0
    return torch.where(likeliest, 1.0, 1.0 + alpha)
