"""Several data sets as one: frames, episodes, statistics, and what does not fit."""

import pytest
import torch

from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON
from genpolicy.contracts.dataset import Merged
from genpolicy.training.build import make_data
from tests.rl100_toy import Outcomes


def parts():
    return Outcomes(episodes=3, skill=0.3), Outcomes(episodes=4, skill=0.6)


def test_a_row_is_its_own_data_sets_row():
    one, two = parts()
    both = Merged([one, two], ["one", "two"])
    assert len(both) == len(one) + len(two)
    index = torch.tensor([len(one) + 2, 0, len(one) - 1, len(one)])
    context, actions, pad = both.rows(index, 2, range(3))
    for row, (data, frame) in enumerate([(two, 2), (one, 0), (one, len(one) - 1), (two, 0)]):
        own, chunk, outside = data.rows(torch.tensor([frame]), 2, range(3))
        for name, value in own.observation.items():
            assert torch.equal(context.observation[name][row], value[0])
        assert torch.equal(actions[row], chunk[0])
        assert torch.equal(pad[row], outside[0])
    assert pad[2].any(), "an episode does not go on in the next data set"


def test_episodes_stay_apart_and_statistics_are_of_all_frames():
    one, two = parts()
    for part in (one, two):  # the toy's own divide by n - 1; a LeRobotDataset's by n
        seen, chunk, _ = part.rows(torch.arange(len(part)), 1, range(1))
        values = {
            **{name: value[:, 0] for name, value in seen.observation.items()},
            "action": chunk[:, 0],
        }
        part.stats = {
            name: {**part.stats[name], "std": v.std(0, correction=0), "mean": v.mean(0)}
            for name, v in values.items()
        }
    both = Merged([one, two], ["one", "two"])
    assert len(both.episode.unique()) == 7
    seen, chunk, _ = both.rows(torch.arange(len(both)), 1, range(1))
    for name, values in {
        **{n: v[:, 0] for n, v in seen.observation.items()},
        "action": chunk[:, 0],
    }.items():
        assert torch.allclose(both.stats[name]["mean"], values.mean(0), atol=1e-5)
        assert torch.allclose(both.stats[name]["std"], values.std(0, correction=0), atol=1e-4)
        assert torch.equal(both.stats[name]["max"], values.amax(0))
        plain = (one.stats[name]["mean"] + two.stats[name]["mean"]) / 2
        assert not torch.allclose(both.stats[name]["mean"], plain, atol=1e-5), (
            "control: frames count, not data sets"
        )


def test_what_does_not_fit_is_told():
    one, two = parts()
    two.fps = one.fps + 1
    with pytest.raises(ValueError, match="do not fit together"):
        Merged([one, two], ["one", "two"])
    with pytest.raises(ConfigError, match="empty list"):
        make_data([], PERSON)
    with pytest.raises(ConfigError):
        make_data(["there/is/no/such/folder"], PERSON)


def test_a_list_in_the_data_section():
    section = {"name": "tests.rl100_toy:Outcomes", "episodes": 2}
    raw = {"policy": "mlp", "task": "metaworld", "method": "bc", "data": [section, section]}
    data = make_data(parse.parse(raw).data, PERSON)
    assert isinstance(data, Merged)
    assert len(data.parts) == 2
