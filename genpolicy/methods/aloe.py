"""ALOE (arXiv 2602.12691): a critic of chunks by temporal differences, from demonstrations, the
policy's episodes and a person's corrections alike, and imitation weighted with its advantages.

    Q_m   -> sum_j gamma^j r_j + gamma^n (1 - terminated) min_m Q_target(s', a'),  a' ~ pi(. | s')
    V(s)  =  mean over n samples a_i ~ pi(. | s) of min_m Q_m(s, a_i)
    w     =  clip(exp(A / (beta std(A))), 0, most),   A = min_m Q_m(s, a) - V(s)
    pi    <- w times its own supervised loss on what was carried out

What was carried out counts, whoever did it: a chunk ends where a person takes over or hands back,
with as many steps as were taken, and the bootstrap goes on from there. A person's chunks weigh 1 at
least; the robot's last ``doubted`` decisions before a person takes over weigh nothing.

The supervised loss stands for -log pi, and the clip makes two good chunks alike: the weighted
optimum is not pi exp(Q / beta) (``aloe/clipped`` says how many weights were cut). No code of the
authors is public; beta, most and the number of samples are not known, and are ours.

``weigh`` has the rules that it is held against: "returns", the same with G - V of a value of the
observed returns in the place of Q - V; "success", all of the episodes that succeeded; "person", the
data section's and a person's alone (DAgger, arXiv 1011.0686); "alike", everything.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from genpolicy.config.errors import at_least, choice, positive, share, unread
from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.critic import StateValue
from genpolicy.methods.parts.chunk_critic import Valuing, mixed_rows
from genpolicy.methods.parts.imitation import Imitation
from genpolicy.methods.parts.off_policy import OffPolicy
from genpolicy.methods.parts.practice import Practice
from genpolicy.rollout.replay import Replay
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run

RULES = ("critic", "returns", "success", "person", "alike")
AT_ONCE = 2048
"""Decisions that are valued together."""


@dataclass
class ALOE:
    """The settings of ALOE. Defaults without a source are ours; notes are those on the paper's
    first version.
    """

    gamma: float = 0.99  # discount per environment step; notes
    cut_fails: bool = True  # True: nothing comes after an episode that its time limit cut
    samples: int = 4  # n of V and of the targets
    weigh: Literal["critic", "returns", "success", "person", "alike"] = "critic"
    beta: float = 1.0  # in stds of the advantages
    most: float = 5.0  # the largest weight
    doubted: int = 2  # decisions before a person takes over that are not imitated
    batch: int = 256  # decisions per update of the policy; notes
    every: int = 5  # iterations between improvements
    updates: int = 100  # of the policy per improvement
    practice: Practice = field(default_factory=Practice)  # the episodes
    critic: Valuing = field(default_factory=Valuing)  # Q; its subset is all networks

    needs: ClassVar[Needs] = Needs(("robots",), split=())

    def __post_init__(self) -> None:
        at_least("method aloe", self, samples=1, most=1, doubted=0, batch=1, every=1, updates=0)
        positive("method aloe", self, "beta")
        choice("method aloe: weigh", self.weigh, RULES)
        share("method aloe", self, "gamma")
        self._all_read()

    def _all_read(self) -> None:
        """Raises where a setting is given that the rule does not read."""
        why, critic = f"with weigh {self.weigh}", self.critic
        if self.weigh == "critic":
            why = "with the least of the networks"
            unread("method aloe: critic", critic, why, "pessimism")
        elif self.weigh == "returns":
            unread("method aloe", self, why, "samples")
            networks = ("kind", "members", "subset", "pessimism", "polyak", "bins")
            unread("method aloe: critic", critic, why, *networks)
        else:
            unread("method aloe", self, why, "gamma", "samples", "beta", "most", "doubted")
            unread("method aloe: critic", critic, why)

    def train(self, run: Run) -> None:
        _Weighing(self, run).train()

    def weights(self, advantage: Tensor) -> Tensor:
        """w of advantages [R], of all recorded decisions."""
        scale = self.beta * advantage.std(correction=0).clamp_min(1e-8)
        return (advantage / scale).exp().clamp_max(self.most)


class _Weighing:
    """The loop of ALOE, in the verbs of a run."""

    def __init__(self, settings: ALOE, run: Run) -> None:
        self.settings, self.run = settings, run
        critic = settings.critic
        if settings.weigh == "critic" and critic.subset is None:
            critic = replace(critic, subset=critic.members)
        self.world = OffPolicy(run, replace(settings, critic=critic), parts=())
        self.asked = 0  # times in this iteration that a' was drawn
        self.learn = self._learn
        if settings.weigh != "critic":
            self.value = ReturnValue(run, self.world, settings.gamma)
            self.learn = self.value.learn if settings.weigh == "returns" else lambda: None

    def train(self) -> None:
        self.world.train(lambda: None, self._improve, self.learn)

    def _learn(self) -> None:
        self.asked = 0
        self.world.learn(self._following)

    def _following(self, views: Tensor, features: Tensor) -> Tensor:
        """a' ~ pi at views [b]: of its cached samples each in its turn, [b,*E]."""
        self.asked += 1
        samples = self.world.samples.at(views)
        return samples[torch.arange(len(views)), (views + self.asked) % samples.shape[1]]

    def _improve(self) -> None:
        run, settings, world = self.run, self.settings, self.world
        if run.iteration % settings.every:
            return
        weights = self._weights()
        run.log("aloe/clipped", float((weights >= settings.most).double().mean()))
        run.log("aloe/weight", float(weights.mean()))
        if not bool(weights.any()):
            return  # there is nothing to imitate yet
        source, rows = world.experience.done, len(world.experience.replay)
        Imitation(run, source, rows, settings.batch, weights)(settings.updates)
        world.changed()

    @torch.no_grad()
    def _weights(self) -> Tensor:
        """The weight of every recorded decision, [R]."""
        settings, replay = self.settings, self.world.experience.replay
        person = replay.human.any(1)
        if settings.weigh == "alike":
            return torch.ones(len(replay))
        if settings.weigh == "success":
            return replay.success.float()
        if settings.weigh == "person":
            data = len(self.world.experience.learned[0]) if self.run.data is not None else 0
            return (person | (torch.arange(len(replay)) < data)).float()
        if settings.weigh == "returns":
            advantage = self.value.advantage()
        else:
            rows = torch.arange(len(replay)).split(AT_ONCE)
            advantage = torch.cat([self._advantage(part) for part in rows])
        weights = settings.weights(advantage).cpu()
        weights = torch.where(person, weights.clamp_min(1.0), weights)
        return torch.where(doubtful(replay, settings.doubted), 0.0, weights)

    def _advantage(self, rows: Tensor) -> Tensor:
        """min_m Q_m(s, a) - V(s) of recorded decisions [b]."""
        world, scored = self.world, self.run.policy.model.scored
        replay = world.experience.replay
        seen, samples = world.experience.seen(rows), world.samples.at(replay.now[rows])
        count, q = samples.shape[1], world.critic.q
        done = q(seen, scored(replay.event[rows].to(seen))).amin(0)
        others = q(seen.repeat_interleave(count, 0), scored(samples.flatten(0, 1))).amin(0)
        return done - others.view(-1, count).mean(1)


