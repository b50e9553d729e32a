"""One iteration on the pretended device of `tests.two_devices` with the models of other libraries:
diffusers pipelines, LeRobot's DiffusionPolicy and its vision-language-action models, tiny.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.cli.law_toys import small
from genpolicy.config import leaves, parse
from genpolicy.config.origin import PERSON
from genpolicy.contracts.task import Context
from genpolicy.models import _diffusers_prompts, _lerobot_processors
from genpolicy.tasks.point_instructions import CAMERA, PIXELS, STATE
from genpolicy.training.experiment import train
from tests import rl100_toy, tiny, toy_control
from tests.lerobot_tiny import SMALL
from tests.two_devices import DEVICE, TwoDevices

MIXED = "expected all tensors to be on the same"
GROUPS = {"groups": 2, "group": 2, "updates": 1, "reduce": "sum", "clip": 0.2}
UNET = {
    **SMALL,
    **{"n_obs_steps": 1, "horizon": 4, "n_action_steps": 2, "down_dims": [8, 16], "n_groups": 4},
}
RL100 = {
    **rl100_toy.SMALL,
    "imitation": {**rl100_toy.SMALL["imitation"], "iterations": 1, "updates": 1},
    "offline": {**rl100_toy.SMALL["offline"], "candidates": 1, "sweeps": 1, "episodes": 4},
    "online": {**rl100_toy.SMALL["online"], "episodes": 4},
}
"""A stage each: imitate, collect, criticise, improve, online."""
ROBOTS = {
    "bc": {"batch": 4, "updates": 1},
    "flow_grpo": GROUPS,
    "reinflow": {"episodes": 2, "epochs": 1, "minibatch": 16},
}
"""Little to do for the methods on robots."""


@pytest.fixture
def _two(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)
    with TwoDevices():
        yield


def trained(folder: Path, raw: dict[str, Any]) -> None:
    """Trains on the pretended device to the end of the budget."""
    policy = {**raw["policy"], "device": str(DEVICE)}
    result = train(parse.parse({**raw, "policy": policy, "output": str(folder / "run")}))
    assert result.summary["iterations"] == raw["budget"]["iterations"]


def pictures(folder: Path, family: str, method: dict[str, Any], **policy: Any) -> dict[str, Any]:
    """An experiment on a tiny pipeline of the family."""
    tiny.BUILD[family]().save_pretrained(folder / family)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    own = {"name": "diffusers_pipeline", "pretrained": str(folder / family)}
    kernel = {"name": "ddim", "eta": 1.0}
    return {
        "policy": {**own, "call": tiny.CALL[family], **policy},
        "chain": {"steps": 3, "kernel": kernel, "guidance": 2.0, "window": [0, 2]},
        "task": {"name": "prompts", "prompts": str(folder / "prompts.txt")},
        "reward": {"genpolicy.cli.law_toys:brightness": 1.0},
        "method": method,
        "budget": {"iterations": 1},
        "eval": {"every": 0, "samples": 2},
    }


@pytest.mark.usefixtures("_two")
@pytest.mark.parametrize(
    ("family", "method", "policy"),
    [
        ("sd3", {"name": "grpo_guard", **GROUPS}, {"train": "full"}),
        ("sd3", {"name": "flow_grpo", "beta": 0.1, **GROUPS}, {"lora": {"rank": 4}}),
        pytest.param(
            *("sdxl", {"name": "grpo_guard", **GROUPS}, {"lora": {"rank": 4}}),
            marks=pytest.mark.slow,
        ),
        ("flux", {"name": "flow_grpo", **GROUPS}, {"gradient_checkpointing": True}),
        ("wan", {"name": "grpo_guard", **GROUPS}, {"offload": True}),
    ],
)
def test_a_pipeline_learns_on_a_device_that_is_not_the_cpu(tmp_path, family, method, policy):
    trained(tmp_path, pictures(tmp_path, family, method, **policy))


@pytest.mark.usefixtures("_two")
def test_embeddings_that_stay_on_the_cpu_are_found(tmp_path: Path, monkeypatch):
    """The negative control, with pictures."""
    right = _diffusers_prompts.Embeddings.rows
    monkeypatch.setattr(
        _diffusers_prompts.Embeddings,
        "rows",
        lambda self, asked: tuple(v if v is None else v.cpu() for v in right(self, asked)),
    )
    with pytest.raises(Exception, match=MIXED):
        trained(tmp_path, pictures(tmp_path, "sd3", {"name": "grpo_guard", **GROUPS}))


def robot(folder: Path, method: str) -> dict[str, Any]:
    """An experiment on a tiny DiffusionPolicy."""
    settings = (
        RL100 if method == "rl100" else small(leaves.make("methods", {"name": method}, PERSON))
    )
    return toy_control.experiment(
        folder,
        policy={"name": "lerobot_diffusion", "config": UNET},
        chain={**toy_control.experiment(folder)["chain"], "steps": 2},
        data={"name": "tests.rl100_toy:Outcomes", "episodes": 8},
        method={**settings, "name": method},
        budget={"iterations": 5 if method == "rl100" else 1},
        eval={"every": 0, "episodes": 2},
    )


@pytest.mark.usefixtures("_two")
@pytest.mark.parametrize("method", ["bc", "dppo", "rl100"])
def test_lerobots_diffusion_policy_learns_on_a_device_that_is_not_the_cpu(tmp_path, method):
    trained(tmp_path, robot(tmp_path, method))


@pytest.mark.usefixtures("_two")
def test_observations_that_stay_on_the_cpu_are_found(tmp_path: Path, monkeypatch):
    """The negative control, with robots."""
    right = _lerobot_processors.Processors.event
    monkeypatch.setattr(
        _lerobot_processors.Processors, "event", lambda self, actions: right(self, actions).cpu()
    )
    with pytest.raises(RuntimeError, match=MIXED):
        trained(tmp_path, robot(tmp_path, "bc"))


@pytest.mark.usefixtures("_two")
@pytest.mark.parametrize("method", ["bc", "find"])
def test_a_policy_of_tokens_learns_on_a_device_that_is_not_the_cpu(tmp_path: Path, method: str):
    raw = robot(tmp_path, method)
    trained(
        tmp_path,
        {
            **raw,
            "policy": {"name": "tokens", "hidden": 8, "blocks": 1, "chunk": 2},
            "chain": {"steps": 1, "kernel": {"name": "ddim", "eta": 0.0}},
        },
    )


@dataclass
class Shown:
    """Recorded frames of what the point of `genpolicy.tasks.point_instructions` sees and does."""

    count: int = 20  # frames of the one episode

    def __post_init__(self) -> None:
        self.fps = 10
        self.columns = {
            STATE: torch.rand(self.count, 2),
            CAMERA: torch.rand(self.count, 3, PIXELS, PIXELS),
            "action": torch.rand(self.count, 2),
        }
        self.episode = torch.zeros(self.count, dtype=torch.long)
        self.shapes = {name: tuple(value.shape[1:]) for name, value in self.columns.items()}
        self.stats = {
            name: {"min": value.amin(0), "max": value.amax(0), "mean": value.mean(0)}
            for name, value in self.columns.items()
        }

    def __len__(self) -> int:
        return self.count

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        past = (index[:, None] + torch.arange(1 - history, 1)).clamp(0, self.count - 1)
        asked = index[:, None] + torch.tensor(actions)
        seen = {name: self.columns[name][past] for name in (STATE, CAMERA)}
        done = self.columns["action"][asked.clamp(0, self.count - 1)]
        return Context(["go to the red circle"] * len(index), seen), done, asked >= self.count


@pytest.mark.usefixtures("_two")
@pytest.mark.parametrize("method", ROBOTS)
@pytest.mark.parametrize("what", ["expert", "full"])
def test_smolvla_learns_on_a_device_that_is_not_the_cpu(tmp_path: Path, method: str, what: str):
    ode = {"name": "ddim", "eta": 0.0}
    kernel = ode if method == "reinflow" else {"name": "sde", "a": 0.7}
    raw = {
        "policy": {"name": "lerobot_flow", "pretrained": "assets/point-smolvla", "train": what},
        "task": {"name": "point_instructions", "limit": 4},
        "chain": {"steps": 3, "kernel": kernel, "window": [0, 2]},
        "method": {"name": method, **ROBOTS[method]},
        "budget": {"iterations": 1},
        "eval": {"every": 0, "episodes": 2},
        "environments": 4,
    }
    if method == "bc":
        raw["data"] = {"name": "tests.test_two_devices_models:Shown"}
    trained(tmp_path, raw)
