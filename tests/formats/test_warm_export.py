"""A policy with a warm start is exported as two graphs, and the runtime goes on from its plans."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genpolicy.cli.evaluate_exported import runtime
from genpolicy.config.schema import ChainConfig
from genpolicy.formats import _graph, _parity
from genpolicy.formats import onnx as exporter
from genpolicy.formats._capture import Draws, decide, noise_shape
from genpolicy.policy.files import save_policy, saved
from genpolicy.policy.policy import ChainPolicy
from tests.formats.policies import DDPM, POLICIES, STATE, mlp, policy

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SAMPLERS: dict[str, dict[str, Any]] = {
    "rti": {
        "steps": 4,
        "kernel": DDPM,
        "execute": 1,
        "warm": {"name": "rti", "levels": [2, 0], "discrete_dims": [1]},
    },
    "rti without noise": {
        "steps": 4,
        "kernel": {"name": "mean", "kernel": DDPM},
        "execute": 1,
        "warm": {"name": "rti", "levels": [1, 0]},
    },
    "sdedit": {"steps": 3, "kernel": DDPM, "execute": 2, "warm": {"name": "sdedit", "steps": 1}},
}
DRAWS = {"rti": 4, "rti without noise": 1, "sdedit": 3}
"""Draws of the decision that draws most, here always the first one."""


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few observations, so that an export takes seconds."""
    torch.manual_seed(0)
    monkeypatch.setattr(_parity, "COUNTS", dict.fromkeys(_parity.COUNTS, 20))
    monkeypatch.setattr(_parity, "AT_ONCE", 20)


def exported(name: str, folder: Path) -> tuple[ChainPolicy, Path]:
    sampler = ChainConfig(**SAMPLERS[name])
    save_policy(policy(mlp(), **SAMPLERS[name]), {"name": "mlp"}, sampler, folder / "policy")
    found, out = saved(folder / "policy"), folder / "exported"
    exporter.onnx(found, out, data=None, task=None, instruction=None)
    return found.load(), out


def in_torch(acts: ChainPolicy, running: Any, seed: int, seen: list[torch.Tensor]) -> np.ndarray:
    """The actions of an episode, with the noise that the runtime draws, [H,n,D]."""
    draw, shape = runtime().noise.noise, running.manifest.noise
    every, plan = [], None
    for number, observation in enumerate(seen):
        noise = Draws(torch.from_numpy(draw(seed, number, shape))[None])
        with torch.no_grad():
            actions, plan = decide(acts, {STATE: observation[None, None]}, noise, "", plan)
        every.append(actions[0].numpy())
    return np.stack(every)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_runtime_goes_on_from_its_plans_as_the_policy_does(name: str, tmp_path: Path) -> None:
    acts, out = exported(name, tmp_path)
    running = runtime().Policy.load(out)
    running.reset(7)
    seen = list(40 * torch.rand(6, 3))
    got = np.stack([running.plan({STATE: one.numpy()}) for one in seen])
    wanted = in_torch(acts, running, 7, seen)
    assert np.abs(got - wanted).max() < 1e-4  # in units of the environment: its actions span 40
    # the control: a runtime that forgets its plan decides otherwise, but for the first time
    running.reset(7)
    forgot = []
    for one in seen:
        running._previous = None
        forgot.append(running.plan({STATE: one.numpy()}))
    assert np.array_equal(forgot[0], got[0])
    assert np.abs(np.stack(forgot) - got)[1:].max() > 0.1


@pytest.mark.parametrize("name", ["rti"])
def test_the_manifest_of_two_graphs(name: str, tmp_path: Path) -> None:
    acts, out = exported(name, tmp_path)
    assert {path.name for path in out.iterdir()} == {
        *("first.onnx", "later.onnx", "manifest.json", "parity.json", "latency.json")
    }
    manifest = json.loads((out / "manifest.json").read_text())
    state = {"input": "previous", "output": "plan", "first": "first", "later": "later"}
    assert manifest["state"] == {**state, "shape": [4, 2]}
    first, later = (manifest["graphs"][graph] for graph in ("first", "later"))
    assert list(first["inputs"]) == [STATE, "noise"]
    assert list(later["inputs"]) == [STATE, "previous", "noise"]
    for graph in (first, later):
        assert {key: value["shape"] for key, value in graph["outputs"].items()} == {
            "actions": [1, 1, 2],
            "plan": [1, 4, 2],
        }
    assert manifest["action"]["planned"] == 4
    assert manifest["action"]["executed"] == 1
    assert manifest["evaluations"] == acts.warm.evaluations == 2  # type: ignore[union-attr]
    assert manifest["parity"]["largest"] <= manifest["parity"]["bound"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_noise_has_room_for_the_decision_that_draws_most(name: str) -> None:
    acts = policy(mlp(), **SAMPLERS[name])
    assert noise_shape(acts) == (DRAWS[name], 4, 2)


def test_parity_sees_what_a_graph_does_with_the_plan(tmp_path: Path) -> None:
    """A graph whose later decisions go on from another plan is not the policy."""
    acts, out = exported("rti", tmp_path)
    first, later = (_graph.session(out / f"{name}.onnx") for name in ("first", "later"))

    class Forgetful:
        def run(self, names: Any, feed: dict[str, np.ndarray]) -> Any:
            return later.run(names, {**feed, "previous": np.zeros_like(feed["previous"])})

    shape = noise_shape(acts)
    assert _parity.measure([first, later], acts, shape, None).holds
    assert not _parity.measure([first, Forgetful()], acts, shape, None).holds


def test_actions_that_are_not_carried_out_are_not_exported() -> None:
    """`execute` without a warm start: fewer actions of the same plan."""
    acts = policy(mlp(), steps=2, kernel=DDPM, execute=1)
    seen, noise = {STATE: torch.rand(1, 1, 3)}, torch.randn(1, *noise_shape(acts))
    with torch.no_grad():
        actions, _ = decide(acts, seen, Draws(noise))
        every, _ = decide(replace(acts, execute=None), seen, Draws(noise))
    assert actions.shape == (1, 1, 2)
    assert torch.equal(actions, every[:, :1])


@pytest.mark.slow
def test_a_warm_start_with_best_of_n_exports(tmp_path: Path) -> None:
    best = POLICIES["best of 4"]()
    warm = policy(best.model, steps=3, kernel=DDPM, execute=1, warm=SAMPLERS["sdedit"]["warm"])
    acts = replace(best, warm=warm.warm, execute=1)
    shape = noise_shape(acts)
    files = [tmp_path / f"{name}.onnx" for name in ("first", "later")]
    for file in files:
        exporter.write_policy(acts, shape, file)
    parity = _parity.measure([_graph.session(file) for file in files], acts, shape, None)
    assert parity.holds, parity.told()
