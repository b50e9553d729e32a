"""Settings of parts that a stranger wrote: read strictly, or refused by name before anything acts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genpolicy.config.errors import ConfigError
from genpolicy.learning.critic import Critic, Support
from genpolicy.models.mlp import MLP
from genpolicy.policy.parts.best_of import BestOf
from genpolicy.policy.parts.editor import Editor
from genpolicy.policy.parts.noise_actor import NoiseActor
from genpolicy.policy.parts.refiner import Refiner
from tests.toy_control import Recorded


@pytest.fixture(scope="module")
def model() -> MLP:
    made = MLP(hidden=16, blocks=1, chunk=2)
    made.initialise(Recorded(episodes=8))
    return made


def parts() -> dict[str, tuple[str, Any]]:
    """A part of each kind that has settings, with the file that it keeps them in."""
    critic = Critic(4, 4, members=2, hidden=8, support=Support(0.0, 1.0))
    return {
        "refiner": ("refiner.json", Refiner(3, 0.1, refined=2)),
        "editor": ("editor.json", Editor(4, 4, 0.1, bound=2.0, edited=3, hidden=8)),
        "noise_actor": ("noise_actor.json", NoiseActor(4, (2, 2), 1.5, hidden=8)),
        "best_of": ("judge.json", BestOf(critic, 0.5)),
    }


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        ("refiner", {"steps": "three"}, "steps is 'three'"),
        ("refiner", {"steps": -1}, "steps is -1"),
        ("refiner", {"rate": float("nan")}, "rate is nan"),
        ("refiner", {"low": 2.0}, "low is 2"),
        ("refiner", {"speed": 1}, "no key 'speed'"),
        ("editor", {"size": -0.1}, "size is -0.1"),
        ("editor", {"bound": float("nan")}, "bound is nan"),
        ("editor", {"edited": 0}, "edited is 0"),
        ("editor", {"hidden": 2**30}, "size mismatch"),
        ("noise_actor", {"bound": float("inf")}, "bound is inf"),
        ("noise_actor", {"shape": []}, "shape is"),
        ("noise_actor", {"shape": [2, "two"]}, "shape is"),
        ("noise_actor", {"hidden": 2**30}, "size mismatch"),
        ("best_of", {"pessimism": "half"}, "pessimism is 'half'"),
        ("best_of", {"pessimism": float("nan")}, "pessimism is nan"),
        ("best_of", {"layers": 10**6}, "layers is 1000000"),
        ("best_of", {"members": 2**30}, "size mismatch"),
        ("best_of", {"support": {"low": 1.0, "high": 0.0}}, "support"),
    ],
)
def test_wrong_settings_are_refused_by_name(
    model: MLP, tmp_path: Path, kind: str, changed: dict[str, Any], said: str
) -> None:
    """Sizes that no file holds take no memory before they are refused."""
    file, made = parts()[kind]
    made.save(tmp_path)
    type(made).load(tmp_path, model)  # control: as it was saved
    settings = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**settings, **changed}))
    with pytest.raises((ConfigError, RuntimeError), match=said):
        type(made).load(tmp_path, model)


@pytest.mark.parametrize("kind", ["editor", "noise_actor"])
def test_a_network_comes_back_as_it_was_and_draws_nothing(
    model: MLP, tmp_path: Path, kind: str
) -> None:
    _, made = parts()[kind]
    made.save(tmp_path)
    drawn = torch.get_rng_state()
    again = type(made).load(tmp_path, model)
    assert torch.equal(drawn, torch.get_rng_state())
    assert again.settings == made.settings
    for one, other in zip(made.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert other.requires_grad
        assert other.device == model.device
