"""An exported LeRobot policy acts as ours in LeRobot's own class, and what it can't be is refused."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.chain.noise import PRIOR
from genpolicy.cli.main import main
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Context
from genpolicy.formats.lerobot import lerobot
from genpolicy.models.lerobot_flow import LeRobotFlow
from genpolicy.policy.files import save_policy, saved
from genpolicy.policy.parts.learned_std import LearnedStd
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from tests import lerobot_tiny as tiny
from tests import lerobot_tiny_vla as vla

torch.set_num_threads(1)

ODE, DDPM = {"name": "ddim", "eta": 0.0}, {"name": "ddim", "eta": 1.0}
CONSISTENCY = {"name": "consistency"}
SEES = (tiny.STATE, tiny.WORLD)
ROWS = 3
NOISE = Noise.rows(5, 0, torch.arange(ROWS), 1)


@pytest.fixture(autouse=True, scope="module")
def _tiny_sizes() -> Iterator[None]:
    with vla.sizes():
        yield


def export(policy: Path, out: Path, **sampler: Any) -> str:
    nothing: dict[str, Any] = {"data": None, "task": None, "instruction": None}
    return lerobot(saved(policy, **sampler), out, **nothing)


def stock(folder: Path, **steps: Any) -> tuple[Any, Any, Any]:
    """The objects that a user of LeRobot has: policy, preprocessor, postprocessor."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    kind = PreTrainedConfig.from_pretrained(folder).type
    policy = get_policy_class(kind).from_pretrained(folder).eval()
    pre, post = make_pre_post_processors(
        policy.config, pretrained_path=str(folder), preprocessor_overrides=steps
    )
    policy.reset()
    return policy, pre, post


# -- DiffusionPolicy -------------------------------------------------------------------------------


def diffusion(folder: Path, sampler: ChainConfig, **config: Any) -> Path:
    """A saved policy of ours whose weights are a fresh DiffusionPolicy's."""
    theirs = tiny.saved(tiny.diffusion(*SEES, **config), folder / "theirs")
    section = {"name": "lerobot_diffusion", "pretrained": str(theirs), "device": "cpu"}
    model = saved(theirs).load().model
    save_policy(make_policy(model, sampler), section, sampler, folder / "policy")
    return folder / "policy"


def seen() -> Context:
    return tiny.Recorded(*SEES).rows(torch.arange(5, 5 + ROWS), 2, range(-1, 7))[0]


def ours(policy: Path, context: Context, **sampler: Any) -> Tensor:
    """The actions [B,n,D] that our deployed policy carries out."""
    loaded = saved(policy, **sampler).load()
    plan = loaded.sample(loaded.model.encode(context), NOISE, keep=(0, 0)).x0
    return loaded.actions(plan)


def played(folder: Path, shape: tuple[int, ...]) -> Tensor:
    """The actions that LeRobot's select_action carries out from the second frame on, until it
    decides again.
    """
    policy, pre, post = stock(folder)
    first, second = (
        pre({name: value[:, frame] for name, value in seen().observation.items()})
        for frame in range(2)
    )
    start = NOISE(PRIOR, shape)
    policy.select_action(first, noise=start.clone())
    policy._queues["action"].clear()
    actions = [post(policy.select_action(dict(second), noise=start.clone()))]
    while policy._queues["action"]:
        actions.append(post(policy.select_action(dict(second), noise=start.clone())))
    return torch.stack(actions, 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_ode_of_a_diffusion_policy_is_lerobots_ddim(tmp_path: Path, steps: int) -> None:
    sampler = ChainConfig(steps=steps, kernel=ODE, grid="native", execute=3)
    policy = diffusion(tmp_path, sampler)
    said = export(policy, tmp_path / "out")
    assert f"num_inference_steps {steps}, n_action_steps 3" in said
    theirs, mine = played(tmp_path / "out", (8, 2)), ours(policy, seen())
    assert theirs.shape == mine.shape == (ROWS, 3, 2)
    assert (theirs - mine).abs().max() < 1e-4  # actions reach 40
    # control: the folder that it came from takes another number of steps
    assert (played(tmp_path / "theirs", (8, 2))[:, :3] - mine).abs().max() > 1e-2


def test_a_noisy_chain_is_lerobots_ddpm_with_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = ChainConfig(steps=5, kernel=DDPM, grid="native")
    policy = diffusion(tmp_path, sampler, noise_scheduler_type="DDPM")
    export(policy, tmp_path / "out")
    mine = ours(policy, seen())
    drawn = iter([*range(4), *range(4)])  # of both decisions
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *_, **__: NOISE(next(drawn), (8, 2)),
    )
    theirs = played(tmp_path / "out", (8, 2))
    assert next(drawn, None) is None
    assert (theirs - mine).abs().max() < 1e-3
    assert (theirs - ours(policy, seen(), kernel=ODE)).abs().max() > 1e-1


