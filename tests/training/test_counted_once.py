"""Counters and metrics on several processes: two processes' numbers are one process's."""

from functools import partial

import numpy as np
import pytest
import torch

from genpolicy.evaluation import metrics_file
from genpolicy.methods.parts.baseline import DecisionValue
from genpolicy.methods.parts.gate import OfflineEvaluation
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.rollout.replay import Replay
from genpolicy.training import loop
from tests.peers import peers, together
from tests.policy.test_parts import NoSignals
from tests.rl100_toy import experiment
from tests.toy_control import prepared

SECTIONS = ("policy", "chain", "data", "optimizer", "environments", "eval", "budget")
NUMBERS = ("evaluations", "env_decisions", "env_steps")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("genpolicy.training.loop.StopRequest", NoSignals)
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


def on_processes(folder, count, work, prepare=lambda run: run, **sections):
    """Returns the results of ``work(prepare(run), run, method)`` on ``count`` processes, and the
    runs. They are prepared one after the other, so that their networks are alike.
    """
    place = folder / str(count)
    place.mkdir()
    raw = experiment(place, **sections)
    built = []
    accelerators = peers(count)
    for accelerator in accelerators:
        torch.manual_seed(0)
        section = {name: raw[name] for name in (*SECTIONS, "method")}
        run, method = prepared(place, accelerator, **section)
        built.append((prepare(run), run, method))
    results = together([partial(work, *each) for each in built], accelerators)
    return results, [run for _, run, _ in built]


def same_everywhere(folder, work, counts=(1, 2, 3), prepare=lambda run: run):
    """The counters that ``work(prepare(run))`` leaves on each of these numbers of processes, and
    its results.
    """
    found = []

    def counted(made, run, method):
        run.policy.model.evaluations = 0
        result = work(made)
        per_row = loop._account(run, 1.0, run.policy.model.evaluations)
        return (*(getattr(run.spent, name) for name in NUMBERS), per_row), result

    for count in counts:
        results, _ = on_processes(folder, count, counted, prepare)
        assert all(result[0] == results[0][0] for result in results), "each knows everybody's"
        found.append(results)
    first = found[0][0][0]
    for results in found[1:]:
        assert results[0][0] == pytest.approx(first)
    return found


def test_the_chains_that_a_gate_imagines_count_once(tmp_path):
    """All processes together imagine every start once, and each knows all scores."""

    def prepare(run):
        value = ActionValue(run, 0.99)
        gate = OfflineEvaluation(run, value, horizon=2, starts=7, caution=0.1)
        replay = Replay.of_dataset(run.data, run.policy.model, True)
        features = run.policy.model.features(replay.encoded(run.policy.model))
        return partial(gate, replay, features)

    found = same_everywhere(tmp_path, lambda gate: gate(), (1, 2, 8), prepare)
    scores = found[0][0][1]
    assert found[0][0][0][0] == 7 * 2 * 3, "starts, decisions, denoising steps"
    assert len(scores.unique()) == 7
    for results in found[1:]:
        for _, score in results:
            assert torch.equal(score, results[0][1]), "all decide alike"
            assert torch.allclose(score, scores, atol=1e-6)


@pytest.mark.parametrize("episodes", [5, 2])
def test_trying_out_counts_every_episode_once(tmp_path, episodes):
    """Also where the processes can't have equally many of them."""
    found = same_everywhere(tmp_path, lambda run: run.outcomes(episodes, 0))
    outcomes = found[0][0][1]
    assert outcomes.shape == (episodes,)
    assert found[0][0][0][0] > 0
    for results in found[1:]:
        assert all(torch.equal(outcome, outcomes) for _, outcome in results)


def test_rows_that_were_learned_from_count_once(tmp_path):
    def work(run):
        run.seen(7)
        return run.metrics.seen

    found = same_everywhere(tmp_path, work)
    assert [sum(rows for _, rows in results) for results in found] == [7, 7, 7]


def test_the_evaluations_per_row_are_everybodys(tmp_path):
    """Processes have as many groups, but not as many decisions."""
    found = same_everywhere(tmp_path, lambda run: run.collect(6, 1).decisions.total)
    assert found[0][0][0][3] == 3.0, "the steps of the chain"


def explained(_, run, method):
    """The logged share of the returns' variance, and what this process's rows alone would say."""
    value = DecisionValue(run, 0.99, 0.95, 1e-3, 1, 8)
    for number, parameter in enumerate(value.value.parameters()):
        draw = torch.Generator().manual_seed(number)
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    advantage, returns = value.advantage(run.collect(6, 1))
    alone = 1 - float(advantage.var(correction=0) / returns.double().var(correction=0))
    return run.metrics.numbers["critic/explained"][0], alone


def test_what_a_value_explains_is_told_of_all_processes_rows(tmp_path):
    ((one, alone),), _ = on_processes(tmp_path, 1, explained)
    assert one == pytest.approx(alone, abs=1e-5)
    two, _ = on_processes(tmp_path, 2, explained)
    assert [said for said, _ in two] == pytest.approx([one, one], abs=1e-5)
    mean = np.mean([own for _, own in two])
    assert mean != pytest.approx(one, abs=1e-3), "control: the mean of each process's own"


@pytest.mark.parametrize("where", [0.0, 1e4])
def test_values_are_normalised_as_precisely_far_from_0_as_near_it(tmp_path, where):
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    exact = (values.double() - values.double().mean()) / values.double().std(correction=0)

    def work(_, run, method):
        return run.normalised((values + where)[run.mine(np.arange(64))])

    one, _ = on_processes(tmp_path, 1, work)
    assert torch.allclose(one[0].double(), exact, atol=1e-2 if where else 1e-5)
    two, _ = on_processes(tmp_path, 2, work)
    assert torch.allclose(torch.stack(two, 1).flatten(), one[0], atol=1e-3 if where else 1e-6)


def test_a_whole_run_of_rl100_spends_the_same_on_two_processes(tmp_path):
    """Offline and online: the budget and the learning rates follow from the counters."""
    method = {"stage": "offline", "offline": {"episodes": 8, "starts": 7, "far": 1e9}}
    found = {}
    for count in (1, 2):
        results, runs = on_processes(
            tmp_path, count, lambda _, run, method: method.train(run), method=method
        )
        assert len(results) == count
        lines = metrics_file.read(runs[0].folder)
        found[count] = (
            [getattr(runs[0].spent, name) for name in NUMBERS],
            [line["nfe_per_sample"] for line in lines if "nfe_per_sample" in line],
        )
    assert found[2][0] == pytest.approx(found[1][0])
    assert found[2][1] == pytest.approx(found[1][1])
