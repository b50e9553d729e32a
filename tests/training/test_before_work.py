"""The sentences that are said before the first evaluation."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.evaluation import metrics_file
from genpolicy.training import processes
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes, start_processes
from genpolicy.training.requirements import Needs
from tests import rl100_toy, toy, toy_control
from tests.methods import test_uni_o4
from tests.peers import peers

ODE = {"steps": 4, "kernel": {"name": "ddim", "eta": 0.0}, "window": [0, 4]}
FLOW = {"name": "mlp", "family": "flow", "hidden": 8, "blocks": 1, "chunk": 2}
SPLIT = {
    "flow_grpo": (toy.experiment, {"method": {"name": "flow_grpo", "groups": 4, "updates": 1}}),
    "grpo_guard": (toy.experiment, {"method": {"name": "grpo_guard", "groups": 4, "updates": 2}}),
    "find": (toy.experiment, {"method": {"name": "find", "groups": 4}}),
    "dppo": (toy_control.experiment, {"method": {"name": "dppo", "episodes": 4}}),
    "reinflow": (
        toy_control.experiment,
        {"method": {"name": "reinflow", "episodes": 4}, "chain": ODE, "policy": FLOW},
    ),
    "rl100 offline": (rl100_toy.experiment, {}),
    "rl100 online": (rl100_toy.experiment, {"method": {"offline": {"episodes": 9}}}),
    "uni_o4 offline": (test_uni_o4.experiment, {}),
    "uni_o4 online": (test_uni_o4.experiment, {"method": {"offline": {"episodes": 9}}}),
}
TOLD = {
    "flow_grpo": "method: groups is 4, .* over 3 processes: it must be a multiple of 3",
    "grpo_guard": "groups is 4, .* into 2 updates on 3 processes: it must be a multiple of 6",
    "find": "method: groups is 4, .* over 3 processes: it must be a multiple of 3",
    "dppo": "method: episodes is 4, ",
    "reinflow": "method: episodes is 4, ",
    "rl100 offline": r"method: offline\.episodes is 8, .* a multiple of 3",
    "rl100 online": r"method: online\.episodes is 8, ",
    "uni_o4 offline": r"offline\.episodes, the share of member 1, is 2, ",
    "uni_o4 online": r"method: online\.episodes is 5, ",
}


def begun(raw: dict[str, Any], folder: Path) -> None:
    """Begins to train as the first of three processes."""
    run, method = prepare(parse.parse(raw), folder, Processes(peers(3)[0]))
    with run:
        method.train(run)


@pytest.mark.parametrize("name", SPLIT)
def test_what_does_not_split_over_the_processes_is_told_before_an_evaluation(tmp_path, name):
    experiment, sections = SPLIT[name]
    raw = experiment(tmp_path, **sections)
    with pytest.raises(ConfigError, match=TOLD[name]):
        begun(raw, tmp_path / "run")
    assert metrics_file.read(tmp_path / "run") == []


@dataclass
class Own:
    """A method of somebody's own, which asks for nothing itself."""

    groups: int = 4
    shots: int = 6
    needs: ClassVar[Needs] = Needs(("prompts",))

    def train(self, run: Any) -> None:
        """Does nothing."""


@dataclass
class Named(Own):
    """Another, which calls its counts otherwise."""

    needs: ClassVar[Needs] = Needs(("prompts",), split=("shots",))


@pytest.mark.parametrize(("kind", "refused", "taken"), [("Own", 3, 2), ("Named", 4, 3)])
def test_a_method_of_ones_own_need_not_ask(tmp_path, kind, refused, taken):
    method = {"name": f"tests.training.test_before_work:{kind}"}
    raw = parse.parse(toy.experiment(tmp_path, method=method))
    with pytest.raises(ConfigError, match=r"method: (groups is 4|shots is 6), which can't be"):
        prepare(raw, tmp_path / "run", Processes(peers(refused)[0]))
    prepare(raw, tmp_path / "run", Processes(peers(taken)[0]))  # control


def test_control_what_splits_is_let_through():
    Processes(peers(3)[0]).require_split("method: groups", 12, 2)


@pytest.mark.parametrize("started", [1, 2])
def test_processes_that_nobody_joined_are_refused(tmp_path, monkeypatch, started):
    monkeypatch.setenv("WORLD_SIZE", str(started))
    alone = SimpleNamespace(num_processes=1, process_index=0, log_with=[])
    monkeypatch.setattr(processes, "Accelerator", lambda **_: alone)
    refused = pytest.raises(ConfigError, match=r"2 processes were .* set ACCELERATE_USE_CPU=true")
    with refused if started > 1 else nullcontext():
        start_processes(parse.parse(toy.experiment(tmp_path)), None)


@pytest.mark.parametrize("asked", [True, False])
def test_a_launcher_that_started_one_process_of_several_is_told(
    tmp_path, monkeypatch, capsys, asked
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if asked:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    else:
        monkeypatch.delenv("MASTER_ADDR", raising=False)
    experiment = parse.parse(toy.experiment(tmp_path))
    prepare(experiment, tmp_path / "run", Processes(peers(1)[0]))
    assert ("has started one process" in capsys.readouterr().err) == asked


def test_the_best_of_several_pictures_without_a_critic_is_refused(tmp_path):
    raw = toy.experiment(tmp_path, eval={"samples": 4, "sampler": {"best_of": 4}})
    with pytest.raises(
        ConfigError, match="leave best_of at 1, or go on from a policy that has one"
    ):
        train(parse.parse(raw))
