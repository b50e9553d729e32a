"""Policies saved before their parts had a contract, in base/ and judge/, act as they did."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import ChainConfig
from genpolicy.learning.critic import Critic
from genpolicy.models.mlp import MLP
from genpolicy.policy.files import load, save_policy, saved
from genpolicy.policy.parts.base import Base
from genpolicy.policy.parts.best_of import BestOf
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from tests.toy_control import Recorded

SAMPLER = ChainConfig(steps=4, kernel={"name": "ddim", "eta": 1.0}, window=(2, 4))
ROWS = 6


def network(seed: int) -> MLP:
    torch.manual_seed(seed)
    made = MLP(hidden=16, blocks=1, chunk=2)
    made.initialise(Recorded(episodes=8))
    for parameter in made.trainable().values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def policy_of(*parts: str) -> ChainPolicy:
    """A policy with another network as its base, or that picks one of four samples, or both."""
    made = make_policy(network(0), SAMPLER)
    if "base" in parts:
        made = made.attach("base", Base.of(network(1), float(made.chain.grid[2])))
    if "best_of" in parts:
        torch.manual_seed(2)
        critic = Critic(4, 4, members=2, hidden=8)
        made = make_policy(made.model, replaced(4), {**made.parts, "best_of": BestOf(critic, 1.0)})
    return made


def replaced(best_of: int) -> ChainConfig:
    return ChainConfig(**{**asdict(SAMPLER), "best_of": best_of})


def written_as_before(policy: ChainPolicy, folder: Path) -> None:
    """Write genpolicy.json without parts, the base as a network of its own,
    the judge's two files.
    """
    folder.mkdir()
    policy.model.save(folder)
    description = {"policy": {"name": "mlp"}, "chain": asdict(replaced(policy.best_of))}
    if "base" in policy.parts:
        description["base_above"] = policy.parts["base"].above
        (folder / "base").mkdir()
        network(1).save(folder / "base")
    if "best_of" in policy.parts:
        (folder / "judge").mkdir()
        policy.parts["best_of"].save(folder / "judge")
    (folder / "genpolicy.json").write_text(json.dumps(description))


def acted(policy: ChainPolicy) -> torch.Tensor:
    condition = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(3))
    return policy.sample(condition, Noise.rows(0, 1, torch.arange(ROWS), 1)).x0


@pytest.mark.parametrize("parts", [(), ("base",), ("best_of",), ("base", "best_of")], ids=str)
def test_an_old_folder_acts_as_the_policy_that_was_saved(tmp_path: Path, parts: tuple[str, ...]):
    policy = policy_of(*parts)
    written_as_before(policy, tmp_path / "old")
    loaded = load(tmp_path / "old")
    assert list(loaded.parts) == list(parts)
    assert torch.equal(acted(loaded), acted(policy))
    for name in parts:  # control: without the part it is another policy
        others = {other: part for other, part in policy.parts.items() if other != name}
        without = make_policy(policy.model, replaced(4 if "best_of" in others else 1), others)
        assert not torch.allclose(acted(without), acted(policy), atol=1e-3)


def test_it_is_saved_again_as_policies_are_now(tmp_path: Path):
    policy = policy_of("base", "best_of")
    written_as_before(policy, tmp_path / "old")
    found = saved(tmp_path / "old")
    save_policy(found.load(), found.policy, found.sampler, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new/parts").iterdir()} == {"base", "best_of"}
    assert not (tmp_path / "new/base").exists()
    assert not (tmp_path / "new/judge").exists()
    assert torch.equal(acted(load(tmp_path / "new")), acted(policy))


def test_an_old_judge_that_is_damaged_is_told(tmp_path: Path):
    written_as_before(policy_of("best_of"), tmp_path / "old")
    (tmp_path / "old/judge/judge.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"part 'best_of' in .*old.judge is damaged"):
        load(tmp_path / "old")
