"""PA-RL (arXiv 2412.06685), policy-agnostic RL: a critic improves actions, and the policy imitates
what came of it with its own supervised loss. Q is never differentiated through the policy.

    a_1 .. a_N ~ pi(. | s)                                       cached for each version of pi
    global   the k of them with the highest Q
    local    a <- clip(a + rate dQ/da), K times; the best iterate stays, the sample among them
    a*       of the k, refined: the one with the highest Q
    acting   a*;  target of Q: r + gamma^n Q(s', a*(s'))
    distil   pi <- its own supervised loss on (s, a'), a' drawn with softmax(Q / temperature) from
             the k - 1 best samples and the recorded chunk, refined

Any policy that samples and imitates will do: denoising, flow or tokens. First Q learns from
recorded episodes and those of the first iteration; then, in turn, episodes of a*, distillation
(before Q learns from them), Q. Global step, local step and critic are saved with the policy and act
where it is deployed.

A prompt is an episode of one decision: nothing comes after a picture (or video), and Q(prompt,
sample), on latents, is its expected reward. Of N samples one is decoded and judged, the one with
the highest Q: for rewards that are dear, a person's or a large judge's.

Differs from the public code (MaxSobolMark/PolicyAgnosticRL): chunks; softmax over Q standardised in
each state (theirs of raw Q, whose sharpness is the reward's scale); the local step's rate is in
units of the actions' std; no random actions in Cal-QL's term.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from genpolicy.config.errors import at_least, at_most, positive, share
from genpolicy.contracts.task import Context
from genpolicy.learning.selection import drawn, highest, standardised
from genpolicy.methods.parts.chunk_critic import Valuing
from genpolicy.methods.parts.imitation import Imitation
from genpolicy.methods.parts.off_policy import OffPolicy
from genpolicy.methods.parts.practice import Practice
from genpolicy.policy.parts.refiner import Refiner
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run

AT_ONCE = 256
"""Decisions whose samples are in memory together."""


@dataclass
class PARL:
    """The settings of PA-RL. Defaults without a source are ours; base_config.py is the public
    code's.
    """

    gamma: float = 0.99  # discount per environment step; base_config.py
    cut_fails: bool = True  # True: nothing comes after an episode that its time limit cut
    samples: int = 8  # N, drawn and valued per decision; 32 there, 8 for OpenVLA
    best: int = 4  # k of them are refined; 10 there, 4 for OpenVLA
    steps: int = 0  # K of the local step; 10 there
    # of the local step: the move is rate x std^2 x dQ/da, with the std of recorded actions
    rate: float = 0.1
    temperature: float = 1.0  # of the softmax over standardised Q; 1 of raw Q there
    every: int = 10  # iterations between distillations
    states: int = 4096  # decisions per distillation, whose improved chunks are imitated
    updates: int = 100  # of the policy per distillation
    batch: int = 256  # decisions per update
    practice: Practice = field(default_factory=Practice)  # the episodes
    critic: Valuing = field(default_factory=Valuing)  # Q

    needs: ClassVar[Needs] = Needs(split=())

    def __post_init__(self) -> None:
        least = {"samples": 1, "best": 1, "steps": 0, "every": 1}
        at_least("method pa_rl", self, **least, states=1, updates=0, batch=1)
        positive("method pa_rl", self, "rate", "temperature")
        at_most("method pa_rl", self, best=self.samples)
        share("method pa_rl", self, "gamma")

    def train(self, run: Run) -> None:
        _Improvement(self, run).train()


class _Improvement:
    """The loop of PA-RL, in the verbs of a run."""

    def __init__(self, settings: PARL, run: Run) -> None:
        self.settings, self.run = settings, run
        self.world = OffPolicy(run, settings, ("best_of", "refiner"))
        self.experience, self.critic = self.world.experience, self.world.critic

    def train(self) -> None:
        self.world.train(self._begin, self._improve, self.world.learn)

    def _begin(self) -> None:
        """From now on what is carried out is a*."""
        settings = self.settings
        known = self.experience.replay.event[: self.world.episodes.before]
        size = float(known.std(0, correction=0).square().mean())
        bound = float(known.abs().amax())  # 1 only where the model scales actions by their range
        self.refiner = Refiner(settings.steps, settings.rate * size, -bound, bound, settings.best)
        self.run.attach(best_of=self.critic.part)
        if settings.steps or "refiner" in self.run.policy.parts:  # an earlier one's ends to act
            self.run.attach(refiner=self.refiner)
        self.run.choose_among(settings.samples)

    def _improve(self) -> None:
        if self.run.iteration % self.settings.every == 0:
            self._distil()

    # Distillation

    def _distil(self) -> None:
        """pi <- supervised on improved chunks at recorded decisions."""
        run, settings = self.run, self.settings
        replay, model = self.experience.replay, run.policy.model
        generator = run.generator("distilled")
        rows = torch.from_numpy(generator.integers(len(replay), size=settings.states))
        uniform = torch.from_numpy(generator.random(settings.states))
        target = torch.cat(
            [
                self.target(*part)
                for part in zip(rows.split(AT_ONCE), uniform.split(AT_ONCE), strict=True)
            ]
        )

        def source(index: Tensor) -> tuple[Context, Tensor, None]:
            return replay.views[replay.now[rows[index]]], target[index].to(model.device), None

        Imitation(run, source, settings.states, settings.batch)(settings.updates)
        self.world.changed()

    @torch.no_grad()
    def target(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """The chunk to imitate at each of recorded decisions [b], drawn by uniform numbers [b]."""
        run, settings = self.run, self.settings
        policy, replay, k = run.policy, self.experience.replay, settings.best
        seen = self.experience.seen(rows).repeat_interleave(k, 0)
        samples = self.world.drawn(replay.now[rows])
        b, count = samples.shape[:2]

        # the k - 1 best samples and, in the place of the worst that is kept, the recorded chunk
        every = self.experience.seen(rows).repeat_interleave(count, 0)
        values = self.critic.value(every, samples.flatten(0, 1)).view(b, count)
        best = highest(values, k - 1)
        row = torch.arange(b, device=best.device)[:, None]
        recorded = replay.event[rows].to(samples)[:, None]
        candidates = torch.cat([samples[row, best], recorded], 1).flatten(0, 1)

        # each refined, and one of them drawn
        refined, number = self.refiner.climbed(policy, seen, candidates)
        worth = self.critic.value(seen, refined).view(b, k)
        index = drawn(standardised(worth) / settings.temperature, uniform)
        chosen = row[:, 0] * k + index
        run.log("distil/moved", float((refined - candidates)[chosen].abs().mean()))
        run.log("distil/iterate", float(number[chosen].double().mean()))
        run.log("distil/recorded", float((index == k - 1).double().mean()))
        run.log("distil/gained", float((worth[row[:, 0], index] - values.mean(1)).mean()))
        return refined[chosen]
