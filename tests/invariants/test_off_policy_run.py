"""A run that learns from everything that was done is one run, stopped or not, on one process or
several: critic, its target and optimiser, cached samples and episodes with it.
"""

import random
import signal
import time

import pytest
import torch

from genpolicy.config import parse
from genpolicy.training.experiment import train
from tests.invariants.test_control_run import same_state, write
from tests.invariants.test_same_run import largest_difference, launch, metrics, weights

CRITIC = {"members": 3, "subset": 2, "hidden": 16, "first": 10, "updates": 5, "batch": 16}
COMMON = {
    "samples": 3,
    "every": 2,
    "updates": 3,
    "batch": 16,
    "practice": {"first": 6, "episodes": 4},
    "critic": CRITIC,
}
METHODS = {
    "pa_rl": {"name": "pa_rl", "best": 2, "steps": 2, "states": 12, **COMMON},
    "aloe": {"name": "aloe", **COMMON},
    "aloe by returns": {"name": "aloe", "weigh": "returns", **COMMON},
    "pa_rl of iql": {
        "name": "pa_rl",
        "best": 2,
        "states": 12,
        **COMMON,
        "critic": {**CRITIC, "kind": "iql"},
    },
    "pa_rl of cal_ql": {
        "name": "pa_rl",
        "best": 2,
        "states": 12,
        **COMMON,
        "critic": {**CRITIC, "kind": "cal_ql"},
    },
    "long chunks": {"name": "q_chunking", **COMMON, "length": 2},
}
SECTIONS = {
    "policy": {"name": "mlp", "hidden": 16, "blocks": 1, "chunk": 2},
    "chain": {"steps": 3, "kernel": {"name": "ddim", "eta": 0.0}},
    "data": {"name": "tests.rl100_toy:Outcomes", "episodes": 8},
    "task": {"name": "tests.toy_control:Point", "limit": 6},
    "budget": {"iterations": 8},
    "eval": {"every": 5, "episodes": 4},
    "optimizer": {"lr": 1e-3, "ema": 0.9, "warmup": 5},
    "checkpoint_every": 2,
    "environments": 3,
}
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in list(METHODS)[2:]]


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


def stopped(folder, sections, at, change=lambda state: None):
    """Trains for so many iterations and then, in another run that begins at its checkpoint, to the
    end; ``change``: what happens to the checkpoint in between.
    """
    whole = sections["budget"]["iterations"]
    torch.manual_seed(0)
    train(parse.load(write(folder, sections), [f"--budget.iterations={at}"]))
    file = folder / f"run/checkpoints/{at}/state.pt"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    resumed = folder / "run/config.yaml"
    resumed.write_text(resumed.read_text().replace(f"iterations: {at}\n", f"iterations: {whole}\n"))
    torch.manual_seed(1)
    train(resumed)


def told(folder):
    """What a run logged, without its examinations: one was made where it was stopped."""
    return [line for line in metrics(folder) if not any(name.startswith("eval/") for name in line)]


@pytest.mark.parametrize("name", ["pa_rl", "aloe", *SLOW])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, name):
    """Stopped between two improvements of the policy, when the critic has learned, and samples have
    been drawn, of episodes that the policy's version had not seen.
    """
    sections = {**SECTIONS, "method": METHODS[name]}
    torch.manual_seed(0)
    train(write(tmp_path / "whole", sections))
    stopped(tmp_path / "broken", sections, at=5)
    a, b = (weights(tmp_path / n / "run", 8) for n in ("whole", "broken"))
    a["kept"].pop("deployment"), b["kept"].pop("deployment")  # the stop was examined
    verdicts = same_state(a, b)
    assert all(verdicts.values()), verdicts
    assert told(tmp_path / "whole/run") == told(tmp_path / "broken/run")
    assert {"q_target", "q_optimizer", "experience", "cached_samples"} <= set(a["kept"])
    assert ("v" in a["kept"]) == ("iql" in name)
    assert ("return_value" in a["kept"]) == ("returns" in name)
    assert ({"long_q", "long_v", "long_optimizer"} <= set(a["kept"])) == ("long" in name)
    spent = a["kept"]["spent"]
    assert spent["env_steps"] / 2 <= spent["env_decisions"] <= spent["env_steps"], (
        "what is imitated is no decision"
    )
    assert ("best_of" in a["parts"]) == ("q" not in a["kept"]) == ("aloe" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pa_rl", "aloe"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, name):
    sections = {**SECTIONS, "method": METHODS[name], "budget": {"iterations": 16}}
    whole, broken = (write(tmp_path / n, sections) for n in ("whole", "broken"))
    train(whole)
    process = launch([str(broken)], wait=False)
    log = tmp_path / "broken/run/metrics.jsonl"
    target = random.Random(time.time_ns()).randint(4, 11)
    while process.poll() is None and (
        not log.exists() or len(log.read_text().splitlines()) < target
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    train(tmp_path / "broken/run/config.yaml")
    assert metrics(tmp_path / "broken/run") == metrics(tmp_path / "whole/run")
    verdicts = same_state(*(weights(tmp_path / n / "run", 16) for n in ("whole", "broken")))
    assert all(verdicts.values()), verdicts


def test_control_a_target_that_is_not_resumed_is_another_run(tmp_path):
    sections = {**SECTIONS, "method": METHODS["aloe"]}
    torch.manual_seed(0)
    train(write(tmp_path / "whole", sections))

    def change(state):
        state["kept"]["q_target"] = {n: v + 0.1 for n, v in state["kept"]["q_target"].items()}

    stopped(tmp_path / "broken", sections, at=5, change=change)
    a, b = (weights(tmp_path / n / "run", 8) for n in ("whole", "broken"))
    assert largest_difference(a["parameters"], b["parameters"]) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pa_rl", "aloe", "long chunks"])
def test_two_processes_learn_what_one_learns(tmp_path, name):
    method = {**METHODS[name], "every": 1}
    sections = {
        **SECTIONS,
        "method": method,
        "optimizer": {"lr": 1e-3, "eps": 1e-4},
        "budget": {"iterations": 3},
        "eval": {"every": 0, "episodes": 4},
    }
    for processes in (1, 2):
        launch([str(write(tmp_path / str(processes), sections))], processes)
    train(write(tmp_path / "other", {**sections, "seed": 1}))
    one, two, other = (weights(tmp_path / n / "run", 3) for n in ("1", "2", "other"))
    moved = max(float(p.abs().max()) for p in one["parameters"])
    assert largest_difference(one["parameters"], two["parameters"]) < 1e-5 * moved
    assert largest_difference(one["parameters"], other["parameters"]) > 1e-3, "control"
    learned = [n for n in one["kept"] if n in ("q", "q_target", "v", "return_value", "long_q")]
    pairs = [(one["kept"][n], two["kept"][n]) for n in learned]
    if "best_of" in one["parts"]:
        pairs.append((one["parts"]["best_of"], two["parts"]["best_of"]))
    assert len(pairs) >= 2
    for mine, theirs in pairs:
        values = [[state[n] for n in mine] for state in (mine, theirs)]
        assert largest_difference(*values) < 1e-4
    for counter in ("env_decisions", "env_steps", "evaluations"):
        assert one["kept"]["spent"][counter] == two["kept"]["spent"][counter], counter
