"""Which methods a policy of tokens learns with, and which refuse it before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.evaluation import metrics_file
from genpolicy.policy.files import saved
from genpolicy.training.experiment import train
from tests import rl100_toy
from tests.toy_control import experiment, prepared

ODE = {"name": "ddim", "eta": 0.0}
TOKENS = {"name": "tokens", "hidden": 64, "blocks": 1, "chunk": 2, "bins": 32}


def sections(**own: Any) -> dict[str, Any]:
    return {"policy": TOKENS, "chain": {"steps": 1, "kernel": ODE}, **own}


def test_cloning_teaches_it_to_reach_the_goal(tmp_path: Path) -> None:
    """With the negative control of shuffled actions; two loads of the saved policy act alike."""
    found = {}
    for data in ("Recorded", "Shuffled"):
        raw = experiment(
            tmp_path,
            **sections(
                data={"name": f"tests.toy_control:{data}"},
                method={"name": "bc", "batch": 128, "updates": 100},
                budget={"iterations": 3},
                eval={"every": 0, "episodes": 100},
                output=str(tmp_path / data),
            ),
        )
        found[data] = train(parse.parse(raw)).after["success_rate"]
    assert found["Recorded"] > 0.6
    assert found["Shuffled"] < 0.3
    first, second = (saved(tmp_path / "Recorded" / "policy").load() for _ in range(2))
    condition, noise = torch.randn(5, 4), Noise.rows(0, 0, torch.arange(5), 1)
    assert torch.equal(first.sample(condition, noise).x0, second.sample(condition, noise).x0)


GROUPS = {"groups": 2, "group": 2, "updates": 1}
REFUSED = {
    "dppo": {},
    "ddpo": {},
    "flow_grpo": GROUPS,
    "grpo_guard": GROUPS,
    "mix_grpo": GROUPS,
    "dance_grpo": {},
    "reinflow": {},
    "diffusion_nft": GROUPS,
    "diffusion_dpo": {},
    "seppo": {},
    "uni_o4": {},
    "b2_diffurl": {},
}


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_of_denoising_steps_refuses_it_before_any_work(
    tmp_path: Path, method: str
) -> None:
    own = sections(method={"name": method, **REFUSED[method]})
    with pytest.raises(ConfigError, match="trains the denoising steps") as raised:
        prepared(tmp_path, **own)
    assert "\n" not in str(raised.value)
    assert metrics_file.read(tmp_path / "run") == []


@pytest.mark.parametrize("method", ["dppo", "diffusion_nft"])
def test_a_policy_that_denoises_is_not_refused(tmp_path: Path, method: str) -> None:
    """The control."""
    prepared(tmp_path, method={"name": method, **REFUSED[method]})


def test_of_rl100_it_can_be_imitated_and_not_improved(tmp_path: Path) -> None:
    whole = {**rl100_toy.SMALL, "stage": "imitation"}
    prepared(tmp_path / "imitation", **sections(method=whole))
    with pytest.raises(ConfigError, match="trains the denoising steps"):
        prepared(tmp_path / "all", **sections(method={**whole, "stage": "all"}))


def test_a_student_can_not_be_taught_by_it_nor_as_it(tmp_path: Path) -> None:
    raw = experiment(tmp_path, **sections(budget={"iterations": 1}))
    teacher = str(train(parse.parse(raw)).folder / "policy")
    method = {"name": "consistency", "visits": {"episodes": 2}}
    taught = sections(method=method, policy={**TOKENS, "teacher": teacher})
    with pytest.raises(ConfigError, match="trains the denoising steps"):
        prepared(tmp_path / "as it", **taught)
    run, distillation = prepared(
        tmp_path / "by it",
        policy={"name": "mlp", "family": "flow", "teacher": teacher, "pretrained": None}
        | {"hidden": 8, "chunk": 2, "prediction_type": "velocity"},
        chain={"steps": 1, "kernel": {"name": "consistency"}},
        method=method,
    )
    with run, pytest.raises(ConfigError, match="can't teach"):
        distillation.train(run)


def test_find_learns_the_noise_that_it_begins_with(tmp_path: Path) -> None:
    """The network stands still, and its start moves: noise steering works as with any policy."""
    method = {"name": "find", "groups": 4, "group": 2}
    run, find = prepared(tmp_path, **sections(method=method, budget={"iterations": 2}))
    before = {name: value.clone() for name, value in run.policy.model.trainable().items()}
    with run:
        find.train(run)
    assert all(torch.equal(before[n], v) for n, v in run.policy.model.trainable().items())
    start: Any = run.policy.parts["start"]
    assert bool((start.mean.weight != 0).any())
