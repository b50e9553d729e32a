"""EXPO (arXiv 2507.07986): an expressive policy that only imitates, a small one that edits what it
samples, and a critic that picks on the fly.

    a_1 .. a_N ~ pi(. | s);  a~_j = clip(a_j + size tanh(N(mean(s, a_j), std(s, a_j)^2)))
    acting    argmax Q over a_1 .. a_N and the edited ones; Q's target takes the same
    editor    min E[ alpha log e(u | s, a) - mean_i Q_i(s, a + size u) ],  a ~ pi
    alpha     min alpha (H - target),  target = -d / 2 + d log size, H of the edit
    pi        its own supervised loss on everything that was carried out

The edits are a trust region of ``size`` around what the policy samples; edited chunks are carried
out, recorded and imitated, and that is how pi improves.

Differs from the public copies that were read: the highest valued samples are edited (there the
first ones), edits act at their mean (there drawn), and what picks is the ensemble's mean (there
the least of a few target networks).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from genpolicy.config.errors import at_least, at_most, positive, share
from genpolicy.config.schema import OptimizerConfig
from genpolicy.learning.squashed import EntropyWeight
from genpolicy.methods.parts.chunk_critic import Valuing, mixed_rows
from genpolicy.methods.parts.off_policy import OffPolicy
from genpolicy.methods.parts.practice import Practice
from genpolicy.policy.parts.editor import Editor
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class EXPO:
    """The settings of EXPO. Defaults without a source are ours; a copy is one of the two public
    ones.
    """

    gamma: float = 0.99  # discount per environment step; a copy
    cut_fails: bool = True  # True: nothing comes after an episode that its time limit cut
    samples: int = 8  # N, drawn and valued per decision; 32 in a copy
    edited: int = 4  # of them, the highest valued, so many are edited
    size: float = 0.1  # bound of an edit, event units; the paper tunes it
    lr: float = 3e-4  # of the editor and of alpha; a copy
    alpha: float = 0.01  # weight of the entropy at first
    batch: int = 256  # decisions per update; a copy
    every: int = 10  # iterations between imitations
    updates: int = 100  # of the policy per imitation
    practice: Practice = field(default_factory=Practice)  # the episodes
    critic: Valuing = field(default_factory=Valuing)  # Q

    needs: ClassVar[Needs] = Needs(("robots",), split=())

    def __post_init__(self) -> None:
        at_least("method expo", self, samples=1, edited=1, batch=1, every=1, updates=0)
        positive("method expo", self, "size", "lr", "alpha")
        at_most("method expo", self, edited=self.samples)
        share("method expo", self, "gamma")

    def train(self, run: Run) -> None:
        _Editing(self, run).train()


class _Editing:
    """The loop of EXPO, in the verbs of a run."""

    def __init__(self, settings: EXPO, run: Run) -> None:
        self.settings, self.run = settings, run
        self.world = OffPolicy(run, settings, ("best_of", "editor"))
        model = run.policy.model
        numbers = math.prod(model.event_shape)
        self.editor = Editor(run.features, numbers, settings.size, edited=settings.edited).to(
            model.device
        )
        dims = model.scored(torch.zeros(1, *model.event_shape)).numel()
        target = -dims / 2 + dims * math.log(settings.size)
        self.entropy = EntropyWeight(settings.alpha, target).to(model.device)
        self.optimizer = run.new_optimizer(
            [*self.editor.parameters(), *self.entropy.parameters()],
            OptimizerConfig(lr=settings.lr, weight_decay=0.0),
        )
        run.register(editor_optimizer=self.optimizer, entropy=self.entropy)

    def train(self) -> None:
        self.world.train(self._begin, self._improve, self.world.learn)

    def _begin(self) -> None:
        """From now on samples are edited before the best one is carried out."""
        experience = self.world.experience
        if self.run.iteration == 1:
            self.editor.actor.scale.fit(experience.features)
        known = experience.replay.event[: self.world.episodes.before]
        self.editor.clip_at(float(known.abs().amax()))
        self.run.attach(best_of=self.world.critic.part, editor=self.editor)
        self.run.choose_among(self.settings.samples)

    def _improve(self) -> None:
        if self.run.iteration % self.settings.every == 0:
            self.world.imitate_everything(self.settings.updates, self.settings.batch)
        self._edit(self.world.updates)

    def _edit(self, updates: int) -> None:
        """Updates of the editor and of alpha."""
        run, settings, world = self.run, self.settings, self.world
        experience, scored = world.experience, run.policy.model.scored
        replay, features = experience.replay, experience.features
        offline = world.critic.settings.offline
        batches = mixed_rows(
            run, len(replay), world.episodes.before, offline, updates, settings.batch, "edited"
        )
        for update, rows in enumerate(batches):
            seen = features[replay.now[rows]]
            drawn = run.generator("which sample is edited", update)
            which = run.mine(drawn.integers(settings.samples, size=settings.batch))
            event = world.samples.at(replay.now[rows])[torch.arange(len(rows)), which]
            noise = run.noise("edits", run.mine(torch.arange(settings.batch).numpy()), update)
            eps = noise(0, tuple(event.shape[1:])).to(event)

            def losses(
                part: slice, seen: Tensor = seen, event: Tensor = event, eps: Tensor = eps
            ) -> tuple[Tensor, dict[str, Tensor]]:
                edit, log_prob = self.editor.edits(seen[part], event[part]).drawn(eps[part])
                edited = self.editor.moved(event[part], edit)
                worth = world.critic.q(seen[part], scored(edited)).mean(0)
                return self.entropy.loss(scored(log_prob).flatten(1).sum(1), worth)

            run.descend(losses, len(rows), "editor", self.optimizer)
        world.critic.optimizer.zero_grad()  # the loss reached the critic's networks too