def test_another_scheduler_is_asked_for_where_nothing_is_clipped(tmp_path: Path) -> None:
    sampler = ChainConfig(steps=5, kernel=ODE, grid="native")
    config = {"noise_scheduler_type": "DDPM", "clip_sample": False}
    policy = diffusion(tmp_path, sampler, **config)
    assert "noise_scheduler_type DDIM" in export(policy, tmp_path / "out")
    assert (played(tmp_path / "out", (8, 2)) - ours(policy, seen())).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("config", "sampler", "said"),
    [
        ({}, {"grid": "own"}, "from noise time 0.76 on"),
        ({}, {"kernel": {"name": "mean", "kernel": DDPM}}, "neither LeRobot's DDIM nor its DDPM"),
        ({}, {"kernel": {**DDPM, "eta": 0.5}}, "neither LeRobot's DDIM nor its DDPM"),
        ({}, {"kernel": {"name": "heun"}}, "neither LeRobot's DDIM nor its DDPM"),
        ({}, {"kernel": DDPM, "window": (0, 4)}, None),
        ({}, {"kernel": DDPM, "window": (2, 4)}, "neither LeRobot's DDIM nor its DDPM"),
        ({"noise_scheduler_type": "DDPM"}, {}, "clips x0 as its DDPM does"),
        ({}, {"warm": {"name": "sdedit", "steps": 2}}, "begins each from noise"),
    ],
    ids=str,
)
def test_a_sampler_that_lerobot_has_not_is_refused(
    tmp_path: Path, config: dict[str, Any], sampler: dict[str, Any], said: str | None
) -> None:
    settings = {"steps": 4, "kernel": ODE, "grid": "native", **sampler}
    policy = diffusion(tmp_path, ChainConfig(**settings), **config)
    if said is None:
        said = "clips x0 as its DDIM does"  # the steps fit, with the window of the default
    with pytest.raises(ConfigError, match=said):
        export(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_that_acts_is_refused(tmp_path: Path) -> None:
    sampler = ChainConfig(steps=4, kernel=DDPM, grid="native")
    config = {"noise_scheduler_type": "DDPM"}
    model = saved(diffusion(tmp_path, sampler, **config)).load().model
    features = model.features(model.encode(seen())).shape[-1]
    part = LearnedStd(features, math.prod(model.event_shape), 0.1, 0.3)
    policy = make_policy(model, sampler).attach("std", part)
    section = {"name": "lerobot_diffusion", "pretrained": str(tmp_path / "theirs")}
    save_policy(policy, {**section, "device": "cpu"}, sampler, tmp_path / "with")
    with pytest.raises(ConfigError, match="can't carry the policy's part 'std'"):
        export(tmp_path / "with", tmp_path / "out")
    # without noise it is idle, and what is left of it is the same policy
    with pytest.raises(ConfigError, match="clips x0 as its DDPM does"):
        export(tmp_path / "with", tmp_path / "out", kernel=ODE)


def test_policies_of_other_classes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["assets/assembly-clone", "--format", "lerobot", "--out", str(tmp_path / "out")]
    assert main(["export", *words]) == 2
    assert "LeRobot has no class for a policy 'mlp'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- SmolVLA, pi0, pi0.5 ---------------------------------------------------------------------------


def words(family: str) -> dict[str, str]:
    return {} if family == "smolvla" else {"tokenizer": vla.words()}


def flow(folder: Path, family: str, sampler: ChainConfig, **settings: Any) -> Path:
    section = {"pretrained": str(vla.saved(family)), "device": "cpu", **words(family), **settings}
    policy = make_policy(LeRobotFlow(**section), sampler)
    save_policy(policy, {"name": "lerobot_flow", **section}, sampler, folder / "policy")
    return folder / "policy"


def asked() -> Context:
    return Context([*vla.PROMPTS, vla.PROMPTS[0]], vla.observation(ROWS))


def chunk(family: str, folder: Path, shape: tuple[int, ...]) -> Tensor:
    """The actions that LeRobot carries out of one decision, by its own number of steps."""
    tokenizer = {} if family == "smolvla" else {"tokenizer_name": vla.words()}
    policy, pre, post = stock(folder, **({"tokenizer_processor": tokenizer} if tokenizer else {}))
    context = asked()
    observation = {name: value[:, -1] for name, value in context.observation.items()}
    batch = pre({"task": list(context.prompts), **observation})
    with torch.no_grad():
        actions = policy.predict_action_chunk(batch, noise=NOISE(PRIOR, shape))
    return post(actions)[:, : policy.config.n_action_steps]


@pytest.mark.parametrize(
    ("family", "steps", "kernel", "settings"),
    [
        ("smolvla", 3, ODE, {"padding": "network"}),
        ("smolvla", 1, CONSISTENCY, {}),
        ("pi0", 3, ODE, {"padding": "network"}),
        ("pi0", 1, CONSISTENCY, {}),
        ("pi05", 3, ODE, {"padding": "network"}),
    ],
    ids=str,
)
def test_euler_steps_of_a_flow_policy_are_lerobots(
    tmp_path: Path, family: str, steps: int, kernel: dict[str, Any], settings: dict[str, Any]
) -> None:
    sampler = ChainConfig(steps=steps, kernel=kernel, execute=2)
    policy = flow(tmp_path, family, sampler, **settings)
    export(policy, tmp_path / "out")
    shape = (vla.CHUNK, vla.MAX_ACTION)
    theirs, mine = chunk(family, tmp_path / "out", shape), ours(policy, asked())
    assert theirs.shape == mine.shape == (ROWS, 2, vla.ACTION)
    assert (theirs - mine).abs().max() < 1e-5
    # control: the number of steps that it came with
    assert (chunk(family, vla.saved(family), shape)[:, :2] - mine).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "sampler", "said"),
    [
        ({}, {"kernel": ODE}, "policy.padding zero"),
        ({"padding": "network"}, {"kernel": CONSISTENCY}, "put noise back"),
        ({"padding": "network"}, {"kernel": DDPM}, "does not take LeRobot's Euler steps"),
        ({"padding": "network"}, {"kernel": ODE, "start": 0.5}, "starts at 0.5"),
        ({"prediction_type": "sample"}, {"kernel": ODE, "steps": 1}, "prediction_type is sample"),
    ],
    ids=str,
)
def test_a_flow_policy_that_lerobot_would_sample_otherwise_is_refused(
    tmp_path: Path, settings: dict[str, Any], sampler: dict[str, Any], said: str
) -> None:
    policy = flow(tmp_path, "smolvla", ChainConfig(**{"steps": 2, **sampler}), **settings)
    with pytest.raises(ConfigError, match=said):
        export(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_padding_would_change_is_real(tmp_path: Path) -> None:
    """The refusal's reason: written all the same, LeRobot's second step acts otherwise."""
    sampler = ChainConfig(steps=2, kernel=ODE, execute=2)
    policy = flow(tmp_path, "smolvla", sampler)
    zero = ours(policy, asked())
    loaded = saved(policy).load()
    network: ChainPolicy = replace(loaded)
    network.model.padding = "network"  # type: ignore[attr-defined]
    plan = network.sample(network.model.encode(asked()), NOISE, keep=(0, 0)).x0
    assert (network.actions(plan) - zero).abs().max() > 1e-3
