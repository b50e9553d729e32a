"""Captioned pictures as examples: every one that is learned from must be an event of the model."""

import pytest
import torch
from torch import Tensor

from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Pairs
from genpolicy.contracts.task import Context
from genpolicy.models.toy import Toy
from genpolicy.rollout.examples import examples, paired, shown
from genpolicy.training.experiment import train
from tests import toy
from tests.methods.test_bc import SMALL, captioned


class Uneven:
    """Six pictures of 8 x 8 pixels, of which some have another height."""

    def __init__(self, heights: dict[int, int]) -> None:
        self.heights = heights

    def __len__(self) -> int:
        return 6

    def pictures(self, index: Tensor) -> tuple[Context, Tensor]:
        rows = index.tolist()
        pictures = [torch.full((3, self.heights.get(row, 8), 8), 0.5) for row in rows]
        return Context([f"caption {row}" for row in rows]), torch.stack(pictures)


@pytest.mark.parametrize("rows", [[4], [0, 4], [4, 0, 5], [4, 4]])
def test_a_picture_of_another_size_is_named_whatever_it_stands_beside(rows):
    uneven, even = Uneven({4: 16}), Uneven({})
    with pytest.raises(ConfigError, match=r"picture of row 4, 'caption 4', .*16 x 8") as raised:
        examples(uneven, Toy(), torch.tensor(rows))
    assert "\n" not in str(raised.value)
    _, event, _ = examples(even, Toy(), torch.tensor(rows))
    assert event.shape == (len(rows), 2, 4, 4), "control"
    examples(uneven, Toy(), torch.tensor([0, 1, 5]))  # control: the others


def test_captions_that_are_only_shown_are_told_alike():
    with pytest.raises(ConfigError, match="picture of row 4"):
        shown(Uneven({4: 16}), Toy(), torch.tensor([0, 4]))
    assert shown(Uneven({}), Toy(), torch.tensor([0, 4])).prompts[1] == "caption 4"


def test_a_damaged_picture_is_named_when_it_is_met(tmp_path):
    data = captioned(tmp_path / "pictures")
    (tmp_path / "pictures" / "dark-3.png").write_bytes(b"no picture")
    raw = toy.experiment(
        tmp_path, data=data, method={**SMALL, "batch": 32}, eval={"every": 0, "samples": 4}
    )
    with pytest.raises(ConfigError, match=r"row 15: .*dark-3\.png is no picture") as raised:
        train(parse.parse(raw))
    assert "\n" not in str(raised.value)


def test_an_error_that_is_no_pictures_fault_stays_what_it_is(monkeypatch):
    def exhausted(self, outputs):
        if len(outputs) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return honest(self, outputs)

    honest = Toy.event
    monkeypatch.setattr(Toy, "event", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        examples(Uneven({}), Toy(), torch.tensor([0, 1]))


class UnevenPairs(Uneven):
    """The same six pictures, each preferred to a darker one; ``others``: heights of those."""

    def __init__(self, heights: dict[int, int], others: dict[int, int]) -> None:
        super().__init__(heights)
        self.others = Uneven(others)

    def pairs(self, index: Tensor) -> tuple[Context, Tensor, Tensor]:
        return *self.pictures(index), self.others.pictures(index)[1] / 2


def test_pairs_are_their_captions_and_the_events_of_both_pictures():
    data, model = UnevenPairs({}, {}), Toy()
    assert isinstance(data, Pairs)
    assert not isinstance(Uneven({}), Pairs), "control"
    index = torch.tensor([3, 1])
    context, preferred, other = paired(data, model, index)
    assert list(context.prompts) == ["caption 3", "caption 1"]
    assert torch.equal(preferred, examples(data, model, index)[1]), "cloning sees the preferred"
    assert torch.equal(other, model.event(torch.full((2, 3, 8, 8), 0.25)))
    assert not torch.equal(preferred, other)


@pytest.mark.parametrize(("heights", "others"), [({4: 16}, {}), ({}, {4: 16})])
@pytest.mark.parametrize("rows", [[4], [0, 4], [4, 4]])
def test_either_picture_of_a_pair_is_named_where_it_is_no_event(heights, others, rows):
    data = UnevenPairs(heights, others)
    with pytest.raises(ConfigError, match=r"picture of row 4, 'caption 4', .*16 x 8"):
        paired(data, Toy(), torch.tensor(rows))
    paired(data, Toy(), torch.tensor([0, 1, 5]))  # control: the others
