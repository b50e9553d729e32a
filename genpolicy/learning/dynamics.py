"""The offline gate: is a candidate policy better than the one in force, judged without an
environment?

Both act in a learned model of transitions, from the same starts and with the same random numbers,
and a critic scores what they do (AM-Q, RL-100 arXiv 2510.14830 eq. 9 and 20). Sizes: **S** starts,
**F** features, **M** members of the ensemble, **e** elites; a decision is h.

It protects, it does not promise. A policy that has learned to please the critic pleases this score
as well: on peg-insert-side it rose at every check of a run whose true success fell from 95 % to 3
%. Few rounds, a check by real episodes and `rank_correlation` of score and truth belong beside it.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from genpolicy.chain.noise import Noise
from genpolicy.learning.ensemble import EnsembleLinear

MODEL = 2**31
"""The ``k`` of the model's own draws: no denoising step has it, so a policy may draw from the same
`Noise` rows.
"""


LOG_VARIANCE = (-10.0, 0.5)
"""Soft bounds of the log-variance of a standardised change (PETS, arXiv 1805.12114 appendix A;
fixed here).
"""


Actor = Callable[[Tensor, int], Tensor]
"""(features [S,F], decision h) -> events [S,*E]: the *deployed* sampler; its noise is a function of
(start, h) alone.
"""


Score = Callable[[Tensor, Tensor], Tensor]
"""(features [S,F], events [S,*E]) -> [S], larger is better: min over the critics of Q."""


class Dynamics(Protocol):
    """The world as `imagined` needs it: the next features, with its randomness handed in."""

    def step(self, features: Tensor, event: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
        """Features and noise [B,F], event [B,*E], uniform [B] in [0,1) -> next features [B,F]."""
        ...


class TransitionModel(nn.Module):
    """A model of where a decision leads: M networks of f' = f + c * N(mean(x),
    exp(log_variance(x))), x = ((f - centre)/std, event).

    c is the std of the change f' - f, std and centre those of f, all over the data, per feature. f
    [B,F], the event [B,*E] in the policy's units. ``features``: F; ``event``: the number of event
    dims; ``layers`` hidden layers of ``hidden``. The ``elites`` of lowest error on held-out data
    predict; before `choose_elites` they are the first ones.
    """

    centre: Tensor
    feature_std: Tensor
    change_std: Tensor
    elites: Tensor

    def __init__(
        self,
        features: int,
        event: int,
        members: int = 7,
        elites: int = 5,
        hidden: int = 200,
        layers: int = 3,
    ) -> None:
        super().__init__()
        if not 1 <= elites <= members:
            raise ValueError(f"elites is {elites}; valid are 1 to members ({members})")
        self.members = members
        sizes = [features + event, *[hidden] * layers]
        parts: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            parts += [EnsembleLinear(members, inputs, outputs), nn.SiLU()]
        self.network = nn.Sequential(*parts, EnsembleLinear(members, sizes[-1], 2 * features))
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        self.register_buffer("change_std", torch.ones(features))
        self.register_buffer("elites", torch.arange(elites))

    def fit_scale(self, features: Tensor, after: Tensor) -> None:
        """Take centre and stds from the data, both [B,F].

        A feature's std is at least .01 (one that never moved is no reason to divide by 0 where it
        does), its change's at least a thousandth of that: smaller changes than this are not worth a
        network's attention.
        """
        self.centre.copy_(features.mean(0))
        self.feature_std.copy_(features.std(0, correction=0).clamp(min=1e-2))
        change = (after - features).std(0, correction=0)
        self.change_std.copy_(torch.maximum(change, 1e-3 * self.feature_std))

    def _change(self, features: Tensor, event: Tensor) -> tuple[Tensor, Tensor]:
        """Every member's mean and log-variance of the change in units of ``change_std``, both
        [M,B,F].
        """
        x = torch.cat([(features - self.centre) / self.feature_std, event.flatten(1)], 1)
        mean, log_variance = self.network(x.expand(self.members, *x.shape)).chunk(2, -1)
        low, high = LOG_VARIANCE
        log_variance = high - nn.functional.softplus(high - log_variance)
        return mean, low + nn.functional.softplus(log_variance - low)

    def _target(self, features: Tensor, after: Tensor) -> Tensor:
        return (after - features) / self.change_std

    def loss(self, features: Tensor, event: Tensor, after: Tensor) -> Tensor:
        """-log N of the standardised change, mean over F: [M,B]. A member's rows can be weighted
        before the mean over B.
        """
        mean, log_variance = self._change(features, event)
        square = (self._target(features, after) - mean) ** 2
        return ((square * (-log_variance).exp() + log_variance + math.log(2 * math.pi)) / 2).mean(
            -1
        )

    @torch.no_grad()
    def hold_out(self, features: Tensor, event: Tensor, after: Tensor) -> Tensor:
        """Every member's mean squared error of the standardised change, [M]; predicting its mean
        over the data gives 1.
        """
        mean, _ = self._change(features, event)
        return ((self._target(features, after) - mean) ** 2).mean((1, 2))

    def choose_elites(self, errors: Tensor) -> None:
        """Let the members of lowest ``errors`` [M] predict from now on."""
        if errors.shape != (self.members,):
            raise ValueError(
                f"errors have shape {list(errors.shape)}; valid is one for each of {self.members}"
                " members"
            )
        self.elites.copy_(errors.argsort(stable=True)[: len(self.elites)])  # a nan comes last

    def predict(self, features: Tensor, event: Tensor) -> tuple[Tensor, Tensor]:
        """The elites' mean and std of the next features, both [e,B,F]."""
        mean, log_variance = self._change(features, event)
        std = (log_variance[self.elites] / 2).exp()
        return features + self.change_std * mean[self.elites], self.change_std * std

    def step(self, features: Tensor, event: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
        """Next features [B,F] by one elite per row, chosen by ``uniform`` [B] in [0,1), plus its
        std * noise [B,F].

        Two policies that are given the same uniform and noise meet the same luck: their difference
        is their own.
        """
        mean, std = self.predict(features, event)
        count = len(self.elites)
        elite = (uniform * count).long().clamp(max=count - 1)  # in fp32, uniform can round to 1
        row = torch.arange(len(features), device=features.device)
        return mean[elite, row] + std[elite, row] * noise

    def disagreement(self, features: Tensor, event: Tensor) -> Tensor:
        """The disagreement about an event, large where the data said little: rms over F of the std
        over elites of their mean changes, in units of ``change_std``, [B].
        """
        mean, _ = self._change(features, event)
        return mean[self.elites].var(0, correction=0).mean(-1).sqrt()


@torch.no_grad()
def imagined(
    actor: Actor,
    score: Score,
    model: Dynamics,
    starts: Tensor,
    horizon: int,
    noise: Noise,
    ends: Score | None = None,
    ended: float = 0.0,
) -> Tensor:
    """AM-Q of every start: sum_{h<H} w_h score(f_h, a_h) + (1 - w_h) ended: [S,F] -> [S], f_0 =
    start, a_h = actor(f_h, h), f_{h+1} ~ model, w_h = prod_{i<h} (1 - ends(f_i, a_i)).

    ends: the chance that an episode ends by itself with this decision (None: it never does);
    ``ended``: what a decision after that counts. Without it the sum goes on past a success, where
    nobody has ever been, and who succeeds sooner loses. ``noise`` names the S rows; what the model
    draws at h comes from ``noise.at(h)`` and nothing else, so two actors can be compared on the
    same luck. The horizon must reach the reward.
    """
    if horizon < 1:
        raise ValueError(f"the gate's horizon is {horizon}; valid is at least 1 decision")
    if len(noise) != len(starts):
        raise ValueError(
            f"there are {len(starts)} starts and noise for {len(noise)};"
            " each start needs its own row"
        )
    features, total, alive = starts, starts.new_zeros(len(starts)), starts.new_ones(len(starts))
    for h in range(horizon):
        event = actor(features, h)
        total = total + alive * score(features, event) + (1 - alive) * ended
        if ends is not None:
            alive = alive * (1 - ends(features, event))
        if h + 1 < horizon:
            rows = noise.at(torch.full_like(noise.group, h))
            draws = rows(MODEL, (1 + starts.shape[1],), starts.device).to(starts.dtype)
            uniform = (1 + torch.erf(draws[:, 0] / math.sqrt(2))) / 2
            features = model.step(features, event, uniform, draws[:, 1:])
    return total
