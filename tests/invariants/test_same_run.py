"""One run, however it is run: killed and resumed, on one process or several, is the same run."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.toy import experiment

CHECKOUT = Path(__file__).parents[2]
TIMES = ("time", "lr_time", "memory")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def launch(arguments, processes=1, wait=True):
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CHECKOUT),
        "HF_HUB_OFFLINE": "1",
    }
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        str(free_port()),
    ]
    command = [
        sys.executable,
        *(torchrun if processes > 1 else []),
        "-m",
        "genpolicy",
        "train",
        *arguments,
    ]
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=CHECKOUT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if wait:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    return process


def write(folder: Path, **sections) -> Path:
    folder.mkdir(parents=True)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment(folder, **sections)))
    return path


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time", "memory", "crc32"))}
        for line in lines
    ]


def weights(run: Path, iteration: int) -> dict:
    return torch.load(run / "checkpoints" / str(iteration) / "state.pt", weights_only=True)


def largest_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


LONG = {
    "budget": {"iterations": 40},
    "eval": {"every": 7, "samples": 16},
    "checkpoint_every": 5,
    "optimizer": {"lr": 3e-3, "ema": 0.9, "final": 0.1, "warmup": 5},
    "method": {
        "name": "grpo_guard",
        "groups": 4,
        "group": 4,
        "updates": 2,
        "epochs": 2,
        "reduce": "sum",
        "clip": 0.2,
        "beta": 0.01,
    },
}


@pytest.mark.parametrize(
    "moment", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, moment):
    whole, broken = write(tmp_path / "whole", **LONG), write(tmp_path / "broken", **LONG)
    launch([str(whole)])
    process = launch([str(broken)], wait=False)
    log = tmp_path / "broken/run/metrics.jsonl"
    target = random.Random(time.time_ns()).randint(6, 34)
    while process.poll() is None and (
        not log.exists() or len(log.read_text().splitlines()) < target
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    launch([str(tmp_path / "broken/run/config.yaml")])
    assert metrics(tmp_path / "broken/run") == metrics(tmp_path / "whole/run")
    a, b = (weights(tmp_path / name / "run", 40) for name in ("whole", "broken"))
    assert largest_difference(a["parameters"], b["parameters"]) == 0
    assert largest_difference(a["optimizer"]["ema"], b["optimizer"]["ema"]) == 0


def test_another_seed_is_another_run(tmp_path):
    """The negative control of every equality here."""
    a = write(tmp_path / "a", budget={"iterations": 3})
    b = write(tmp_path / "b", budget={"iterations": 3}, seed=1)
    launch([str(a)])
    launch([str(b)])
    assert (
        largest_difference(
            weights(tmp_path / "a/run", 3)["parameters"],
            weights(tmp_path / "b/run", 3)["parameters"],
        )
        > 1e-4
    )


HUNDRED = {
    "budget": {"iterations": 25},
    "method": {
        "name": "grpo_guard",
        "groups": 8,
        "group": 4,
        "updates": 4,
        "reduce": "sum",
        "clip": 0.2,
        "shared_prefix": True,
    },
    "chain": {"steps": 4, "kernel": {"name": "sde", "a": 0.7}},
    "eval": {"every": 0, "samples": 16},
    "optimizer": {"lr": 1e-3, "eps": 1e-4},
}


def test_two_processes_equal_one_after_a_hundred_updates(tmp_path):
    for processes in (1, 2):
        launch([str(write(tmp_path / str(processes), **HUNDRED))], processes)
    one, two = (weights(tmp_path / str(n) / "run", 25) for n in (1, 2))
    assert one["optimizer"]["updates"] == two["optimizer"]["updates"] == 100
    moved = max(float(p.abs().max()) for p in one["parameters"])
    assert largest_difference(one["parameters"], two["parameters"]) < 1e-5 * moved
    assert one["kept"]["spent"]["evaluations"] == two["kept"]["spent"]["evaluations"]


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_resumes_on_two(tmp_path):
    shared = {**HUNDRED, "method": {**HUNDRED["method"], "groups": 16}}
    four, mixed = (
        write(tmp_path / "four", **shared),
        write(tmp_path / "mixed", **{**shared, "budget": {"iterations": 10}}),
    )
    launch([str(four)], 4)
    launch([str(mixed)], 4)
    resumed = tmp_path / "mixed/run/config.yaml"
    resumed.write_text(resumed.read_text().replace("iterations: 10", "iterations: 25"))
    launch([str(resumed)], 2)
    a, b = (weights(tmp_path / name / "run", 25) for name in ("four", "mixed"))
    moved = max(float(p.abs().max()) for p in a["parameters"])
    assert largest_difference(a["parameters"], b["parameters"]) < 1e-5 * moved


def test_sigterm_finishes_the_iteration_saves_and_exits_zero(tmp_path):
    path = write(tmp_path / "long", budget={"iterations": 100_000}, eval={"every": 0, "samples": 4})
    process = launch([str(path)], wait=False)
    log = tmp_path / "long/run/metrics.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    last = metrics(tmp_path / "long/run")[-1]["iteration"]
    assert weights(tmp_path / "long/run", last)["kept"]["spent"]["iteration"] == last
