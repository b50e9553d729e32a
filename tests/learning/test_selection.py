"""Choosing among candidates: the highest, and draws with softmax probabilities."""

import torch

from genpolicy.learning.selection import drawn, highest, standardised

GRID = 10_000


def frequencies(logits: torch.Tensor) -> torch.Tensor:
    """How often each of the N is drawn, by the midpoints of a grid of uniform numbers, [N]."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    index = drawn(logits.expand(GRID, -1), uniform)
    return index.bincount(minlength=logits.shape[-1]).double() / GRID


def test_the_highest_by_brute_force() -> None:
    values = torch.randn(5, 32)
    for count in (0, 1, 7, 32):
        found = highest(values, count)
        by_hand = [sorted(range(32), key=lambda n: -row[n])[:count] for row in values.tolist()]
        assert found.tolist() == by_hand
    equal = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]])
    assert highest(equal, 4).tolist() == [[1, 2, 4, 0]], "of equals the earlier one"


def test_the_highest_are_found_without_a_stable_sort_which_onnx_lacks() -> None:
    def sorted_ops(choose) -> list[str]:
        class Choice(torch.nn.Module):
            def forward(self, values: torch.Tensor) -> torch.Tensor:
                return choose(values)

        graph = torch.export.export(Choice(), (torch.randn(3, 5),)).graph
        return [str(node.target) for node in graph.nodes if "sort" in str(node.target)]

    assert not sorted_ops(lambda values: highest(values, 2))
    assert sorted_ops(lambda values: values.sort(dim=1, stable=True).indices), "control"


def test_draws_have_the_probabilities_of_a_softmax() -> None:
    logits = torch.tensor([0.3, -2.0, 1.5, 1.5, 0.0])
    assert torch.allclose(frequencies(logits), logits.double().softmax(0), atol=2 / GRID)
    wrong = (logits / 2).double().softmax(0)
    assert not torch.allclose(frequencies(logits), wrong, atol=0.01), "control: another temperature"


def test_a_draw_is_an_index_at_both_ends() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert drawn(logits, torch.zeros(1)).tolist() == [0]
    below_one = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert drawn(logits, below_one).tolist() == [2]
    last = torch.tensor([[1.0, 0.0, -1000.0]])
    assert drawn(last, below_one)[0] < 3
    never = frequencies(torch.tensor([0.0, -torch.inf, 1.0]))
    assert never[1] == 0


def test_standardised_values_do_not_know_the_size_of_rewards() -> None:
    values = torch.randn(4, 10, dtype=torch.float64)
    found = standardised(values)
    assert torch.allclose(found.mean(1), torch.zeros(4).double(), atol=1e-12)
    assert torch.allclose(found.std(1, correction=0), torch.ones(4).double())
    assert torch.allclose(standardised(1000 * values - 7), found)
    raw = [(scale * values).softmax(1) for scale in (1, 1000)]
    assert not torch.allclose(*raw, atol=0.1), "control: softmax of the values themselves"
    assert torch.equal(standardised(torch.full((2, 3), 5.0)), torch.zeros(2, 3))
