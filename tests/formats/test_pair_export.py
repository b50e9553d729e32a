"""SmolVLA and pi0 are exported as a prefix and its expert, and are told what to do by tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genpolicy.cli.evaluate_exported import runtime
from genpolicy.cli.main import main
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.formats import _graph, _pair, _parity
from genpolicy.formats import onnx as exporter
from genpolicy.formats._capture import Draws, blank, captured, decide, noise_shape
from genpolicy.models.lerobot_flow import LeRobotFlow
from genpolicy.policy.files import load
from genpolicy.policy.policy import ChainPolicy
from tests import lerobot_tiny_vla as tiny
from tests.formats.policies import ODE, mlp, policy

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

RED, BLUE = tiny.PROMPTS
STATE = "observation.state"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few observations, so that an export takes seconds."""
    torch.manual_seed(0)
    monkeypatch.setattr(_parity, "COUNTS", dict.fromkeys(_parity.COUNTS, 10))
    monkeypatch.setattr(_parity, "AT_ONCE", 10)


def acting(family: str, **sampler: Any) -> ChainPolicy:
    """A policy of LeRobot's own class, tiny. Needs `tests.lerobot_tiny_vla.sizes`."""
    reader = None if family == "smolvla" else tiny.words()
    model = LeRobotFlow(str(tiny.saved(family)), device="cpu", tokenizer=reader)
    return policy(model, **{"steps": 2, "kernel": ODE, **sampler})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["smolvla", "pi0"])
def test_the_pair_acts_as_the_policy_does_whatever_it_is_told(family: str, tmp_path: Path) -> None:
    with tiny.sizes():
        acts = acting(family)
        shape = noise_shape(acts)
        entries, (pair,), told = exporter.written(acts, shape, tmp_path, RED, "fp32")
        assert list(entries) == ["prefix", "expert"]
        # the expert sees no picture and no word, and the state only where the policy has it there
        takes = entries["expert"]["inputs"].keys() - entries["prefix"]["outputs"].keys()
        assert takes == ({"noise"} if family == "smolvla" else {"noise", STATE})
        assert (STATE in entries["prefix"]["inputs"]) == (family == "smolvla")
        assert told.keys() <= entries["prefix"]["inputs"].keys()
        parity = _parity.measure([pair], acts, shape, None, RED)
        assert parity.holds, parity.told()
        # told otherwise it acts as the policy that is told so, and no longer as the one before
        other = _pair.Pair(pair.prefix, pair.expert, exporter.tokens(acts, BLUE))
        assert _parity.measure([other], acts, shape, None, BLUE).holds
        assert not _parity.measure([other], acts, shape, None, RED).holds


@pytest.mark.slow
def test_parity_sees_an_expert_that_gets_another_cache(tmp_path: Path) -> None:
    with tiny.sizes():
        acts = acting("smolvla", steps=1)
        shape = noise_shape(acts)
        _, (pair,), told = exporter.written(acts, shape, tmp_path, RED, "fp32")

        class Swapped:
            """A prefix that gives keys and values of another layer."""

            def get_inputs(self) -> Any:
                return pair.prefix.get_inputs()

            def get_outputs(self) -> Any:
                return pair.prefix.get_outputs()

            def run(self, names: Any, feed: Any) -> Any:
                one, two, three, four, *rest = pair.prefix.run(names, feed)
                return [three, four, one, two, *rest]

        swapped = _pair.Pair(Swapped(), pair.expert, told)
        assert not _parity.measure([swapped], acts, shape, None, RED).holds


@pytest.mark.slow
def test_a_vision_language_policy_with_a_warm_start_has_a_prefix_and_two_experts(
    tmp_path: Path,
) -> None:
    warm = {"name": "sdedit", "steps": 1}
    with tiny.sizes():
        acts = acting("pi0", execute=1, warm=warm)
        shape = noise_shape(acts)
        entries, pairs, _ = exporter.written(acts, shape, tmp_path, RED, "fp32")
        assert list(entries) == ["prefix", "first", "later"]
        parity = _parity.measure(pairs, acts, shape, None, RED)
        assert parity.holds, parity.told()
        assert not _parity.measure([pairs[0], pairs[0]], acts, shape, None, RED).holds


