"""A graph in half precision: its weights are halved, its door is not, and its error has a bound."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genpolicy.cli.evaluate_exported import runtime
from genpolicy.cli.main import main
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import ChainConfig
from genpolicy.formats import _graph, _parity
from genpolicy.formats import onnx as exporter
from genpolicy.formats._capture import acting, noise_shape
from genpolicy.policy.files import save_policy, saved
from genpolicy.policy.policy import ChainPolicy
from tests.formats.policies import ODE, POLICIES, STATE, mlp, policy

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

HALF = 10
"""The number of half precision among an ONNX file's types."""


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few observations, so that an export takes seconds."""
    torch.manual_seed(0)
    monkeypatch.setattr(_parity, "COUNTS", dict.fromkeys(_parity.COUNTS, 20))
    monkeypatch.setattr(_parity, "AT_ONCE", 20)


def kept(folder: Path) -> ChainPolicy:
    """A policy of one step, saved as folder/policy."""
    sampler = ChainConfig(steps=1, kernel=ODE)
    save_policy(policy(mlp(family="flow")), {"name": "mlp"}, sampler, folder / "policy")
    return saved(folder / "policy").load()


def test_a_half_graph_takes_and_gives_single_precision_and_keeps_its_bound(tmp_path: Path) -> None:
    acts, out = kept(tmp_path), tmp_path / "half"
    found = saved(tmp_path / "policy")
    said = exporter.onnx(found, out, data=None, task=None, instruction=None, precision="fp16")
    assert "torch's own half precision is" in said
    report = json.loads((out / "parity.json").read_text())
    assert report["precision"] == "fp16"
    assert 1e-5 < report["largest"] <= report["bound"] == 4 * report["rounding"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["made_with"]["precision"] == "fp16"
    door = [*manifest["graphs"]["policy"]["inputs"].values()]
    assert {one["dtype"] for one in door} == {"float32"}
    # every matrix of the network is in half precision
    weights = onnx.load(out / "policy.onnx").graph.initializer
    assert {one.data_type for one in weights if len(one.dims) == 2 and min(one.dims) > 1} == {HALF}
    # the runtime runs it as it is, near the policy and not on it
    running = runtime().Policy.load(out)
    seen = torch.randn(3)
    planned = running.plan({STATE: seen.numpy()})
    noise = torch.from_numpy(runtime().noise.noise(0, 0, running.manifest.noise))[None]
    with torch.no_grad():
        wanted = acting(acts)(seen[None, None], noise)[0].numpy()
    gain = _parity.action_gain(acts.model).numpy()  # type: ignore[arg-type]
    error = np.abs(planned - wanted) * gain
    assert 0 < error.max() <= report["bound"]


def test_a_half_graph_of_another_policy_is_above_the_bound(tmp_path: Path) -> None:
    """The controls: a weight off by a hundredth of the others, and the bound of single precision."""
    acts, file = kept(tmp_path), tmp_path / "policy.onnx"
    shape = noise_shape(acts)
    exporter.write_policy(acts, shape, file, precision="fp16")
    session = _graph.session(file)
    parity = _parity.measure([session], acts, shape, None, precision="fp16")
    assert parity.holds, parity.told()
    assert not _parity.measure([session], acts, shape, None).holds
    graph = onnx.load(file)
    last = [one for one in graph.graph.initializer if one.data_type == HALF and len(one.dims) == 2]
    value = onnx.numpy_helper.to_array(last[-1])
    last[-1].CopyFrom(onnx.numpy_helper.from_array(value * np.float16(1.05), last[-1].name))
    onnx.save(graph, file)
    changed = _parity.measure([_graph.session(file)], acts, shape, None, precision="fp16")
    assert not changed.holds, changed.told()


def test_above_the_bound_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(tmp_path)
    monkeypatch.setattr(_parity, "OWN", {"fp16": 0.01})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="does not act as the policy"):
        exporter.onnx(
            saved(tmp_path / "policy"),
            tmp_path / "half",
            **{"data": None, "task": None, "instruction": None, "precision": "fp16"},
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_format_without_precisions_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "assets/shapes-sd3", "--format", "lora", "--precision", "fp16"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "--precision does not apply to --format lora" in capsys.readouterr().err
    words = ["export", "assets/assembly-clone", "--precision", "bf16"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "precision is 'bf16'; did you mean fp16?" in capsys.readouterr().err


def test_a_policy_of_tokens_is_refused_before_any_work(tmp_path: Path) -> None:
    """Its tokens jump with half precision's rounding."""
    sampler = ChainConfig(steps=1, kernel=ODE)
    save_policy(POLICIES["tokens"](), {"name": "tokens"}, sampler, tmp_path / "policy")
    found, out = saved(tmp_path / "policy"), tmp_path / "half"
    with pytest.raises(ConfigError, match="half precision makes others of"):
        exporter.onnx(found, out, data=None, task=None, instruction=None, precision="fp16")
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "tokens"])
def test_every_policy_that_acts_exports_in_half_precision(name: str, tmp_path: Path) -> None:
    acts, file = POLICIES[name](), tmp_path / "policy.onnx"
    shape: Any = noise_shape(acts)
    exporter.write_policy(acts, shape, file, precision="fp16")
    parity = _parity.measure([_graph.session(file)], acts, shape, None, precision="fp16")
    assert parity.holds, parity.told()
    assert parity.largest > 1e-5  # the control: it is in half precision
