"""A run in environments is one run, however it is run:
killed and resumed, on one process or several.
"""

import random
import signal
import time

import pytest
import torch
import yaml

import genpolicy
from genpolicy.chain import Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.training.experiment import train
from tests.invariants.test_same_run import largest_difference, launch, metrics, weights
from tests.toy_control import Point, Recorded, experiment

BASE = {"name": "floorstd", "kernel": {"name": "ddim", "eta": 1.0}, "floor": 0.1}
DPPO = {
    "budget": {"iterations": 12},
    "chain": {"steps": 5, "kernel": BASE, "window": [2, 5]},
    "method": {
        "name": "dppo",
        "episodes": 8,
        "warm_up": 2,
        "epochs": 2,
        "minibatch": 64,
        "critic_minibatch": 16,
    },
    "eval": {"every": 5, "episodes": 6},
    "optimizer": {"lr": 1e-3, "ema": 0.9, "final": 0.1, "warmup": 5},
    "checkpoint_every": 3,
    "task": {"name": "tests.toy_control:Point", "limit": 6},
    "environments": 5,
}
REINFLOW = {
    **DPPO,
    "policy": {"name": "mlp", "hidden": 32, "blocks": 1, "chunk": 4, "family": "flow"},
    "chain": {"steps": 4, "kernel": {"name": "ddim", "eta": 0.0}, "window": [0, 4]},
    "method": {
        "name": "reinflow",
        "episodes": 8,
        "warm_up": 1,
        "epochs": 2,
        "minibatch": 8,
        "noise_lr": 1e-3,
    },
}
BC = {**DPPO, "chain": {"steps": 4}, "method": {"name": "bc", "batch": 32, "updates": 5}}
GRPO = {
    **DPPO,
    "method": {
        "name": "grpo_guard",
        "groups": 4,
        "group": 3,
        "updates": 2,
        "clip": 0.2,
        "reduce": "sum",
        "beta": 0.01,
    },
}
B2 = {
    **DPPO,
    "method": {
        "name": "b2_diffurl",
        "groups": 8,
        "group": 3,
        "clip": 0.2,
        "threshold": 0.1,
        **{"first": 0.7, "last": 0.7},  # the interval grows with the share of the budget
        "judge": {"episodes": 4, "critic_updates": 5},
    },
}
DDPO = {
    **DPPO,
    "method": {
        "name": "ddpo",
        "groups": 6,
        "group": 2,
        "updates": 2,
        "history": 8,
        "min_count": 8,
        "clip": 0.2,
        "reduce": "sum",
    },
}
NFT = {
    **DPPO,
    "chain": {"steps": 5, "kernel": {"name": "dpmsolver"}},
    "method": {
        "name": "diffusion_nft",
        "groups": 4,
        "group": 3,
        "updates": 2,
        "epochs": 2,
        "times": 3,
        "form": "plain",
        "beta": 0.01,
    },
}
SEPPO = {
    **BC,
    "method": {"name": "seppo", "samples": 16, "updates": 2, "copies": 3},  # a pool that is full
}
DPO = {
    **DPPO,
    "method": {"name": "diffusion_dpo", "groups": 4, "group": 3, "updates": 2, "renew": 2},
}
RUNS = {
    "dppo": DPPO,
    "reinflow": REINFLOW,
    "bc": BC,
    "grpo_guard": GRPO,
    "ddpo": DDPO,
    "diffusion_nft": NFT,
    "b2_diffurl": B2,
    "seppo": SEPPO,
    "diffusion_dpo": DPO,
}


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Draws no curves: they take longer than these runs, and are tested elsewhere."""
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


def write(folder, sections):
    folder.mkdir(parents=True)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment(folder, **sections)))
    return path


def same_state(a, b):
    """Compares the numbers of two checkpoints:
    policy, optimisers, averages, everything registered.
    """

    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x if k != "seconds")
        if isinstance(x, list | tuple):
            return len(x) == len(y) and all(map(equal, x, y))
        return x == y or (x != x and y != y)

    return {part: equal(a[part], b[part]) for part in a}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("bc", marks=pytest.mark.slow),
        "dppo",
        pytest.param("grpo_guard", marks=pytest.mark.slow),
        "reinflow",
        pytest.param("b2_diffurl", marks=pytest.mark.slow),
        pytest.param("ddpo", marks=pytest.mark.slow),
        pytest.param("diffusion_nft", marks=pytest.mark.slow),
        "seppo",
        pytest.param("diffusion_dpo", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, name):
    """Stopped by a smaller budget after 7 of 12 iterations, between two evaluations;
    weights, optimisers and value alike.
    """
    sections = {
        **RUNS[name],
        "optimizer": {"lr": 1e-3, "ema": 0.9, "warmup": 5},
    }  # a cosine knows the whole budget
    whole, broken = (write(tmp_path / n, sections) for n in ("whole", "broken"))
    train(whole)
    half = parse.load(broken, ["--budget.iterations=7"])
    train(half)
    resumed = tmp_path / "broken/run/config.yaml"
    resumed.write_text(resumed.read_text().replace("iterations: 7", "iterations: 12"))
    train(resumed)
    a, b = (weights(tmp_path / n / "run", 12) for n in ("whole", "broken"))
    a["kept"].pop("deployment"), b["kept"].pop("deployment")  # the stop was examined
    verdicts = same_state(a, b)
    assert all(verdicts.values()), verdicts
    if name in ("dppo", "reinflow"):
        assert {"value", "value_optimizer"} <= set(a["kept"])
    assert set(a["parts"]) == {"dppo": {"base"}, "reinflow": {"std"}}.get(name, set())
    for left, right in zip(
        *(
            [
                line
                for line in metrics(tmp_path / n / "run")
                if not any(k.startswith("eval/") for k in line)
            ]
            for n in ("whole", "broken")
        ),
        strict=True,
    ):
        assert left == right
    assert a["kept"]["spent"]["iteration"] == 12


def test_control_a_value_that_is_not_resumed_is_another_run(tmp_path):
    """The bit-for-bit equality covers the value: without its weights the next update differs."""
    sections = {**DPPO, "optimizer": {"lr": 1e-3}}
    train(write(tmp_path / "whole", sections))
    folder = tmp_path / "broken"
    train(parse.load(write(folder, sections), ["--budget.iterations=6"]))
    file = folder / "run/checkpoints/6/state.pt"
    state = torch.load(file, weights_only=True)
    state["kept"]["value"] = {n: v + 0.1 for n, v in state["kept"]["value"].items()}
    torch.save(state, file)
    resumed = folder / "run/config.yaml"
    resumed.write_text(resumed.read_text().replace("iterations: 6", "iterations: 12"))
    train(resumed)
    a, b = (weights(tmp_path / n / "run", 12) for n in ("whole", "broken"))
    assert largest_difference(a["parameters"], b["parameters"]) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dppo", "reinflow"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, name):
    sections = {**RUNS[name], "budget": {"iterations": 30}}
    whole, broken = (write(tmp_path / n, sections) for n in ("whole", "broken"))
    launch([str(whole)])
    process = launch([str(broken)], wait=False)
    log = tmp_path / "broken/run/metrics.jsonl"
    target = random.Random(time.time_ns()).randint(4, 24)
    while process.poll() is None and (
        not log.exists() or len(log.read_text().splitlines()) < target
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    launch([str(tmp_path / "broken/run/config.yaml")])
    assert metrics(tmp_path / "broken/run") == metrics(tmp_path / "whole/run")
    a, b = (weights(tmp_path / n / "run", 30) for n in ("whole", "broken"))
    verdicts = same_state(a, b)
    assert all(verdicts.values()), verdicts


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) for n in RUNS],
)
def test_two_processes_equal_one(tmp_path, name):
    sections = {**RUNS[name], "optimizer": {"lr": 1e-3, "eps": 1e-4}, "budget": {"iterations": 6}}
    if name in ("dppo", "reinflow"):
        sections["method"] = {
            **sections["method"],
            "critic_epochs": 2,
            "minibatch": 40 if name == "dppo" else 12,
        }
    for processes in (1, 2):
        launch([str(write(tmp_path / str(processes), sections))], processes)
    one, two = (weights(tmp_path / str(n) / "run", 6) for n in (1, 2))
    assert one["optimizer"]["updates"] == two["optimizer"]["updates"] > 5
    moved = max(float(p.abs().max()) for p in one["parameters"])
    assert largest_difference(one["parameters"], two["parameters"]) < 1e-5 * moved
    learned = [(one["kept"].get("value"), two["kept"].get("value"))]
    learned += [(one["parts"].get("std"), two["parts"].get("std"))]
    assert sum(state is not None for state, _ in learned) == {"dppo": 1, "reinflow": 2}.get(name, 0)
    for state, other in learned:
        pairs = [(v, other[n]) for n, v in (state or {}).items()]
        if pairs:
            assert largest_difference(*(list(side) for side in zip(*pairs, strict=True))) < 1e-4
    for counter in ("evaluations", "env_decisions", "env_steps"):
        assert one["kept"]["spent"][counter] == two["kept"]["spent"][counter]


def test_another_seed_is_another_run(tmp_path):
    """The negative control of every equality here."""
    runs = [
        weights(
            train(
                write(tmp_path / str(seed), {**DPPO, "seed": seed, "budget": {"iterations": 4}})
            ).folder,
            4,
        )
        for seed in (0, 1)
    ]
    assert largest_difference(runs[0]["parameters"], runs[1]["parameters"]) > 1e-4


# -- what a run counts, saves and refuses ----------------------------------------------------------


def test_a_budget_of_environment_steps_ends_the_run(tmp_path):
    result = train(write(tmp_path / "steps", {**DPPO, "budget": {"env_steps": 150}}))
    summary = result.summary
    assert summary["env_steps"] >= 150
    lines = [line for line in metrics(result.folder) if "env_steps" in line]
    assert lines[-1]["env_steps"] == summary["env_steps"]
    assert len(lines) < 2 or lines[-2]["env_steps"] < 150
    decided = train(
        write(tmp_path / "decisions", {**DPPO, "budget": {"env_decisions": 30}})
    ).summary
    assert 30 <= decided["env_decisions"] <= 30 + 8 * 2


def test_evaluations_are_counted_without_those_of_the_examination(tmp_path):
    """K rows a decision to act; every trained pair twice (forward and backward), in each epoch,
    after the warm-up.
    """
    sections = {
        **DPPO,
        "method": {**DPPO["method"], "warm_up": 0},
        "budget": {"iterations": 1},
        "chain": {"steps": 5, "kernel": BASE},
    }
    result = train(write(tmp_path / "one", sections))
    decisions = result.summary["env_decisions"]
    assert result.summary["evaluations"] == decisions * (5 + 2 * 2 * 4)


def test_the_saved_policy_acts_as_the_run_examined_it(tmp_path):
    """Success, return and length of the last examination come out again of the saved policy alone,
    its base included.
    """
    result = train(write(tmp_path / "one", {**DPPO, "optimizer": {"lr": 1e-3}}))
    policy = genpolicy.load(result.folder)
    assert policy.base is not None
    again = evaluate_control(policy, Point(limit=6).environments(3, 1), episodes=6, seed=1_000_003)
    for name in ("success_rate", "return", "length"):
        assert again.metrics()[name] == pytest.approx(result.after[name], abs=1e-5)
    best = genpolicy.load(result.folder / "policy_best")
    context, _, _ = Recorded(episodes=3).rows(torch.arange(4), 1, range(4))
    drawn = [
        p.sample(p.model.encode(context), Noise.rows(0, 0, torch.arange(4), 1)).x0
        for p in (policy, best)
    ]
    assert drawn[0].shape == drawn[1].shape == (4, 4, 2)


def test_the_best_policy_is_chosen_by_success_or_return(tmp_path):
    unjudged = {
        **DPPO,
        "budget": {"iterations": 2},
        "task": {"name": "tests.toy_control:Point", "limit": 6, "judged": False},
    }
    after = train(write(tmp_path / "unjudged", unjudged)).after
    assert "success_rate" not in after
    assert "return" in after
    with pytest.raises(ConfigError, match="eval: select is 'success_rate'"):
        train(
            write(
                tmp_path / "wrong",
                {**unjudged, "eval": {"every": 0, "episodes": 2, "select": "success_rate"}},
            )
        )


def test_what_does_not_fit_is_told_before_any_work(tmp_path):
    for name, sections, said in (
        ("reward", {"reward": {"tests.toy:brightness": 1.0}}, "brings its own reward"),
        ("model", {"policy": {"name": "toy"}}, "has no actions"),
        ("data", {"data": None}, "needs the data section"),
        ("episodes", {"environments": 0}, "environments is 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            train(write(tmp_path / name, {**DPPO, **sections}))
        assert not (tmp_path / name / "run" / "metrics.jsonl").exists()
