"""The linear layer of M networks of equal shape, evaluated together."""

import torch
from torch import Tensor, nn


class EnsembleLinear(nn.Module):
    """M independent linear maps in one batched product: Float[M,B,I] -> Float[M,B,O].

    Each member begins as an nn.Linear of its own would: weight and bias uniform in +-1/sqrt(I).
    """

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)
