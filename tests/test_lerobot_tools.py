"""LeRobot's own commands and ours speak about the same policies:
trained there and loaded here, saved here and run there.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.chain import DDIM, Chain, Noise
from genpolicy.cli.main import main
from genpolicy.datasets.lerobot_dataset import LeRobotDataset
from genpolicy.models.lerobot_diffusion import LeRobotDiffusion
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.demonstrations import demonstrate
from genpolicy.tasks.metaworld import MetaWorld
from tests.lerobot_tiny import SMALL, STATE, WORLD, saved

ROOT = Path(__file__).parents[1]
PLUGIN = "lerobot_policy_genpolicy"
ENV, LIMIT = "reach-v3", 60
STEPS = 5
"""LeRobot's num_inference_steps."""
UPDATES = 600

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: Any) -> Path:
    """The plugin as its build backend builds it, unpacked where a path can point to it."""
    home = tmp_path_factory.mktemp("plugin")
    build = f"import setuptools.build_meta as b; print(b.build_wheel({str(home)!r}))"
    source = home / "source"
    shutil.copytree(ROOT / "robots" / PLUGIN, source)
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = home.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(home / "site")
    (found,) = importlib.metadata.distributions(path=[str(home / "site")])
    assert found.metadata["Name"] == PLUGIN  # LeRobot looks for underscores
    return home / "site"


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("data") / "reach"
    demonstrate({"name": "metaworld", "env": ENV}, folder, episodes=20, noise=0.1, seed=0)
    return folder


