"""The exported graph acts as the policy does, and says so where it does not."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genpolicy.cli.evaluate_exported import runtime
from genpolicy.cli.export import known
from genpolicy.cli.main import main
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import ChainConfig
from genpolicy.formats import _graph, _parity
from genpolicy.formats import onnx as exporter
from genpolicy.formats._capture import acting, noise_shape
from genpolicy.policy.files import Saved, save_policy, saved
from genpolicy.policy.policy import ChainPolicy
from tests.formats.policies import ODE, POLICIES, STATE, Recorded, mlp, policy
from tests.toy_control import Point, cloned

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@dataclass(frozen=True)
class Exported:
    policy: ChainPolicy
    file: Path
    entry: dict[str, Any]
    found: Saved

    def parity(self, file: Path | None = None) -> _parity.Parity:
        data: Any = Recorded(STATE)
        session = _graph.session(file or self.file)
        return _parity.measure([session], self.policy, noise_shape(self.policy), data)

    def write(self, _policy: Any, _shape: Any, file: Path, *_words: str) -> dict[str, Any]:
        """In the place of `write_policy`, which takes seconds."""
        shutil.copy(self.file, file)
        return self.entry

    def changed(self, change: Callable[[np.ndarray], np.ndarray | None], file: Path) -> int:
        """Writes the graph with its constants changed, and returns how many were."""
        model, count = onnx.load(self.file), 0
        for initializer in model.graph.initializer:
            new = change(onnx.numpy_helper.to_array(initializer).copy())
            if new is not None:
                initializer.CopyFrom(onnx.numpy_helper.from_array(new, initializer.name))
                count += 1
        onnx.save(model, file)
        return count


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A saved policy of two steps, and its graph."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("small")
    acts = policy(mlp(family="flow"), steps=2, kernel=ODE)
    sampler = ChainConfig(steps=2, kernel=ODE)
    save_policy(acts, {"name": "mlp"}, sampler, folder / "policy")
    entry = exporter.write_policy(acts, noise_shape(acts), folder / "policy.onnx")
    return Exported(acts, folder / "policy.onnx", entry, saved(folder / "policy"))


@pytest.fixture
def quick(small: Exported, monkeypatch: pytest.MonkeyPatch) -> Exported:
    """The same, whose graph is not written again."""
    monkeypatch.setattr(exporter, "write_policy", small.write)
    return small


def test_the_graph_acts_as_the_policy(small: Exported) -> None:
    parity = small.parity()
    assert parity.holds
    assert 0 < parity.largest < 1e-5
    assert parity.observations == 1000
    assert set(parity.by_kind) == {"recorded", "random", "extreme"}


def test_one_coefficient_changed_by_a_thousandth_is_seen(small: Exported, tmp_path: Path) -> None:
    """A scalar of the chain that is neither 0 nor 1."""
    done: list[float] = []

    def change(value: np.ndarray) -> np.ndarray | None:
        if value.dtype != np.float32 or value.size != 1 or abs(float(value.reshape(()))) in (0, 1):
            return None
        if done:
            return None
        done.append(float(value.reshape(())))
        return value * np.float32(1.001)

    assert small.changed(change, tmp_path / "changed.onnx") == 1
    parity = small.parity(tmp_path / "changed.onnx")
    assert not parity.holds
    assert parity.largest > 10 * parity.bound


def test_a_graph_without_its_normaliser_is_seen(small: Exported, tmp_path: Path) -> None:
    mean = Recorded(STATE).stats[STATE]["mean"].numpy()

    def change(value: np.ndarray) -> np.ndarray | None:
        here = value.size == mean.size and np.allclose(value.reshape(-1), mean)
        return np.zeros_like(value) if here else None

    assert small.changed(change, tmp_path / "changed.onnx") == 1
    assert not small.parity(tmp_path / "changed.onnx").holds


def test_an_action_that_is_no_number_is_seen(small: Exported) -> None:
    class Broken:
        def run(self, _names: Any, feed: Any) -> list[np.ndarray]:
            return [np.full((1, 4, 2), np.nan, np.float32)]

    parity = _parity.measure([Broken()], small.policy, noise_shape(small.policy), None)
    assert not parity.holds


def test_a_policy_that_is_written_down_wrongly_is_no_excuse(small: Exported) -> None:
    torch.manual_seed(1)
    other = policy(mlp(family="flow"), steps=2, kernel=ODE)
    inputs = {STATE: torch.randn(3, 1, 3), "noise": torch.randn(3, 1, 4, 2)}
    wanted = acting(other)(*inputs.values())
    with pytest.raises(ConfigError, match="can't be written down"):
        _parity._exact(acting(small.policy), inputs, wanted)


def test_the_folder_and_its_manifest(quick: Exported, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    text = exporter.onnx(quick.found, out, data=None, task=None, instruction=None)
    assert str(out / "manifest.json") in text
    assert {path.name for path in out.iterdir()} == {
        *("manifest.json", "policy.onnx", "parity.json", "latency.json")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("genpolicy-export", 1)
    graph = manifest["graphs"]["policy"]
    assert graph["sha256"] == hashlib.sha256((out / graph["file"]).read_bytes()).hexdigest()
    assert graph["inputs"] == {
        STATE: {"shape": [1, 1, 3], "dtype": "float32"},
        "noise": {"shape": [1, 1, 4, 2], "dtype": "float32"},
    }
    assert graph["outputs"] == {"actions": {"shape": [1, 4, 2], "dtype": "float32"}}
    assert manifest["observation"] == {STATE: {"kind": "vector", "shape": [3]}}
    assert manifest["noise"] == {"shape": [1, 4, 2]}
    assert manifest["history"] == 1
    assert manifest["action"] == {
        **{"dim": 2, "planned": 4, "executed": 4},
        **{"low": None, "high": None, "units": "environment"},
    }
    assert manifest["sampler"]["steps"] == manifest["evaluations"] == 2
    assert manifest["made_with"]["opset"] == 18
    assert manifest["weights"] == exporter.weights_digest(quick.policy)
    assert manifest["parity"]["largest"] <= manifest["parity"]["bound"]
    latency = json.loads((out / "latency.json").read_text())
    for name in ("torch", "onnxruntime"):
        assert 0 < latency[name]["min_ms"] <= latency[name]["median_ms"]


def test_other_weights_have_another_digest(small: Exported) -> None:
    torch.manual_seed(1)
    other = policy(mlp(family="flow"), steps=2, kernel=ODE)
    assert exporter.weights_digest(other) != exporter.weights_digest(small.policy)


def test_an_export_is_not_exported_again(
    quick: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    exporter.onnx(quick.found, out, data=None, task=None, instruction=None)
    assert main(["export", str(out), "--out", str(tmp_path / "again")]) == 2
    assert "is an export already: export the run or the policy" in capsys.readouterr().err


@pytest.mark.parametrize(("rounding", "told"), [(0.2, True), (0.01, False)])
def test_a_coarse_half_precision_is_told(rounding: float, told: bool) -> None:
    parity = _parity.Parity({"random": 1e-3}, rounding, 1000, 0, "fp16")
    assert ("is coarse for this policy" in parity.told()) is told


def test_an_older_export_is_replaced_and_nothing_else(quick: Exported, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    exporter.onnx(quick.found, out, data=None, task=None, instruction=None)
    (out / "stale").touch()
    exporter.onnx(quick.found, out, data=None, task=None, instruction=None)
    assert not (out / "stale").exists()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").touch()
    with pytest.raises(ConfigError, match="is no older export"):
        exporter.onnx(quick.found, theirs, data=None, task=None, instruction=None)
    assert [path.name for path in theirs.iterdir()] == ["precious"]


@pytest.mark.parametrize("older", [False, True])
def test_an_export_above_the_bound_leaves_things_as_they_were(
    quick: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    out = tmp_path / "exported"
    if older:
        exporter.onnx(quick.found, out, data=None, task=None, instruction=None)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(_parity, "BOUND", 1e-12)
    monkeypatch.setattr(_parity, "OWN", {"fp32": 0.0})
    with pytest.raises(ConfigError, match="does not act as the policy"):
        exporter.onnx(quick.found, out, data=None, task=None, instruction=None)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_shipped_clone_by_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    assert (
        main(
            [
                "export",
                "assets/assembly-clone",
                "--out",
                str(out),
                "--steps",
                "2",
                "--sampler",
                "execute=3",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "parity: largest error" in printed
    assert "latency per decision" in printed
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sampler"]["steps"] == 2
    assert manifest["action"]["executed"] == 3
    assert list(manifest["observation"]) == [STATE, "observation.environment_state"]


def test_the_tasks_limits_are_the_manifests(quick: Exported, tmp_path: Path) -> None:
    task, out = Point(), tmp_path / "exported"
    task.action_high = [1.0, math.inf]
    exporter.onnx(quick.found, out, data=None, task=task, instruction=None)
    action = json.loads((out / "manifest.json").read_text())["action"]
    assert (action["low"], action["high"]) == ([-1.0, -1.0], [1.0, None])
    running = runtime().Policy.load(out)
    far = {STATE: np.full(3, 1e4, np.float32)}
    planned = running.plan(far)
    assert planned[:, 0].max() == 1.0 or planned[:, 0].min() == -1.0
    # the control: without a task nothing is known of limits, and nothing is clipped
    exporter.onnx(quick.found, out, data=None, task=None, instruction=None)
    free = runtime().Policy.load(out).plan(far)
    assert np.abs(free[:, 0]).max() > 1
    assert np.array_equal(planned, free.clip([-1, -1], [1, np.inf]).astype(np.float32))


def test_a_run_brings_its_recorded_episodes_and_its_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cloned(tmp_path)
    data, task = known(saved(folder, trust=True))
    assert data is not None
    assert task is not None
    assert task.fps > 0
    assert "without the run" not in capsys.readouterr().err
    seen = _parity.observations(saved(folder).load().model, data, torch.Generator())  # type: ignore[arg-type]
    assert len(next(iter(seen["recorded"].values()))) == 400
    # the control: a stranger's run names code, which is not imported
    assert known(saved(folder)) == (None, None)
    said = capsys.readouterr().err
    assert "without the run's recorded episodes" in said
    assert "without the run's task" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["assets/assembly-clone", "--format", "onxx"], "did you mean onnx"),
        (["assets/shapes-sd3"], "onnx is for policies that act"),
        (["assets/assembly-clone", "--instruction", "go"], "this policy reads no words"),
        (["assets/point-smolvla"], "give --instruction TEXT"),
        (["assets/assembly-clone", "--sampler", "kernel.name=heum"], "did you mean heun"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_critic_that_prefers_nothing_vouches_for_no_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """...and the control is the same export of a critic that does."""
    monkeypatch.setattr(_parity, "COUNTS", dict.fromkeys(_parity.COUNTS, 10))
    monkeypatch.setattr(_parity, "AT_ONCE", 10)
    for flat in (False, True):
        acts, file = POLICIES["best of 4"](), tmp_path / f"{flat}.onnx"
        if flat:
            assert acts.judge is not None
            for parameter in acts.judge.critic.parameters():  # type: ignore[attr-defined]
                parameter.data.zero_()
        exporter.write_policy(acts, noise_shape(acts), file)
        sessions = [_graph.session(file)]
        if flat:
            with pytest.raises(ConfigError, match="has learned nothing to pick by"):
                _parity.measure(sessions, acts, noise_shape(acts), None)
        else:
            assert _parity.measure(sessions, acts, noise_shape(acts), None).holds


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_that_acts_exports(name: str, tmp_path: Path) -> None:
    acts, file = POLICIES[name](), tmp_path / "policy.onnx"
    exporter.write_policy(acts, noise_shape(acts), file)
    parity = _parity.measure([_graph.session(file)], acts, noise_shape(acts), None)
    assert parity.holds, parity.told()
    assert parity.ties < 50


@pytest.mark.slow
def test_best_of_n_picks_the_same_sample(tmp_path: Path) -> None:
    acts, file = POLICIES["best of 4"](), tmp_path / "policy.onnx"
    exporter.write_policy(acts, noise_shape(acts), file)
    session = _graph.session(file)
    inputs = {STATE: 40 * torch.rand(40, 1, 3), "noise": torch.randn(40, *noise_shape(acts))}
    with torch.no_grad():
        wanted = acting(acts)(*inputs.values())
    picked = torch.cat(
        [torch.from_numpy(session.run(None, _graph.fed(inputs, row))[0]) for row in range(40)]
    )
    assert torch.allclose(picked, wanted, atol=1e-3)
    # the control: neither of them takes the first sample always
    moved = {**inputs, "noise": inputs["noise"].roll(3, 1)}  # samples in another order
    again = torch.cat(
        [torch.from_numpy(session.run(None, _graph.fed(moved, row))[0]) for row in range(40)]
    )
    assert torch.allclose(again, picked, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("camera", [False, True])
def test_lerobots_diffusion_policy_exports(
    camera: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.lerobot_tiny import TOP, WORLD, diffusion

    monkeypatch.setattr(_parity, "COUNTS", dict.fromkeys(_parity.COUNTS, 100))
    monkeypatch.setattr(_parity, "AT_ONCE", 20)
    model = diffusion(STATE, TOP if camera else WORLD)
    acts, file = policy(model, steps=2, kernel=ODE), tmp_path / "policy.onnx"
    exporter.write_policy(acts, noise_shape(acts), file)
    parity = _parity.measure([_graph.session(file)], acts, noise_shape(acts), None)
    assert parity.holds, parity.told()
    assert parity.largest < 1e-4
