"""Experts and policies record data sets:
the same seed gives the same numbers, and failures are an expert's alone to hide.
"""

import json
from pathlib import Path

import pytest
import torch

from genpolicy.config.errors import ConfigError
from genpolicy.datasets.lerobot_dataset import LeRobotDataset
from genpolicy.models.mlp import MLP
from genpolicy.rollout.demonstrations import demonstrate
from tests.datasets.cart import Cart, start

CART = {"name": "tests.datasets.cart:Cart"}


def columns(folder: Path) -> dict[str, bytes]:
    return {
        name: value.numpy().tobytes() for name, value in LeRobotDataset(str(folder)).columns.items()
    }


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path):
    for name, seed, noise in (
        ("a", 5, 0.1),
        ("b", 5, 0.1),
        ("other seed", 6, 0.1),
        ("other noise", 5, 0.2),
    ):
        done = demonstrate(CART, tmp_path / name, episodes=3, noise=noise, seed=seed)
        assert (done.episodes, done.successes) == (3, 3)
    assert columns(tmp_path / "a") == columns(tmp_path / "b")
    assert columns(tmp_path / "a")["action"] != columns(tmp_path / "other seed")["action"]
    assert columns(tmp_path / "a")["action"] != columns(tmp_path / "other noise")["action"]


def test_failures_of_the_expert_are_dropped(tmp_path: Path):
    task = {**CART, "limit": 8}  # what begins beyond .85 can't arrive
    done = demonstrate(task, tmp_path / "set", episodes=4, noise=0.0, seed=0)
    arriving = [seed for seed in range(20) if Cart(limit=8).demonstrate(seed, 0.0).success][:4]
    assert done.tried == arriving[-1] + 1 > 4
    data = LeRobotDataset(str(tmp_path / "set"))
    firsts = data.columns["observation.state"][data.columns["observation.state"][:, 1] == 0, 0]
    torch.testing.assert_close(firsts, torch.tensor([start(seed) for seed in arriving]))
    made = json.loads((tmp_path / "set" / "meta" / "genpolicy.json").read_text())
    assert made["task"] == task
    assert (made["seed"], made["tried"], made["frames"]) == (0, done.tried, len(data))


@pytest.mark.parametrize(
    ("task", "settings", "says"),
    [
        ({**CART, "clumsy": True}, {}, "succeeded in 0 of 10"),
        ({**CART, "expert": False}, {}, "no expert"),
        ({"name": "prompts", "prompts": __file__}, {}, "no environments"),
        (CART, {"episodes": 0}, "at least 1"),
        (CART, {"noise": -1.0}, "at least 0"),
        (CART, {"noise": 0.1, "policy": "somewhere"}, "0 for a policy"),
        (CART, {"policy": "/nowhere"}, "no such folder"),
    ],
)
def test_what_does_not_work_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, task, settings: dict, says: str
):
    with pytest.raises(ConfigError, match=says):
        demonstrate(task, tmp_path / "set", **{"episodes": 2, "noise": 0.0, "seed": 0, **settings})
    assert not any(tmp_path.iterdir())
    (tmp_path / "set").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        demonstrate(CART, tmp_path / "set", episodes=2, noise=0.0, seed=0)


def test_a_policy_records_what_it_does_with_its_failures(tmp_path: Path):
    demonstrate(CART, tmp_path / "set", episodes=3, noise=0.0, seed=0)
    model = MLP(chunk=5, hidden=8)  # 5 does not divide the limit of 12: the last chunk is cut
    model.initialise(LeRobotDataset(str(tmp_path / "set")))
    (tmp_path / "policy").mkdir()
    model.save(tmp_path / "policy")
    sampler = {"steps": 2, "kernel": {"name": "ddim", "eta": 1.0}}
    description = {"policy": {"name": "mlp"}, "chain": sampler}
    (tmp_path / "policy" / "genpolicy.json").write_text(json.dumps(description))
    for name in ("a", "b"):
        done = demonstrate(
            CART, tmp_path / name, episodes=25, noise=0.0, seed=9, policy=str(tmp_path / "policy")
        )
        assert (done.episodes, done.tried) == (25, 25)
    assert columns(tmp_path / "a") == columns(tmp_path / "b")
    data = LeRobotDataset(str(tmp_path / "a"))
    state, action = data.columns["observation.state"], data.columns["action"].clamp(-0.1, 0.1)
    counts = data.episode.bincount()
    assert torch.equal(state[:, 1], torch.cat([torch.arange(c) for c in counts]).float())
    torch.testing.assert_close(
        state[state[:, 1] == 0, 0], torch.tensor([start(9 + e) for e in range(25)])
    )
    inside = state[1:, 1] > 0
    torch.testing.assert_close((state[:-1, 0] + action[:-1, 0])[inside], state[1:, 0][inside])
    succeeded = [bool(data.columns["next.success"][data.episode == e].any()) for e in range(25)]
    assert done.successes == sum(succeeded)
    assert all(counts[e] == 12 for e in range(25) if not succeeded[e])
