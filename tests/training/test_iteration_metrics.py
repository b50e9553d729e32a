"""An iteration of several processes reports the mean of everything that any of them logged."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from genpolicy.config import parse
from genpolicy.evaluation import metrics_file
from genpolicy.training.iteration_metrics import IterationMetrics
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.requirements import Needs
from tests import toy
from tests.peers import peers, together
from tests.policy.test_parts import NoSignals

LOGGED = [
    {"everybody": [1.0, 1.0, 1.0], "first alone": [2.0], "same": [0.1, 0.1]},
    {"everybody": [5.0], "second alone": [4.0, 6.0], "same": [0.1, 0.1]},
]
"""The numbers of two processes by name."""
MEANS = {"everybody": 2.0, "first alone": 2.0, "second alone": 5.0, "same": 0.1}


def logged(metrics, numbers):
    for name, values in numbers.items():
        for value in values:
            metrics.log(name, value)
    closed = metrics.close()
    return {name: closed[name] for name in MEANS if name in closed}


def test_a_number_is_the_mean_over_all_that_was_logged_by_any_process():
    accelerators = peers(2)
    metrics = [IterationMetrics(Processes(accelerator)) for accelerator in accelerators]
    works = [lambda n=n: logged(metrics[n], LOGGED[n]) for n in range(2)]
    assert together(works, accelerators) == [MEANS, MEANS]
    assert together([lambda m=m: logged(m, {}) for m in metrics], accelerators) == [{}, {}]


def test_of_one_process_it_is_the_mean_of_its_own():
    (accelerator,) = peers(1)
    found = logged(IterationMetrics(Processes(accelerator)), LOGGED[0])
    assert found == {"everybody": 1.0, "first alone": 2.0, "same": 0.1}


@dataclass
class Telling:
    """``method: {name: "tests.training.test_iteration_metrics:Telling"}``: it logs who it is."""

    needs: ClassVar[Needs] = Needs()

    def train(self, run):
        for _ in run.iterations():
            run.log("index", float(run.processes.index))


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_writes_the_mean_over_its_processes(tmp_path, monkeypatch, count):
    monkeypatch.setattr("genpolicy.training.loop.StopRequest", NoSignals)
    raw = toy.experiment(
        tmp_path,
        method={"name": f"{__name__}:Telling"},
        eval={"every": 0, "samples": 4},
        budget={"iterations": 1},
    )
    accelerators, works = peers(count), []
    (tmp_path / "run").mkdir()
    for accelerator in accelerators:
        run, method = prepare(parse.parse(raw), tmp_path / "run", Processes(accelerator))
        works.append(lambda run=run, method=method: method.train(run))
    together(works, accelerators)
    found = [row["index"] for row in metrics_file.read(tmp_path / "run") if "index" in row]
    assert found == [(count - 1) / 2]
