"""Which methods a token VLA learns with, on a task of pictures and words."""

from pathlib import Path
from typing import Any

import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.cli.main import main
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.evaluation import metrics_file
from genpolicy.policy.files import saved
from genpolicy.training.experiment import train
from tests import paligemma_tiny as tiny
from tests.invariants.test_control_run import same_state, write
from tests.invariants.test_off_policy_run import stopped, told
from tests.invariants.test_same_run import weights
from tests.point_recorded import Recorded
from tests.toy_control import experiment, prepared


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


def sections(**own: Any) -> dict[str, Any]:
    policy = {"name": "token_vla", "pretrained": str(tiny.saved()), "device": "cpu"}
    policy |= {"chunk": 2, "bins": 16, "words": 48}
    return {
        "policy": policy,
        "chain": {"steps": 1, "kernel": {"name": "ddim", "eta": 0.0}},
        "task": {"name": "point_instructions", "limit": 8},
        "data": {"name": "tests.point_recorded:Recorded", "episodes": 6},
        "eval": {"every": 0, "episodes": 2},
        "environments": 2,
        **own,
    }


@pytest.mark.parametrize("learns", ["lora", "full"])
def test_cloning_lowers_its_loss(tmp_path: Path, learns: str) -> None:
    own = sections(
        method={"name": "bc", "batch": 16, "updates": 10},
        budget={"iterations": 3},
        optimizer={"lr": 1e-2 if learns == "lora" else 3e-3},
    )
    own["policy"] |= {"train": learns}
    train(parse.parse(experiment(tmp_path, **own)))
    lines = metrics_file.read(tmp_path / "run")
    losses = [line["bc/loss"] for line in lines if "bc/loss" in line]
    # a LoRA on a network that knows nothing leaves its vocabulary as it was drawn
    assert losses[-1] < {"lora": 0.9, "full": 0.6}[learns] * losses[0]
    # two loads of what was saved act alike
    context, _, _ = Recorded(2).rows(torch.arange(3), 1, range(2))
    first, second = (saved(tmp_path / "run" / "policy").load() for _ in range(2))
    noise = Noise.rows(0, 0, torch.arange(3), 1)
    x0 = [each.sample(each.model.encode(context), noise).x0 for each in (first, second)]
    assert torch.equal(*x0)
    assert first.model.pretrained is not None


PA_RL = {
    "name": "pa_rl",
    "samples": 3,
    "best": 2,
    "steps": 1,
    "states": 8,
    "every": 2,
    "updates": 2,
    "batch": 8,
    "practice": {"first": 2, "episodes": 2},
    "critic": {"members": 2, "subset": 2, "hidden": 16, "first": 5, "updates": 3, "batch": 8},
}


def test_pa_rl_trains_it_and_a_run_that_was_stopped_is_the_same_run(tmp_path: Path) -> None:
    """Every second iteration is a distillation; it is stopped between the two."""
    own = sections(
        method=PA_RL,
        budget={"iterations": 4},
        optimizer={"lr": 1e-2},
        checkpoint_every=1,
        data={"name": "tests.point_recorded:Recorded", "episodes": 3},
    )
    torch.manual_seed(0)
    train(write(tmp_path / "whole", own))
    stopped(tmp_path / "broken", own, at=3)
    a, b = (weights(tmp_path / n / "run", 4) for n in ("whole", "broken"))
    a["kept"].pop("deployment"), b["kept"].pop("deployment")  # the stop was examined
    verdicts = same_state(a, b)
    assert all(verdicts.values()), verdicts
    lines = told(tmp_path / "whole/run")
    assert lines == told(tmp_path / "broken/run")
    assert [("distil/moved" in line) for line in lines] == [False, True, False, True]
    # what was distilled is in the policy, and it comes with its critic
    policy = saved(tmp_path / "whole/run/policy").load()
    assert set(policy.parts) == {"best_of", "refiner"}
    assert policy.best_of == 3
    weight = torch.cat([p.flatten() for n, p in policy.model.trainable().items() if "lora_B" in n])
    assert bool((weight != 0).any())
    context, _, _ = Recorded(2).rows(torch.arange(3), 1, range(2))
    drawn = policy.sample(policy.model.encode(context), Noise.rows(0, 0, torch.arange(3), 1))
    assert drawn.x0.shape == (3, 2, 2)


def test_a_method_of_denoising_steps_refuses_it_before_any_work(tmp_path: Path) -> None:
    groups = {"name": "flow_grpo", "groups": 2, "group": 2, "updates": 1}
    with pytest.raises(ConfigError, match="trains the denoising steps"):
        prepared(tmp_path, **sections(method=groups))


def test_a_paligemma_that_has_not_acted_needs_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the data section") as raised:
        prepared(tmp_path, **sections(data=None, method=PA_RL))
    assert "\n" not in str(raised.value)


def test_it_is_no_policy_of_a_task_without_pictures(tmp_path: Path) -> None:
    own = sections(
        data={"name": "tests.toy_control:Recorded"}, task={"name": "tests.toy_control:Point"}
    )
    with pytest.raises(ValueError, match=r"needs observation\.state and a camera"):
        prepared(tmp_path, **own)


def test_its_state_is_text_which_no_graph_can_hold(tmp_path: Path, capsys: Any) -> None:
    method = {"name": "bc", "batch": 4, "updates": 1}
    train(parse.parse(experiment(tmp_path, **sections(method=method, budget={"iterations": 1}))))
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--out", str(out), "--instruction", "go"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "writes the state into its prompt" in said
    assert not out.exists()