def doubtful(replay: Replay, count: int) -> Tensor:
    """True for the policy's decisions that a person's follows within ``count``, [R]; of a data
    set, whose every frame is a decision, within so many chunks.
    """
    person, following = replay.human.any(1), replay.following()
    found = torch.zeros_like(person)
    for _ in range(count):
        found |= (following >= 0) & (person | found)[following]
    return found & ~person


class ReturnValue:
    """V of the observed returns, by which `ALOE` with weigh "returns" judges; saved and resumed
    with the run.
    """

    def __init__(self, run: Run, world: OffPolicy, gamma: float) -> None:
        """Draws the network's weights from torch's global generator."""
        self.run, self.world, self.gamma = run, world, gamma
        settings = world.critic.settings
        self.v = StateValue(run.features, settings.hidden).to(run.policy.model.device)
        self.optimizer = run.new_optimizer(
            self.v.parameters(), OptimizerConfig(lr=settings.lr, weight_decay=0.0)
        )
        run.register(return_value=self.v, return_value_optimizer=self.optimizer)

    def learn(self) -> None:
        """Regresses V on the returns that are known."""
        run, world = self.run, self.world
        settings, replay = world.critic.settings, world.experience.replay
        features = world.experience.features
        if run.iteration == 1:
            self.v.scale.fit(features)
        returns = replay.returns(self.gamma).to(features)
        before, batch = world.episodes.before, settings.batch
        batches = mixed_rows(
            run, len(replay), before, settings.offline, world.updates, batch, "critic"
        )
        for rows in batches:
            seen, target = features[replay.now[rows]], settings.kept(returns[rows])

            def losses(part: slice, seen: Tensor = seen, target: Tensor = target) -> Tensor:
                error = self.v(seen[part]) - target[part]
                return torch.where(target[part].isnan(), 0.0, error.nan_to_num() ** 2)

            run.descend(losses, len(rows), "critic", self.optimizer)

    def advantage(self) -> Tensor:
        """G - V of every recorded decision, [R]; 0 where G is not known."""
        experience = self.world.experience
        replay, features = experience.replay, experience.features
        got = replay.returns(self.gamma).to(features)
        return (got - self.v(features)[replay.now]).nan_to_num()