def test_padded_tokens_say_the_same() -> None:
    """Tokens of every instruction have the same shapes, and change no decision."""
    acts = load("assets/point-smolvla", steps=1)
    model: Any = acts.model
    words = {told: model.words(told) for told in ("go", "go to the red circle")}
    shapes = [{name: value.shape for name, value in one.items()} for one in words.values()]
    assert shapes[0] == shapes[1]
    seen = {name: torch.rand_like(value) for name, value in blank(model, 1).items()}
    drawn: Any = Draws(torch.randn(1, *noise_shape(acts)))
    with torch.no_grad():
        for told, padded in words.items():
            plain = model.encode(Context([told], seen))
            assert (
                len(padded["observation.language.tokens"][0])
                > plain.batch["observation.language.tokens"].shape[1]
            )
            there = acts.sample(model.told(plain, padded), drawn).x0
            wanted = decide(acts, seen, drawn, told)[1]
            assert torch.allclose(there, wanted, atol=1e-5)
    # the control: words that are not the same decide otherwise
    with torch.no_grad():
        other = acts.sample(model.told(plain, words["go"]), drawn).x0
    assert not torch.allclose(other, wanted, atol=1e-3)


@pytest.mark.slow
def test_the_shipped_smolvla_on_the_controller(tmp_path: Path) -> None:
    words = ["--instruction", "go to the red circle", "--steps", "1"]
    out = tmp_path / "out"
    assert main(["export", "assets/point-smolvla", "--out", str(out), *words]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["instruction"]["text"] == words[1]
    assert manifest["parity"]["largest"] < 1e-5
    acts = load("assets/point-smolvla", steps=1)
    running = runtime().Policy.load(out)
    seen = {name: torch.rand_like(value) for name, value in blank(acts.model, 1).items()}  # type: ignore[arg-type]
    frame = {name: value[0, 0].numpy() for name, value in seen.items()}

    def in_torch(told: str) -> np.ndarray:
        drawn = runtime().noise.noise(0, 0, running.manifest.noise)
        with torch.no_grad():
            return decide(acts, seen, Draws(torch.from_numpy(drawn)[None]), told)[0][0].numpy()

    red = running.plan(frame)
    np.testing.assert_allclose(red, in_torch("go to the red circle"), atol=1e-4)
    running.reset()
    running.instruct(exporter.tokens(acts, "go to the blue square"))
    blue = running.plan(frame)
    np.testing.assert_allclose(blue, in_torch("go to the blue square"), atol=1e-4)
    assert np.abs(blue - red).max() > 1e-2  # the control


@pytest.mark.slow
def test_pi05_is_refused_and_its_reason_is_said(tmp_path: Path) -> None:
    with tiny.sizes():
        acts = acting("pi05", steps=1)
        shape = noise_shape(acts)
        for made in (
            lambda: exporter.written(acts, shape, tmp_path, RED, "fp32"),
            lambda: exporter.tokens(acts, RED),
        ):
            with pytest.raises(ConfigError, match="the robot's state into its prompt") as refused:
                made()
            assert "SmolVLA and pi0 can be exported" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_reads_no_words_has_no_tokens() -> None:
    with pytest.raises(ConfigError, match="only SmolVLA and pi0 take their instruction"):
        exporter.tokens(policy(mlp(), steps=1, kernel=ODE), "go")


def test_a_graph_that_no_file_can_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = torch.rand(2), {"one": torch.rand(1, 2)}
    graph = captured(lambda one: one * weight, *inputs.values())
    monkeypatch.setattr(_graph, "LARGEST", 8)
    with pytest.raises(ConfigError, match=r"weights of graph big take .* GB, and a file of ONNX"):
        _graph.write(graph, inputs, ["product"], tmp_path / "big.onnx")
    assert list(tmp_path.iterdir()) == []
    # the control: a byte more, and it is written
    monkeypatch.setattr(_graph, "LARGEST", 9)
    _graph.write(graph, inputs, ["product"], tmp_path / "big.onnx")


def test_a_graph_is_left_without_the_inputs_that_change_nothing(tmp_path: Path) -> None:
    inputs = {name: torch.rand(1, 2) for name in ("one", "idle", "two")}
    graph = captured(lambda one, idle, two: one + 2 * two, *inputs.values())
    graph, left = _pair._needed(graph, inputs)
    assert list(left) == ["one", "two"]
    entry = _graph.write(graph, left, ["sum"], tmp_path / "sum.onnx")
    assert list(entry["inputs"]) == ["one", "two"]
    (made,) = _graph.session(tmp_path / "sum.onnx").run(None, _graph.fed(left, 0))
    assert np.allclose(made, inputs["one"] + 2 * inputs["two"])