@pytest.fixture(scope="module")
def policy_folder(demonstrations: Path, tmp_path_factory: Any) -> Path:
    """A policy that we trained for a minute and saved: it succeeds sometimes."""
    torch.manual_seed(0)
    model = LeRobotDiffusion(
        config={**SMALL, "num_inference_steps": STEPS}, spacing="lerobot", device="cpu"
    )
    dataset = LeRobotDataset(str(demonstrations))
    model.initialise(dataset)
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(STEPS), DDIM(0.0)))
    optimiser = torch.optim.Adam(model.trainable().values(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, UPDATES)
    for _ in range(UPDATES):
        context, actions, _ = dataset.rows(
            torch.randint(0, len(dataset), (64,)), model.history, model.horizon
        )
        event, t = model.event(actions), model.times(torch.rand(64).double())
        optimiser.zero_grad()
        policy.supervised_loss(
            model.encode(context), event, t, torch.randn_like(event)
        ).mean().backward()
        optimiser.step()
        decay.step()
    return saved(model, tmp_path_factory.mktemp("policy"))


def run_lerobot(command: str, *arguments: str, path: Path | None = None) -> None:
    script = Path(sys.executable).with_name(command)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{path or ''}:{ROOT}",
    }
    done = subprocess.run(
        [str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def chain(model: LeRobotDiffusion) -> ChainPolicy:
    return ChainPolicy(model, Chain(model.schedule, model.native_grid(STEPS), DDIM(0.0)))


def test_what_lerobot_train_trained_is_loaded(demonstrations: Path, tmp_path: Path) -> None:
    settings = {
        "policy.type": "diffusion",
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "policy.pretrained_backbone_weights": "null",
        "policy.noise_scheduler_type": "DDIM",
        "policy.num_inference_steps": str(STEPS),
        "policy.n_obs_steps": "2",
        "policy.horizon": "8",
        "policy.n_action_steps": "4",
        "policy.down_dims": "[16,32]",
        "policy.diffusion_step_embed_dim": "16",
        "policy.drop_n_last_frames": "3",
        "dataset.repo_id": "local/reach",
        "dataset.root": str(demonstrations),
        "steps": "30",
        "batch_size": "16",
        "num_workers": "0",
        "log_freq": "10",
        "env_eval_freq": "0",
        "save_freq": "30",
        "wandb.enable": "false",
        "output_dir": str(tmp_path / "out"),
    }
    run_lerobot("lerobot-train", *(f"--{name}={value}" for name, value in settings.items()))
    folder = tmp_path / "out" / "checkpoints" / "000030" / "pretrained_model"
    model = LeRobotDiffusion(pretrained=str(folder), device="cpu")
    assert model.shapes == {STATE: (4,), WORLD: (35,)}
    context, _, _ = LeRobotDataset(str(demonstrations)).rows(
        torch.arange(6), model.history, model.horizon
    )
    noise = torch.randn(6, *model.event_shape)
    batch = model.processors.pre(dict(context.observation))
    expected = model.processors.post(model.policy.predict_action_chunk(batch, noise=noise.clone()))
    rows = Noise.rows(0, 0, torch.arange(6), 1)
    ours = model.decode(chain(model).sample(model.encode(context), rows, start=(0, noise)).x0)
    assert (ours - expected).abs().max() < 1e-5


def test_lerobot_eval_runs_what_we_saved(
    installed: Path, policy_folder: Path, tmp_path: Path
) -> None:
    settings = {
        "policy.path": str(policy_folder),
        "policy.device": "cpu",
        "env.type": "metaworld_state",
        "env.task": ENV,
        "env.episode_length": str(LIMIT),
        "eval.n_episodes": "4",
        "eval.batch_size": "2",
        "eval.use_async_envs": "false",
        "seed": "7",
        "output_dir": str(tmp_path),
    }
    run_lerobot(
        "lerobot-eval", *(f"--{name}={value}" for name, value in settings.items()), path=installed
    )
    told = json.loads((tmp_path / "eval_info.json").read_text())
    assert 0 <= told["overall"]["pc_success"] <= 100
    assert told["overall"]["n_episodes"] == 4


def test_lerobot_eval_runs_a_policy_of_our_own_family(installed: Path, tmp_path: Path) -> None:
    """The shipped clone with the mean of a kernel, which LeRobot has not, by the plugin's class."""
    words = ["export", str(ROOT / "assets/assembly-clone"), "--format", "lerobot_plugin"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    settings = {
        "policy.path": str(tmp_path / "out"),
        "policy.device": "cpu",
        "env.type": "metaworld_state",
        "env.task": "assembly-v3",
        "eval.n_episodes": "20",
        "eval.batch_size": "10",
        "eval.use_async_envs": "false",
        "seed": "7",
        "output_dir": str(tmp_path / "told"),
    }
    run_lerobot(
        "lerobot-eval", *(f"--{name}={value}" for name, value in settings.items()), path=installed
    )
    told = json.loads((tmp_path / "told/eval_info.json").read_text())
    assert 10 < told["overall"]["pc_success"] < 100


@pytest.fixture
def plugin(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """LeRobot's rollout, and the plugin that LeRobot itself found."""
    monkeypatch.syspath_prepend(str(installed))
    from lerobot.envs.configs import EnvConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    return EnvConfig.get_choice_class("metaworld_state")


def by_lerobot(config: Any, folder: Path, seeds: list[int]) -> SimpleNamespace:
    """LeRobot's evaluation loop on these reset seeds,
    and the noise [n,T,D] that each of its decisions began from.
    """
    from lerobot.envs.factory import make_env
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.scripts.lerobot_eval import rollout

    policy = DiffusionPolicy.from_pretrained(folder)
    pre, post = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    (envs,) = make_env(config, n_envs=len(seeds)).values()
    drawn: list[Tensor] = []
    sample = policy.diffusion.conditional_sample

    def kept(batch_size: int, noise: Tensor | None = None, **rest: Any) -> Tensor:
        assert noise is None
        drawn.append(torch.randn(batch_size, policy.config.horizon, 4))
        return sample(batch_size, noise=drawn[-1].clone(), **rest)

    policy.diffusion.conditional_sample = kept
    before, after = config.get_env_processors()
    told = rollout(envs[0], policy, before, after, pre, post, seeds=seeds)
    envs[0].close()
    return SimpleNamespace(drawn=drawn, **told)


def by_us(
    folder: Path, reward: Any, seeds: list[int], drawn: list[Tensor]
) -> list[SimpleNamespace]:
    """The same episodes from the same noise in our environments, by our chain:
    each one's actions [L,D], return, success.
    """
    policy = chain(LeRobotDiffusion(pretrained=str(folder), device="cpu"))
    model: Any = policy.model
    environments = MetaWorld(env=ENV, reward=reward, limit=LIMIT).environments(
        len(seeds), model.history
    )
    context, live = environments.reset(range(len(seeds)), seeds), list(range(len(seeds)))
    episodes = [SimpleNamespace(actions=[], sum=0.0, success=False) for _ in seeds]
    for h, noise in enumerate(drawn):
        rows = Noise.rows(0, 0, torch.tensor(live), 1).at(torch.full((len(live),), h))
        actions = model.decode(
            policy.sample(model.encode(context), rows, start=(0, noise[live])).x0
        )
        step = environments.step(live, actions)
        for row, slot in enumerate(live):
            episodes[slot].actions += list(actions[row, : step.executed[row]])
            episodes[slot].sum += float(step.rewards[row].sum())
            episodes[slot].success = bool(step.success[row])
        going = (~(step.terminated | step.truncated)).nonzero().flatten()
        context, live = step.context[going], [live[int(row)] for row in going]
        if not live:
            break
    environments.close()
    return episodes


@pytest.mark.parametrize("reward", ["sparse", "dense"])
def test_an_episode_is_the_same_in_lerobots_loop_and_in_ours(
    plugin: Any, policy_folder: Path, reward: str
) -> None:
    """Ten episodes: actions, lengths, returns and verdicts.
    One that has ended waits for the others in LeRobot's loop.
    """
    seeds = list(range(50, 60))
    theirs = by_lerobot(plugin(task=ENV, episode_length=LIMIT, reward=reward), policy_folder, seeds)
    ours = by_us(policy_folder, reward, seeds, theirs.drawn)
    assert {episode.success for episode in ours} == {True, False}  # what is compared has both
    for row, episode in enumerate(ours):
        length = int(theirs.done[row].int().argmax()) + 1
        actions = torch.stack(episode.actions)
        assert len(actions) == length
        assert (actions - theirs.action[row, :length]).abs().max() < 1e-4
        assert episode.success == bool(theirs.success[row, :length].any())
        assert episode.sum == pytest.approx(float(theirs.reward[row, :length].sum()), rel=1e-4)
    other = by_us(policy_folder, reward, seeds, [noise.flip(0) for noise in theirs.drawn])
    assert (torch.stack(other[0].actions)[:4] - theirs.action[0, :4]).abs().max() > 1e-2
