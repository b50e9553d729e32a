"""Actors of bounded range: Gaussians that a tanh squashes, and the weight of their entropy (SAC,
arXiv 1801.01290, with the learned weight of 1812.05905).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genpolicy.chain.values import Gaussian
from genpolicy.learning.critic import Standard

LOW, HIGH = -5.0, 1.0
"""Bounds of log std, before the squashing."""


@dataclass(frozen=True)
class Squashed:
    """size tanh(x), x ~ N(mean, std^2), over [B,*E]."""

    before: Gaussian
    size: float

    @property
    def mode(self) -> Tensor:
        """size tanh(mean), [B,*E]."""
        return self.size * self.before.mean.tanh()

    def sample(self, noise: Tensor) -> Tensor:
        """The draw from standard normal noise [B,*E]."""
        return self.size * self.before.sample(noise).tanh()

    def drawn(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The draw and the log of each number's density, [B,*E] both; a row's is their sum.

        log N(x) - log(1 - tanh(x)^2) - log size.
        """
        x = self.before.sample(noise)
        slope = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2)
        density = self.before.log_prob(x, reduce="none") - slope - math.log(self.size)
        return self.size * x.tanh(), density


class SquashedActor(nn.Module):
    """A `Squashed` over events of ``dims`` numbers, by an MLP of two hidden layers with LayerNorm:
    Float[B,inputs] -> over [B,*E]. At first its mean is 0, and the std before the squashing is
    ``std``.

    What is seen is standardised (`scale`) as critics do it. A LayerNorm in the place of that would
    hide from the actor what all numbers have in common: of one number it leaves 0, of two a sign.
    """

    def __init__(
        self, inputs: int, dims: int, size: float, hidden: int = 256, std: float = 0.5
    ) -> None:
        super().__init__()
        self.size = size
        self.scale = Standard(inputs)
        self.network = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
        )
        self.readout = nn.Linear(hidden, 2 * dims)
        nn.init.zeros_(self.readout.weight)
        share = 2 * (math.log(std) - LOW) / (HIGH - LOW) - 1
        nn.init.zeros_(self.readout.bias[:dims])
        nn.init.constant_(self.readout.bias[dims:], math.atanh(share))

    def forward(self, seen: Tensor, shape: tuple[int, ...]) -> Squashed:
        mean, log_std = self.readout(self.network(self.scale(seen))).chunk(2, 1)
        # brought between its bounds by a tanh, so that its gradient ends nowhere
        log_std = LOW + (HIGH - LOW) * (log_std.tanh() + 1) / 2
        std = log_std.exp().view(-1, *shape)
        return Squashed(Gaussian(mean.view(-1, *shape), std), self.size)


class EntropyWeight(nn.Module):
    """alpha, which rises while the entropy of an actor is below ``target`` (nats), and falls while
    it is above.
    """

    def __init__(self, alpha: float, target: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha)))
        self.target = target

    def loss(self, log_prob: Tensor, worth: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of actor and alpha, [b], and its metrics [b]:

        alpha log_prob - worth + log alpha (H - target),  H = - log_prob;

        alpha and H as constants where they are not what is learned. log_prob, worth [b]: of drawn
        actions.
        """
        alpha, entropy = self.log_alpha.exp().detach(), -log_prob.detach()
        loss = alpha * log_prob - worth + self.log_alpha * (entropy - self.target)
        return loss, {"entropy": entropy, "alpha": alpha.expand(len(worth))}
