"""DanceGRPO: a start that a group shares, random steps, a loss for each reward, best and worst."""

import pytest
import torch

from genpolicy.chain import Gaussian
from genpolicy.config.errors import ConfigError
from genpolicy.learning.objective import Scored, clipped_surrogate
from genpolicy.methods.dance_grpo import DanceGRPO
from tests.methods.test_laws import prepared

DANCE = {"steps": 6, "kernel": {"name": "sde", "noise": "constant", "a": 0.3}}
TWO = {
    "reward": {"tests.toy:brightness": 1.0, "tests.toy:brightness_strict": 2.0},
    "chain": DANCE,
}


@pytest.mark.parametrize("shared", [True, False])
def test_a_group_shares_its_initial_noise_alone(tmp_path, shared):
    run, method = prepared(tmp_path, "dance_grpo", chain=DANCE)
    method.shared_noise = shared
    (rollout, _), *_ = updates(run, method)
    start = rollout.trajectory.start.view(4, 4, -1)
    assert bool((start[:, 1:] == start[:, :1]).all()) is shared
    later = rollout.trajectory.x[:, 1].view(4, 4, -1)
    assert (later[:, 1:] != later[:, :1]).any(2).all()


def updates(run, method):
    """The rollout and the batch of every update of an iteration."""
    found, honest = [], run.update

    def watched(rollout, batch, *arguments):
        found.append((rollout, batch))
        return honest(rollout, batch, *arguments)

    run.update, run.iterations = watched, lambda: iter([1])
    method.train(run)
    return found


def test_each_row_is_trained_at_six_tenths_of_its_steps_drawn_for_itself(tmp_path):
    run, method = prepared(tmp_path, "dance_grpo", chain=DANCE)
    found = updates(run, method)
    rows = torch.cat([batch.rows for _, batch in found])
    k = torch.cat([batch.k for _, batch in found])
    trained = [frozenset(k[rows == row].tolist()) for row in range(16)]
    assert {len(steps) for steps in trained} == {3}, ".6 of 5"
    assert len(rows) == 48, "each once"
    assert len(set(trained)) > 1, "not the same for all"


def test_a_score_of_each_reward_in_its_group(tmp_path):
    """(R - mean) / (std + 1e-8) with ddof 1, times the reward's weight."""
    run, method = prepared(tmp_path, "dance_grpo", **TWO)
    rollout = run.collect(4, 4)
    found = method.advantages(rollout)
    assert found.shape == (4, 4, 2)
    for place, (name, weight) in enumerate(rollout.weights.items()):
        rewards = rollout.parts[name]
        z = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)
        assert torch.allclose(found[..., place], weight * z)
    biased = rollout.parts["brightness"].std(1, correction=0, keepdim=True)
    assert not torch.allclose(biased, rollout.parts["brightness"].std(1, keepdim=True))


def test_a_row_clipped_for_one_reward_still_learns_from_the_other():
    old = Gaussian(torch.zeros(1, 3), torch.ones(1, 1))
    x = torch.ones(1, 3)
    new = Gaussian(torch.full((1, 3), 0.2, requires_grad=True), old.std)
    rest = {"std": old.std[:, 0], "dt": 0.1, "gain": 1.0, "index": 0, "steps": 1}
    method = DanceGRPO(clip=0.1, reduce="sum")
    apart = Scored(
        new=new, old=old, reference=None, x=x, advantage=torch.tensor([[1.0, -0.4]]), **rest
    )
    log_rho = method.log_ratio(new, old, x)
    assert float(log_rho.exp()) > 1.1
    loss, metrics = method.loss(apart)
    assert torch.allclose(loss, -1.1 * torch.ones(1) + 0.4 * log_rho.exp())
    assert metrics["clip_fraction"].tolist() == [0.5]
    loss.sum().backward()
    assert float(new.mean.grad.abs().sum()) > 0
    added = clipped_surrogate(log_rho, torch.tensor([0.6]), 0.1)
    assert bool(added.clipped.all()), "control: of the sum of advantages nothing is learned"


@pytest.mark.parametrize(("best_of", "best", "worst"), [(4, 2, 2), (5, 3, 2), (2, 1, 1)])
def test_the_best_and_the_worst_of_each_group_are_kept(best_of, best, worst):
    total = torch.stack([torch.arange(6.0), torch.tensor([9.0, 1, 8, 2, 7, 3])])
    kept = DanceGRPO(group=6, best_of=best_of).kept(total)
    for scores, chosen in zip(total, kept, strict=True):
        order = scores.argsort(descending=True)
        expected = {*order[:best].tolist(), *order[6 - worst :].tolist()}
        assert set(chosen.nonzero().flatten().tolist()) == expected


def test_only_kept_rows_are_trained(tmp_path):
    run, method = prepared(tmp_path, "dance_grpo", chain=DANCE)
    method.best_of = 2
    rows = torch.cat([batch.rows for _, batch in updates(run, method)])
    assert len(rows.unique()) == 8, "two of each of four groups"


def test_more_kept_rows_than_a_group_has_are_refused():
    with pytest.raises(ConfigError, match="a group has 4 rows"):
        DanceGRPO(group=4, best_of=6)
