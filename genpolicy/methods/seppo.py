"""SePPO (arXiv 2410.05255): preferences from good examples alone. The policy's own samples, as an
earlier version of it draws them, are the other side of each pair.

    reference = a copy of the policy drawn uniformly from those kept after each iteration before
    x         = an example (a picture, a demonstrated chunk),   y ~ p_reference(. | its caption)
    d(.)      = sum over E of the policy's squared error minus the reference's, at one t and noise
    s         = +1 where d(x) <= 0, else -1                                                 (flip)
    loss      = -log sigmoid(-beta (d(x) - s d(y)))

Where the policy already fits the example better than the reference does, the reference's sample is
the worse side (s = 1) and is pushed away; where it does not, that sample is pulled towards like the
example. One draw of t and noise makes the sign of d(x) noisy; ``sign_draws`` averages several.

flip "none" with pool "latest" is SPIN-Diffusion (arXiv 2402.10210): the reference is the last
iteration's policy. pool "initial" holds everything against the policy that the run began with.

On robots an example is a chunk of an episode that succeeded, and the reference's sample is drawn
where the demonstrator stood. Sampling takes the run's own sampler with its guidance, the loss the
network without it. No training code of the authors is public; numbers without a source are ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least, at_most, choice, unread
from genpolicy.contracts.task import Context
from genpolicy.methods.parts.judged_rows import good
from genpolicy.methods.parts.preferences import Comparison, Flip, Preference, Side
from genpolicy.policy.weights import Weights
from genpolicy.rollout.examples import examples
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class SePPO:
    """The settings of SePPO. Defaults without a source are ours."""

    samples: int = 256  # examples per iteration, each with a sample of the reference
    updates: int = 30  # per pass over them; the paper keeps a copy every 30
    epochs: int = 1  # passes over them
    pool: Literal["random", "latest", "initial"] = "random"  # which earlier policy is the reference
    copies: int = 16  # held by pool random: all, and of more a uniform sample
    flip: Flip = "sign"  # "indicator": s is 1 or 0; "none": 1
    sign_draws: int = 1  # times and noises that decide s together
    preference: Preference = field(default_factory=Preference)  # the loss

    needs: ClassVar[Needs] = Needs(data=True, denoising=True, split=("samples",))

    def __post_init__(self) -> None:
        choice("method seppo: pool", self.pool, ("random", "latest", "initial"))
        choice("method seppo: flip", self.flip, ("sign", "indicator", "none"))
        at_least("method seppo", self, samples=1, updates=1, epochs=1, copies=1, sign_draws=1)
        at_most("method seppo", self, updates=self.samples)
        if self.flip == "none":
            unread("method seppo", self, "with flip none", "sign_draws")
        if self.pool != "random":
            unread("method seppo", self, f"with pool {self.pool}", "copies")

    def train(self, run: Run) -> None:
        assert run.data is not None
        known = good(run.data).nonzero().flatten()
        if not len(known):
            raise ConfigError("method seppo: no recorded episode succeeded: there is no example")
        compare = Comparison(run, self.preference, "seppo")
        reference, keep = self.references(run)
        for _ in run.iterations():
            place = run.mine(np.arange(self.samples))
            rows = known[run.rows(len(known), self.samples, "examples")]
            chosen = reference()
            example = self.example(run, rows)
            own = self.sampled(run, example.context, place, chosen)
            for number, batch in enumerate(self.batches(run, place)):

                def sides(
                    part: slice, batch: Tensor = batch, example: Side = example, own: Tensor = own
                ) -> tuple[Side, Side]:
                    shown = example[batch[part]]
                    return shown, replace(shown, event=own[batch[part]])

                pairs = (sides, place[batch], self.samples)
                compare.update(*pairs, chosen, number, self.flip, self.sign_draws)
            run.seen(self.samples)
            keep()

    def example(self, run: Run, rows: Tensor) -> Side:
        """The examples of recorded rows [b]."""
        assert run.data is not None
        return Side(*examples(run.data, run.policy.model, rows))

    def sampled(self, run: Run, context: Context, place: Tensor, reference: Weights) -> Tensor:
        """The reference's samples in these contexts, [b,*E]."""
        with torch.no_grad(), reference.using():
            condition = run.policy.model.encode(context)
            return run.redraw(condition, place, self.samples).trajectory.x0

    def batches(self, run: Run, place: Tensor) -> Iterator[Tensor]:
        """The iteration's batches of pairs, each by the numbers of its pairs in ``place`` [b]."""
        for epoch in range(self.epochs):
            order = run.generator("order", epoch).permutation(self.samples)
            for batch in np.array_split(order, self.updates):
                yield torch.isin(place, torch.from_numpy(batch)).nonzero().flatten()

    def references(self, run: Run) -> tuple[Callable[[], Weights], Callable[[], None]]:
        """The iteration's reference, and what keeps the policy at an iteration's end."""
        if self.pool == "random":
            pool = run.pool(self.copies)
            run.register(pool=pool)
            return (
                lambda: pool[int(run.generator("reference").integers(len(pool)))],
                lambda: pool.add(float(run.generator("kept").random())),
            )
        only = run.weights()
        run.register(reference=only)
        return lambda: only, only.renew if self.pool == "latest" else lambda: None
