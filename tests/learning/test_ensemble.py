"""EnsembleLinear: M linear layers that know nothing of each other."""

import torch
from torch import nn

from genpolicy.learning.ensemble import EnsembleLinear


def test_every_member_is_a_linear_layer():
    layer, x = EnsembleLinear(3, 5, 2), torch.randn(3, 7, 5)
    for member, output in enumerate(layer(x)):
        by_hand = nn.functional.linear(x[member], layer.weight[member].T, layer.bias[member, 0])
        assert torch.allclose(output, by_hand, atol=1e-6)


def test_members_begin_apart_and_as_linear_does():
    torch.manual_seed(0)
    layer, linear = EnsembleLinear(4, 100, 50), nn.Linear(100, 50)
    for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
        assert 0.09 < float(ours.detach().abs().max()) <= 0.1
        assert abs(float(ours.detach().std() / theirs.detach().std()) - 1) < 0.15
    assert not torch.equal(layer.weight[0], layer.weight[1])


def test_a_members_loss_moves_that_member_alone():
    layer = EnsembleLinear(3, 5, 2)
    layer(torch.randn(3, 7, 5))[1].square().sum().backward()
    moved = [bool(layer.weight.grad[m].abs().max() > 0) for m in range(3)]
    assert moved == [False, True, False]
