"""PA-RL on prompts: a critic of latents picks which of N samples is judged, and the policy imitates
what it prefers. A prompt is an episode of one decision.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.policy.files import load
from genpolicy.rollout.store import EpisodeStore
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.run import Run
from tests import toy
from tests.invariants.test_control_run import same_state
from tests.invariants.test_same_run import largest_difference, launch, metrics, weights
from tests.peers import peers

N, FIRST, PROMPTS, STEPS = 8, 64, 16, 4
METHOD = {
    "name": "pa_rl",
    "samples": N,
    "best": 4,
    "temperature": 0.2,
    "every": 1,
    "states": 64,
    "updates": 20,
    "batch": 32,
    "practice": {"first": FIRST, "episodes": PROMPTS},
    "critic": {"members": 2, "hidden": 32, "first": 200, "updates": 20, "batch": 32, "lr": 3e-3},
}


def experiment(folder: Path, iterations: int, **method: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return toy.experiment(
        folder,
        policy={"name": "toy"},
        chain={"steps": STEPS, "kernel": {"name": "ddim", "eta": 0.0}},
        method={**METHOD, **method},
        optimizer={"lr": 3e-2},
        budget={"iterations": iterations},
        eval={"every": 0, "samples": 128},
    )


def prepared(folder: Path, **method: Any) -> tuple[Run, Any]:
    raw = parse.parse(experiment(folder, 1, **method))
    return prepare(raw, folder / "run", Processes(peers(1)[0]))


asked: list[int] = []


def counted(outputs: Tensor, context: Context) -> Tensor:
    """The toy's reward, which counts what it is asked."""
    asked.append(len(outputs))
    return toy.brightness(outputs, context)


def alone(folder: Path) -> float:
    """The mean reward of a saved policy without its critic's choice, of 256 samples."""
    policy = replace(load(folder / "run"), best_of=1)
    context = Context(list(toy.PROMPTS) * 64)
    with torch.no_grad():
        x0 = policy.sample(policy.model.encode(context), Noise.rows(9, 0, torch.arange(256), 1)).x0
        return float(toy.brightness(policy.model.decode(x0), context).mean())


def test_the_policy_learns_what_the_critic_prefers(tmp_path: Path) -> None:
    """It is better with its critic's choice, and without it too; with the reward's sign turned it
    is worse (control).
    """
    result = train(parse.parse(experiment(tmp_path / "right", 12)))
    assert abs(result.before["reward/brightness"]) < 0.05
    assert result.after["reward/brightness"] > 0.08
    assert alone(tmp_path / "right") > 0.06
    turned = {**experiment(tmp_path / "turned", 12), "reward": {"tests.toy:brightness": -1.0}}
    turned["eval"] = {"every": 0, "samples": 128}
    assert train(parse.parse(turned)).after["reward/brightness"] < -0.06


def test_choice_alone_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    """Without updates of the policy only the critic's choice makes it better: the gain above is
    distillation's (control).
    """
    result = train(parse.parse(experiment(tmp_path, 6, updates=0)))
    assert result.after["reward/brightness"] > 0.01
    assert abs(alone(tmp_path)) < 0.02


def test_one_of_n_samples_is_judged_and_no_others_are_drawn(tmp_path: Path) -> None:
    """The reward is asked once per prompt; the network N times per prompt and step, and as often
    for each decision that is distilled, but for the samples of the policy as it came.
    """
    raw = {**experiment(tmp_path, 3, every=2), "reward": {f"{__name__}:counted": 1.0}}
    raw["eval"] = {"every": 0, "samples": 16}
    asked.clear()
    train(parse.parse(raw))
    evaluated = 2 * 16
    assert sum(asked) == FIRST + 2 * PROMPTS + evaluated
    drawn = STEPS * (FIRST + 2 * N * PROMPTS)
    imitated = 2 * METHOD["updates"] * METHOD["batch"]  # there and back
    spent = weights(tmp_path / "run", 3)["kept"]["spent"]
    distilled = (spent["evaluations"] - drawn - imitated) / (STEPS * N)
    assert distilled == int(distilled)
    assert METHOD["states"] / 2 < distilled < METHOD["states"], "those drawn twice are sampled once"


def test_samples_that_are_kept_are_those_that_were_judged(tmp_path: Path) -> None:
    run, _ = prepared(tmp_path)
    run.begin(1)
    rollout = run.collect(6, 1, keep=True)
    found = EpisodeStore(tmp_path / "run").episodes(1)
    assert [e["prompts"][0] for e in found] == list(rollout.prompts)
    rewards = torch.cat([e["rewards"] for e in found])
    assert torch.equal(rewards, rollout.rewards)
    x0 = torch.cat([e["x0"] for e in found])
    assert torch.equal(x0, rollout.trajectory.x0)
    pictures = run.policy.model.decode(x0)
    again = toy.brightness(pictures, Context([e["prompts"][0] for e in found]))
    assert torch.allclose(again.double(), rewards[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"gamma": 0.9}, "gamma is 0.9, and where nothing comes after"),
        ({"critic": {"kind": "iql"}}, "kind is 'iql', and where nothing comes after"),
        ({"practice": {"retry": 0.5}}, "retry is 0.5, and where prompts are drawn"),
    ],
)
def test_what_is_of_later_decisions_is_refused(
    tmp_path: Path, method: dict[str, Any], said: str
) -> None:
    run, built = prepared(tmp_path, **method)
    with pytest.raises(ConfigError, match=said):
        built.train(run)


def resumed(folder: Path, at: int, whole: int) -> None:
    """Trains for so many iterations, and in another run, from its checkpoint, to the end."""
    raw = {**experiment(folder, at), "checkpoint_every": 1}
    torch.manual_seed(0)
    train(parse.parse(raw))
    config = folder / "run/config.yaml"
    config.write_text(config.read_text().replace(f"iterations: {at}\n", f"iterations: {whole}\n"))
    torch.manual_seed(1)
    train(config)


def told(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(folder) if not any(name.startswith("eval/") for name in line)]


def test_a_run_that_was_stopped_is_the_same_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    train(parse.parse({**experiment(tmp_path / "whole", 5), "checkpoint_every": 1}))
    resumed(tmp_path / "broken", 3, 5)
    a, b = (weights(tmp_path / n / "run", 5) for n in ("whole", "broken"))
    a["kept"].pop("deployment"), b["kept"].pop("deployment")  # the stop was examined
    assert all(same_state(a, b).values())
    assert told(tmp_path / "whole/run") == told(tmp_path / "broken/run")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    for processes in (1, 2):
        raw = experiment(tmp_path / str(processes), 3)
        raw |= {"optimizer": {"lr": 1e-3, "eps": 1e-4}, "checkpoint_every": 1}
        file = tmp_path / f"{processes}.yaml"
        file.write_text(parse.to_yaml(parse.parse(raw)))
        launch([str(file)], processes)
    one, two = (weights(tmp_path / str(n) / "run", 3) for n in (1, 2))
    moved = max(float(p.abs().max()) for p in one["parameters"])
    assert largest_difference(one["parameters"], two["parameters"]) < 1e-5 * moved
    assert one["kept"]["spent"]["evaluations"] == two["kept"]["spent"]["evaluations"]
