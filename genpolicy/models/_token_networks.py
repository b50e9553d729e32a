"""An autoregressive network of tokens: what it says of a dim depends on what was seen and on the
tokens of the dims before.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from genpolicy.models import _mlp_networks as networks

TOP = 1 - 2.0**-22
"""The largest uniform number: times a sum of probabilities near 1 it rounds to less than the sum in
fp32, so that no token without probability is drawn.
"""
INSIDE = 1e-3
"""Least distance of what is drawn from the edges of its bin, in bins: in fp32 it has the same
token again.
"""


class Autoregressive(nn.Module):
    """logits_d = readout(trunk(h_d)), h_d = W s + place_d + sum_{j<d} V_j embed(token_j).

    One trunk of residual blocks serves all dims. What was said before enters as a sum, in which
    every dim has a matrix V_j of its own, as in NADE (Larochelle and Murray, 2011): one dim more
    costs one product, with no attention and no masks, and neighbouring tokens are embedded alike
    (sines and cosines of their numbers).
    """

    table: Tensor

    def __init__(self, dims: int, bins: int, condition: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.enter = nn.Linear(condition, hidden)
        self.place = nn.Parameter(torch.randn(dims, hidden) / 2)
        self.said = nn.Parameter(torch.randn(dims - 1, networks.TIME, hidden) / networks.TIME**0.5)
        self.blocks = networks.residual_blocks(hidden, blocks)
        self.leave = nn.Linear(hidden, bins)
        table = networks.embed(torch.arange(bins).double()).float()
        self.register_buffer("table", table, persistent=False)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """The logits of every dim given those before it: tokens [B,D], condition [B,C] ->
        [B,D,bins].
        """
        said = torch.einsum("bdf,dfh->bdh", self.table[tokens[:, :-1]], self.said)
        before = functional.pad(said.cumsum(1), (0, 0, 1, 0))
        return self._read(self.enter(condition)[:, None] + before + self.place)

    def generate(self, uniform: Tensor, condition: Tensor) -> Tensor:
        """Draws the dims one after another by their inverse distribution functions: uniform numbers
        [B,D] in [0,1], condition [B,C] -> places in units of bins, [B,D], whose whole parts are the
        tokens.

        Within its bin a place is what is left of its uniform number, so that it is continuous and
        rises with it, and is distributed evenly over the bin.
        """
        hidden = self.enter(condition)
        places: list[Tensor] = []
        for dim in range(uniform.shape[1]):
            token, within = drawn(self._read(hidden + self.place[dim]), uniform[:, dim])
            places.append(token + within)
            if dim < len(self.said):
                hidden = hidden + self.table[token] @ self.said[dim]
        return torch.stack(places, 1)

    def _read(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(functional.silu(hidden))


def drawn(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the distribution function passes a uniform number, and which share of the
    token's probability lies below that number: logits [B,bins], uniform [B] -> [B] and [B].
    """
    probability = logits.softmax(-1)
    summed = probability.cumsum(-1)
    level = uniform.clamp(max=TOP)[:, None] * summed[:, -1:]
    token = (summed <= level).sum(1, keepdim=True)
    mine = probability.gather(1, token)
    within = (level - (summed.gather(1, token) - mine)) / mine
    return token[:, 0], within.clamp(INSIDE, 1 - INSIDE)[:, 0]
