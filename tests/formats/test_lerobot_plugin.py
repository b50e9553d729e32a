"""Our plugin's class of LeRobot acts as the policy that was exported, whatever its sampler."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.cli.main import main
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Context
from genpolicy.formats.lerobot_plugin import lerobot_plugin
from genpolicy.policy.files import save_policy, saved
from genpolicy.policy.sampler import make_policy
from tests import tiny
from tests.formats.policies import DDPM, ODE, POLICIES, STATE, mlp

torch.set_num_threads(1)

PLUGIN = Path(__file__).parents[2] / "robots/lerobot_policy_genpolicy/src"
ROWS, STEPS = 2, 5
SAMPLERS = {
    "mean": {"steps": 3, "kernel": {"name": "mean", "kernel": DDPM}},
    "noisy": {"steps": 3, "kernel": DDPM},
    "warm": {"steps": 3, "kernel": ODE, "execute": 1, "warm": {"name": "sdedit", "steps": 2}},
    "two steps": {"steps": 2, "kernel": ODE},  # of a policy that sees two frames
    "refined": {"steps": 2, "kernel": DDPM, "best_of": 2},  # with a critic, and its gradients
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(PLUGIN), *sys.path])
    __import__("lerobot_policy_genpolicy")


def exported(tmp_path: Path, name: str) -> Path:
    chain = ChainConfig(**SAMPLERS[name])
    policy = POLICIES[name]() if name in POLICIES else make_policy(mlp(), chain)
    save_policy(policy, {"name": "mlp", "device": "cpu"}, chain, tmp_path / "policy")
    nothing: dict[str, Any] = {"data": None, "task": None, "instruction": None}
    for _ in range(2):  # it takes the place of an older one
        lerobot_plugin(saved(tmp_path / "policy"), tmp_path / "out", **nothing)
    return tmp_path / "out"


def frames() -> Tensor:
    return 40 * torch.rand(STEPS, ROWS, 3, generator=torch.Generator().manual_seed(2))


def by_lerobot(folder: Path, seed: int) -> Tensor:
    """The actions [STEPS,B,D] of LeRobot's own calls, as lerobot-eval makes them."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    overrides = {
        "device_processor": {"device": "cpu"},
        "rename_observations_processor": {"rename_map": {}},
    }
    pre, post = make_pre_post_processors(
        config, pretrained_path=str(folder), preprocessor_overrides=overrides
    )
    torch.manual_seed(seed)
    policy.reset()
    actions = []
    for frame in frames():
        with torch.inference_mode():
            actions.append(post(policy.select_action(pre({STATE: frame, "task": ["go"] * ROWS}))))
    return torch.stack(actions)


def by_us(folder: Path, seed: int) -> Tensor:
    """The same steps by the policy itself, each decision with a history that begins with its
    first frame.
    """
    policy = saved(folder).load()
    history = policy.model.history
    torch.manual_seed(seed)
    drawn = int(torch.randint(2**31, ()))
    padded = torch.cat([frames()[:1].expand(history - 1, -1, -1), frames()])
    actions: list[Tensor] = []
    plan, decision = None, 0
    while len(actions) < STEPS:
        now = len(actions)
        seen = {STATE: padded[now : now + history].transpose(0, 1)}
        noise = Noise.rows(drawn, 0, torch.arange(ROWS), 1).at(torch.full((ROWS,), decision))
        condition = policy.model.encode(Context(["go"] * ROWS, seen))
        plan = policy.sample(
            condition, noise, previous=plan if policy.warm else None, keep=(0, 0)
        ).x0
        actions += policy.actions(plan).unbind(1)
        decision += 1
    return torch.stack(actions[:STEPS])


@pytest.mark.parametrize("name", SAMPLERS)
def test_lerobot_plays_what_the_policy_plays(tmp_path: Path, name: str) -> None:
    folder = exported(tmp_path, name)
    theirs = by_lerobot(folder, seed=4)
    assert torch.equal(theirs, by_us(tmp_path / "policy", seed=4))
    assert not torch.equal(theirs, by_lerobot(folder, seed=5))
    assert not torch.equal(theirs[0], theirs[1])


def test_it_describes_itself_as_lerobot_does(tmp_path: Path) -> None:
    from lerobot.configs.policies import PreTrainedConfig

    config: Any = PreTrainedConfig.from_pretrained(exported(tmp_path, "mean"))
    assert config.type == "genpolicy"
    assert config.input_features[STATE].shape == (3,)
    assert config.output_features["action"].shape == (2,)


def test_lerobot_can_not_train_it(tmp_path: Path) -> None:
    from lerobot.policies.factory import get_policy_class, make_policy_config

    with pytest.raises(ValueError, match="is trained by genpolicy train"):
        get_policy_class("genpolicy")(make_policy_config("genpolicy", device="cpu"))


def test_a_policy_that_draws_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.build("sd15").save_pretrained(tmp_path / "base")
    words = [str(tmp_path / "base"), "--format", "lerobot_plugin", "--out", str(tmp_path / "out")]
    assert main(["export", *words]) == 2
    assert "draws, and LeRobot runs policies that act" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "rows"), [(float("nan"), ROWS), (float("inf"), ROWS), (1.0, 3)])
def test_no_action_comes_of_an_observation_that_is_none(tmp_path: Path, value: float, rows: int):
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    folder = exported(tmp_path, "mean")
    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    policy.reset()
    policy.select_action({STATE: torch.ones(ROWS, 3)})
    with pytest.raises(ValueError, match=r"not finite|3 rows, and 2 before"):
        policy.select_action({STATE: torch.full((rows, 3), value)})
    assert policy.select_action({STATE: torch.ones(ROWS, 3)}).isfinite().all(), "it goes on"
