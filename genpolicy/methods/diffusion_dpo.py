"""Diffusion-DPO (arXiv 2311.12908), and Flow-DPO (2501.13918): learning from pairs, without a
reward model and without likelihoods.

    loss = -log sigmoid(-beta (d(w) - d(l))),
    d(.) = sum over E of the policy's squared error minus the reference's, at one t and noise,

w the preferred side of a pair, l the other. Any head will do: errors are those of what the network
says (eps, v, velocity). `genpolicy.methods.parts.preferences` has the loss's forms: hinge, IPO,
robust DPO for turned labels, RPO's supervised term, and a safeguard against the error of both sides
rising together.

pairs "own": the policy makes them, of each group of samples (prompts) or episodes (robots, from one
start state) the best by the reward and the worst, of groups without a difference nothing. A robot's
pair is a decision of the one beside a random decision of the other. pairs "recorded": those of the
data section, of pictures, one of which was preferred, or of episodes, chunks of those that
succeeded beside chunks of those that failed.

``semantic_alpha`` weighs each own pair by exp(-alpha (1 - cos)), cos of its prompt's and its
preferred picture's embeddings, which a reward of the section says (Sem-DPO, arXiv 2507.20133).

``renew`` makes the reference follow: every so many iterations it becomes the policy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least, at_most, choice, unread
from genpolicy.contracts.dataset import Pairs, Pictures
from genpolicy.learning.preference import semantic_weight
from genpolicy.methods.parts.contrast import contrasted
from genpolicy.methods.parts.judged_rows import good
from genpolicy.methods.parts.preferences import Comparison, Preference, Side, Sides
from genpolicy.rollout.examples import examples, paired
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run

Batch = tuple[Sides, Tensor, int, Tensor | None]
"""Pairs [b], their numbers among those of all processes, how many numbers there are, and the
weights of the pairs [b] (None: all the same).
"""
OWN = ("groups", "group", "epochs", "semantic_alpha", "semantic_reward")
"""Settings of own pairs."""


@dataclass
class DiffusionDPO:
    """The settings of Diffusion-DPO. Defaults without a source are ours; dpo.py is Flow-GRPO's
    configuration of its online form.
    """

    pairs: Literal["own", "recorded"] = "own"  # where they come from
    groups: int = 48  # of own: prompts or start states per iteration; dpo.py
    group: int = 24  # of own: samples or episodes of each, N; dpo.py
    epochs: int = 1  # of own: passes over an iteration's pairs
    pairs_per_update: int = 64  # of recorded
    updates: int = 10  # per pass over own pairs, and of recorded ones per iteration
    semantic_alpha: float = 0.0  # of own: Sem-DPO's alpha; 0: all pairs weigh the same
    semantic_reward: str = "clip_score"  # of own: the reward whose value is the cosine
    renew: int = 0  # iterations after which the reference becomes the policy; 0: never
    preference: Preference = field(default_factory=Preference)  # the loss

    @property
    def needs(self) -> Needs:
        """Own pairs come of groups that the processes share out, recorded ones of data."""
        own = self.pairs == "own"
        return Needs(denoising=True, data=not own, split=("groups",) if own else ())

    def __post_init__(self) -> None:
        at_least(
            "method diffusion_dpo", self, pairs_per_update=1, groups=1, group=2, updates=1, epochs=1
        )
        at_least("method diffusion_dpo", self, renew=0, semantic_alpha=0)
        choice("method diffusion_dpo: pairs", self.pairs, ("own", "recorded"))
        other = {"own": ("pairs_per_update",), "recorded": OWN}[self.pairs]
        unread("method diffusion_dpo", self, f"with {self.pairs} pairs", *other)
        if self.pairs == "own":
            at_most("method diffusion_dpo", self, updates=self.groups)
        if not self.semantic_alpha:
            unread("method diffusion_dpo", self, "with semantic_alpha 0", "semantic_reward")

    def train(self, run: Run) -> None:
        if self.pairs == "own":
            self._require_no_pairs(run)
            self._require_cosine(run)
        reference = run.weights()
        # also where it is the first policy, which may be another when its run is resumed
        run.register(reference=reference)
        compare = Comparison(run, self.preference, "dpo")
        batches = self.sampled if self.pairs == "own" else self.recorded(run)
        for iteration in run.iterations():
            for number, (sides, place, total, weight) in enumerate(batches(run)):
                compare.update(sides, place, total, reference, number, weight=weight)
            if self.renew and iteration % self.renew == 0:
                reference.renew()

    def _require_no_pairs(self, run: Run) -> None:
        """Raises `ConfigError` where the data section names what own pairs leave unread: it may
        only give a new robot policy its shapes.
        """
        if run.data is None:
            return
        if isinstance(run.data, Pictures) or run.experiment.policy.get("pretrained") is not None:
            raise ConfigError(
                "method diffusion_dpo: the data section is named, and own pairs do not read it: set"
                " pairs to recorded, or leave the section out"
            )

    def _require_cosine(self, run: Run) -> None:
        """Raises `ConfigError` where the reward that weighs pairs is not in the reward section."""
        named = [name.rpartition(":")[2] for name in run.experiment.reward]
        if self.semantic_alpha and self.semantic_reward not in named:
            raise ConfigError(
                f"method diffusion_dpo: semantic_reward is {self.semantic_reward}, and the reward"
                " section does not name it: add it there, with the weight 0 where it is to judge"
                " nothing else"
            )

    def sampled(self, run: Run) -> Iterator[Batch]:
        """An iteration's batches of pairs out of the policy's own groups."""
        rollout = run.collect(self.groups, self.group)
        run.show(rollout, rollout.rewards)
        total = rollout.decisions.total
        uniform = torch.from_numpy(run.generator("other side").random(total))
        pairs = contrasted(rollout, uniform)
        run.log("dpo/margin", pairs.margin)
        weight = self._weight(rollout) if self.semantic_alpha else None
        context, x0 = rollout.context, rollout.trajectory.x0
        for epoch in range(self.epochs):
            order = run.generator("order", epoch).permutation(self.groups)
            for batch in np.array_split(order, self.updates):
                mine = torch.isin(pairs.group, torch.from_numpy(batch)).nonzero().flatten()

                def sides(part: slice, mine: Tensor = mine) -> tuple[Side, Side]:
                    better, worse = pairs.better[mine[part]], pairs.worse[mine[part]]
                    seen = context[better]
                    other = context[worse] if rollout.ragged else seen  # one prompt, read once
                    return Side(seen, x0[better]), Side(other, x0[worse])

                place = rollout.decisions.place[pairs.better[mine]]
                yield sides, place, total, None if weight is None else weight[pairs.group[mine]]

    def _weight(self, rollout: Rollout) -> Tensor:
        """The weight of each of all M groups' pairs. Raises `ConfigError` for a reward that is no
        cosine.
        """
        best = rollout.rewards.argmax(1, keepdim=True)
        cosine = rollout.parts[self.semantic_reward].gather(1, best).squeeze(1)
        if bool((cosine.abs() > 1 + 1e-4).any()):
            raise ConfigError(
                f"method diffusion_dpo: semantic_reward {self.semantic_reward} is"
                f" {float(cosine.abs().max()):g} somewhere, and a cosine is in [-1, 1]: set its"
                " scale to 1"
            )
        return semantic_weight(cosine, self.semantic_alpha)

    def recorded(self, run: Run) -> Callable[[Run], Iterator[Batch]]:
        """The same of recorded pairs. Raises `ConfigError` where there are none in the data."""
        data, model = run.data, run.policy.model
        assert data is not None
        if isinstance(data, Pairs):

            def both(rows: Tensor, _: Tensor) -> tuple[Side, Side]:
                context, preferred, other = paired(data, model, rows)
                return Side(context, preferred), Side(context, other)

            every = torch.arange(len(data))
            return partial(self._drawn, every, every, both)
        if isinstance(data, Pictures):
            raise ConfigError(
                "method diffusion_dpo: the data section has pictures and no pairs of them: name"
                " picture_pairs, learn from good pictures with method seppo, or take the policy's"
                " own, which a reward compares"
            )
        success = good(data)
        for kind, rows in (("succeeded", success), ("failed", ~success)):
            if not bool(rows.any()):
                raise ConfigError(
                    f"method diffusion_dpo: no recorded episode {kind}: pairs need both kinds"
                )

        def unlike(better: Tensor, worse: Tensor) -> tuple[Side, Side]:
            one, other = (examples(data, model, rows) for rows in (better, worse))
            return Side(*one), Side(*other)

        return partial(
            self._drawn,
            success.nonzero().flatten(),
            (~success).nonzero().flatten(),
            unlike,
        )

    def _drawn(
        self,
        better: Tensor,
        worse: Tensor,
        sides: Callable[[Tensor, Tensor], tuple[Side, Side]],
        run: Run,
    ) -> Iterator[Batch]:
        """Batches of pairs of recorded rows, each side drawn from its own."""
        place = run.mine(np.arange(self.pairs_per_update))
        for number in range(self.updates):
            one = better[run.rows(len(better), self.pairs_per_update, "preferred", number)]
            other = worse[run.rows(len(worse), self.pairs_per_update, "other", number)]
            yield (
                lambda part, one=one, other=other: sides(one[part], other[part]),
                place,
                self.pairs_per_update,
                None,
            )
            run.seen(self.pairs_per_update)
