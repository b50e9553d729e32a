"""The pretended device of `tests.two_devices`, and every method on it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from genpolicy.chain import Trajectory
from genpolicy.cli.law_toys import small, toys
from genpolicy.config import leaves, parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON
from genpolicy.rollout import recorder
from genpolicy.training.experiment import train
from genpolicy.training.prepare import required
from genpolicy.training.requirements import World
from tests import toy_control
from tests.two_devices import DEVICE, TwoDevices


@pytest.fixture
def _two(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)
    with TwoDevices():
        yield


@pytest.mark.usefixtures("_two")
def test_operations_that_meet_both_devices_raise_and_others_give_the_numbers():
    host = torch.arange(3.0)
    there = host.to(DEVICE)
    for mistake in (
        lambda: torch.cat([host, there]),
        lambda: host + there,
        lambda: host[torch.tensor([0]).to(DEVICE)],
        lambda: torch.stack([host.sum(), there.sum()]),
        lambda: host.sum().add_(there.sum()),
        lambda: there.index_select(0, torch.tensor([0])),
        lambda: there.uniform_(generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError):
            mistake()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there * host.sum() + 1).tolist() == [1.0, 4.0, 7.0]
    assert there[torch.tensor([2])].tolist() == [2.0]
    assert torch.arange(3, device=there.device).cpu().tolist() == [0, 1, 2]
    assert torch.as_tensor(0.5, device=DEVICE).item() == 0.5
    there[0] = 5
    host.copy_(there)
    assert host.tolist() == [5.0, 1.0, 2.0]


@pytest.mark.usefixtures("_two")
def test_a_network_learns_on_the_pretended_device_as_on_the_cpu():
    ends = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        x = torch.randn(8, 3).to(device)
        for _ in range(3):
            optimizer.zero_grad()
            (network(x) - 1).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        assert all(p.device.type == torch.device(device).type for p in network.parameters())
        ends.append([p.detach().cpu() for p in network.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


STAGED = ("rl100", "uni_o4")
"""The methods whose six stages take an iteration each."""
WORLDS = [
    (method, world)
    for method in leaves.names("methods")
    for world in required(leaves.make("methods", {"name": method}, PERSON)).worlds
]


@pytest.mark.usefixtures("_two")
@pytest.mark.parametrize(("method", "world"), WORLDS)
def test_every_method_trains_on_a_device_that_is_not_the_cpu(tmp_path, method, world):
    trained(tmp_path, method, world)


def trained(folder: Path, method: str, world: World) -> None:
    """Trains a method on the first toy that it does not refuse, each of its stages once."""
    made = leaves.make("methods", {"name": method}, PERSON)
    iterations = 6 if method in STAGED else 1
    refused = []
    for number, toy in enumerate(toys(required(made), world, folder)):
        raw = {
            **toy.sections,
            "policy": {**toy.sections["policy"], "device": str(DEVICE)},
            "method": {"name": method, **small(made)},
            "budget": {"iterations": iterations},
            "eval": {"every": 0, "samples": 4, "episodes": 2},
            "output": str(folder / f"run-{number}"),
        }
        try:
            result = train(parse.parse(raw))
        except ConfigError as error:
            refused.append(str(error))
        else:
            assert result.summary["iterations"] == iterations
            return
    raise AssertionError(refused)


def on_its_device(trajectory: Trajectory) -> dict[str, torch.Tensor]:
    """The mistake: recorded tensors that stay where the policy drew them."""
    return {name: getattr(trajectory, name) for name in recorder.CHAIN}


@pytest.mark.usefixtures("_two")
@pytest.mark.parametrize("mistaken", [False, True])
def test_a_resumed_collection_joins_episodes_that_were_read_and_played(
    tmp_path, monkeypatch, mistaken
):
    policy = {"name": "mlp", "hidden": 8, "blocks": 1, "chunk": 2, "device": str(DEVICE)}
    run, _ = toy_control.prepared(tmp_path, policy=policy)
    if mistaken:
        monkeypatch.setattr(recorder, "_kept", on_its_device)
    with run:
        whole = run.collect(4, 1, keep=True).trajectory
        next((tmp_path / "run" / "episodes" / "1").glob("[0-9]*.pt")).unlink()
        if mistaken:
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same"):
                run.collect(4, 1, keep=True)
            return
        again = run.collect(4, 1, keep=True).trajectory
    assert again.x0.device == whole.x0.device == DEVICE
    assert again.x0.tolist() == whole.x0.tolist()
