"""B²-DiffuRL: the growing interval, branchings, which branches are learned from, and both losses."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Gaussian
from genpolicy.config import leaves
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON
from genpolicy.learning.advantage import StageHistory
from genpolicy.learning.objective import Scored
from genpolicy.methods.b2_diffurl import B2DiffuRL
from genpolicy.rollout.minibatch import Batch
from tests import toy_control
from tests.methods.test_laws import prepared

# -- the interval ----------------------------------------------------------------------------------


def test_the_published_interval_grows_from_14_to_20_of_20_steps():
    """L_i = 14 + floor(i * (20 - 14 + 1) / 100) in stage i of 100, by hand at seven places."""
    method, window = B2DiffuRL(), range(20)
    lengths = [len(method.interval(window, stage / 100)) for stage in range(100)]
    by_hand = {0: 14, 14: 14, 15: 15, 28: 15, 29: 16, 57: 17, 58: 18, 85: 19, 86: 20, 99: 20}
    assert {stage: lengths[stage] for stage in by_hand} == by_hand
    assert lengths == sorted(lengths)
    assert len(method.interval(window, 1.0)) == 20
    assert all(method.interval(window, p / 9).stop == 20 for p in range(9)), "it ends at the sample"


def test_the_interval_is_a_share_of_any_window():
    assert B2DiffuRL().interval(range(7), 0.0) == range(2, 7)
    assert B2DiffuRL(first=0.3, last=0.6).interval(range(2, 12), 1.0) == range(6, 12)
    assert B2DiffuRL(first=0.01).interval(range(3), 0.0) == range(2, 3), "at least one step"


def test_an_interval_that_shrinks_is_refused():
    with pytest.raises(ConfigError, match="first must not be larger"):
        B2DiffuRL(first=0.9, last=0.5)


# -- the score -------------------------------------------------------------------------------------


def test_the_score_is_over_the_prompt_and_the_iterations_before():
    history = StageHistory(past=1)
    history(torch.tensor([[0.0, 1.0]]).double(), ["a"], 1)
    history(torch.tensor([[5.0, 5.0], [1.0, 3.0]]).double(), ["b", "a"], 2)
    found = history(torch.tensor([[2.0, 4.0], [7.0, 7.0]]).double(), ["a", "c"], 3)
    pool = torch.tensor([1.0, 3.0, 2.0, 4.0]).double()  # of iteration 1 nothing is left
    assert torch.allclose(found[0], (torch.tensor([2.0, 4.0]).double() - pool.mean()) / pool.std())
    assert found[1].tolist() == [0, 0]
    assert set(history.stages) == {2, 3}
    biased = (torch.tensor([2.0, 4.0]).double() - pool.mean()) / pool.std(correction=0)
    assert not torch.allclose(found[0], biased), "control: the std has ddof 1"


def test_a_history_goes_on_from_its_state():
    one, other = StageHistory(), StageHistory()
    one(torch.rand(2, 3).double(), ["a", "b"], 1)
    other.load_state_dict(one.state_dict())
    rewards = torch.rand(1, 3).double()
    assert torch.equal(one(rewards, ["a"], 2), other(rewards, ["a"], 2))
    assert not torch.equal(one(rewards, ["a"], 3), StageHistory()(rewards, ["a"], 3))


# -- which branches are learned from ---------------------------------------------------------------

Z = torch.tensor(
    [
        [0.9, 0.1, -0.9],  # both
        [0.6, 0.2, 0.4],  # the best alone: the worst is above the prompt's mean
        [-0.1, -0.8, -0.6],  # the worst alone
        [0.2, 0.1, -0.2],  # nothing is far enough
        [0.7, 0.7, 0.7],  # all the same and good: one is learned from, as released
        [-0.7, -0.7, -0.7],  # all the same and bad: one is, too
    ]
)


def test_the_released_selection_takes_none_one_or_two_of_a_branching():
    found = B2DiffuRL(threshold=0.5).selected(Z)
    by_hand = torch.tensor(
        [[0.9, 0, -0.9], [0.6, 0, 0], [0, -0.8, 0], [0, 0, 0], [0.7, 0, 0], [-0.7, 0, 0]]
    )
    assert torch.allclose(found, by_hand)


def test_the_described_selection_compares_inside_the_branching():
    found = B2DiffuRL(threshold=0.5, selection="branch").selected(Z)
    by_hand = torch.tensor(
        [[0.9, 0, -0.9], [0, 0, 0], [0.35, -0.35, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    )
    assert torch.allclose(found, by_hand)


def test_the_signs_have_weights_of_their_own():
    found = B2DiffuRL(positive=2.0, negative=0.0).selected(Z)
    assert found[0].tolist() == pytest.approx([1.8, 0, 0])


# -- branchings ------------------------------------------------------------------------------------


def test_branches_share_their_chain_up_to_the_branching_and_no_further(tmp_path):
    run, _ = prepared(tmp_path, "b2_diffurl", chain={"steps": 6, "kernel": DDIM})
    chains = run.collect(3, 4, branch_at=2).trajectory
    assert chains.steps == range(2, 5)
    trunk, after = chains.x[:, 0].view(3, 4, -1), chains.x[:, 1].view(3, 4, -1)
    assert torch.equal(trunk, trunk[:, :1].expand_as(trunk))
    assert (after[:, 1:] != after[:, :1]).all(), "noise of their own"
    # the steps of the trunk are as noisy as all others
    free = run.collect(3, 4, branch_at=0).trajectory
    assert torch.equal(free.start.view(3, 4, -1)[:, 0], chains.start.view(3, 4, -1)[:, 0])
    ode = run.collect(3, 4, shared_prefix=True, window=(2, 5)).trajectory
    assert not torch.equal(ode.x[::4, 0], chains.x[::4, 0]), "control: a prefix without noise"


@pytest.mark.parametrize("branch", [-1, 5, 9])
def test_a_branching_behind_the_last_noise_is_refused(tmp_path, branch):
    run, _ = prepared(tmp_path, "b2_diffurl", chain={"steps": 6, "kernel": DDIM})
    with pytest.raises(ValueError, match="from 0 to 4"):
        run.collect(1, 2, branch_at=branch)


DDIM = {"name": "ddim", "eta": 1.0}


def steps_trained(run, method, iterations):
    """The steps and the rows of every update."""
    found, honest = [], run.update

    def watched(rollout, batch, *arguments):
        found.append((set(batch.k.tolist()), batch, rollout))
        return honest(rollout, batch, *arguments)

    run.update = watched
    run.iterations = lambda: iter(range(1, iterations + 1))
    method.train(run)
    return found


def test_only_the_interval_is_trained(tmp_path):
    run, method = prepared(tmp_path, "b2_diffurl", chain={"steps": 8, "kernel": DDIM})
    method.first, method.last, method.threshold = 0.4, 1.0, 0.0
    found = steps_trained(run, method, 1)  # a quarter of the budget is spent after it
    assert set().union(*(steps for steps, _, _ in found)) == {3, 4, 5, 6}, "the last 3 + 1 of 7"


@pytest.mark.parametrize("branching", [True, False])
def test_without_branching_a_group_shares_nothing(tmp_path, branching):
    run, method = prepared(tmp_path, "b2_diffurl", chain={"steps": 8, "kernel": DDIM})
    method.branching, method.threshold = branching, 0.0
    (_, _, rollout), *_ = steps_trained(run, method, 1)
    begun = rollout.trajectory.start.view(4, 4, -1)
    assert bool((begun[:, 1:] == begun[:, :1]).all()) is branching


def test_an_iteration_of_which_nothing_is_kept_is_no_update(tmp_path):
    constant = {"reward": {"tests.toy:constant": 1.0}, "eval": {"every": 0, "samples": 4}}
    run, method = prepared(tmp_path, "b2_diffurl", **constant)
    before = run.weights().values
    assert steps_trained(run, method, 2) == []
    after = run.weights().values
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# -- the losses ------------------------------------------------------------------------------------


def scored(shift: float, advantage: Tensor) -> Scored:
    """Pairs of transitions whose means move by ``shift`` towards each sample."""
    old = Gaussian(torch.zeros(len(advantage), 3), torch.full((len(advantage), 1), 0.5))
    x = torch.randn(len(advantage), 3)
    new = Gaussian((shift * x).requires_grad_(), old.std)
    steps = {"std": old.std[:, 0], "dt": 0.1, "gain": 1.0, "index": 0, "steps": 1}
    return Scored(new=new, old=old, reference=None, x=x, advantage=advantage, **steps)


def test_the_preference_loss_is_the_logistic_loss_of_the_pair():
    advantage = torch.tensor([1.0, -1.0] * 4)
    method = B2DiffuRL(objective="preference", temperature=0.7)
    step = scored(0.1, advantage)
    loss, metrics = method.loss(step)
    log_rho = method.log_ratio(step.new, step.old, step.x)
    for pair in range(4):
        best, worst = 2 * pair, 2 * pair + 1
        expected = -torch.sigmoid(0.7 * (log_rho[best] - log_rho[worst])).log()
        assert torch.allclose(loss[best : worst + 1], expected)
    assert set(metrics["preferred"].tolist()) <= {0.0, 1.0}


def test_at_the_policy_that_drew_both_losses_have_one_direction():
    """Their gradients differ by a factor: temperature / 2, once the pair is weighed by A = +-1."""
    advantage, gradients = torch.tensor([1.0, -1.0] * 4), {}
    for objective in ("gradient", "preference"):
        torch.manual_seed(1)
        step = scored(0.0, advantage)
        loss, _ = B2DiffuRL(objective=objective).loss(step)
        loss.sum().backward()
        gradients[objective] = step.new.mean.grad
    assert torch.allclose(gradients["preference"], gradients["gradient"], atol=1e-6)


def test_a_preferred_pair_stands_together_at_one_step(tmp_path):
    run, method = prepared(tmp_path, "b2_diffurl", chain={"steps": 6, "kernel": DDIM})
    method.objective, method.threshold = "preference", 0.0
    rollout = run.collect(4, 4, branch_at=2).ungrouped()
    advantage = method.selected(torch.randn(4, 4))
    pairs = 0
    for batch in method.batches(run, rollout, advantage, 0):
        assert isinstance(batch, Batch)
        best, worst = batch.rows.view(-1, 2).unbind(1)
        assert torch.equal(best // 4, worst // 4), "of one branching"
        assert (advantage.flatten()[best] > 0).all()
        assert (advantage.flatten()[worst] < 0).all()
        assert torch.equal(*batch.k.view(-1, 2).unbind(1))
        pairs += len(best)
    assert pairs == 4 * len(rollout.trajectory.steps)


# -- robots ----------------------------------------------------------------------------------------


def test_on_a_robot_a_branching_is_a_decision_that_the_critic_judges(tmp_path):
    judge = {"episodes": 4, "critic_updates": 5}
    run, method = toy_control.prepared(
        tmp_path,
        method={"name": "b2_diffurl", "groups": 8, "group": 3, "judge": judge, "threshold": 0.1},
    )
    found = steps_trained(run, method, 2)
    rollout = found[0][2]
    assert len(rollout.trajectory) == 24
    condition = rollout.trajectory.condition.view(8, 3, -1)
    assert torch.equal(condition, condition[:, :1].expand_as(condition)), "one decision, N times"
    trunk = rollout.trajectory.x[:, 0].view(8, 3, -1)
    assert torch.equal(trunk, trunk[:, :1].expand_as(trunk))
    assert run.metrics.env_steps > 0
    steps, chunk = run.metrics.env_steps, run.policy.model.executed
    assert steps / chunk <= run.metrics.collected <= steps, "decisions that were played, no others"


def test_every_setting_says_where_its_default_is_from():
    names = {f.name for f in fields(leaves.leaf("methods", "b2_diffurl", PERSON))}
    assert {"history", "threshold", "positive", "negative", "selection", "objective"} <= names
