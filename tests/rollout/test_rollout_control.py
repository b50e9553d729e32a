"""Rollouts of decisions: what a method learns from, where it stands, and how it is divided."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from genpolicy.config import parse, schema
from genpolicy.config.errors import ConfigError
from genpolicy.learning.advantage import group_relative
from genpolicy.learning.critic import StateValue
from genpolicy.methods import flow_grpo, reinflow
from genpolicy.methods.parts import baseline
from genpolicy.policy.parts.learned_std import LearnedStd
from genpolicy.rollout.episodes import reset_seed
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.run import Run
from tests import toy
from tests.peers import peers, together
from tests.toy_control import GOAL, NEAR, SPEED, STATE, Walk, cloned, experiment, prepared

GRPO = {
    "name": "flow_grpo",
    "groups": 4,
    "group": 3,
    "updates": 2,
    "clip": 0.2,
    "reduce": "sum",
    "advantage": "group",
}
LIMIT = 10


def collected(tmp_path, groups=4, members=3, **sections):
    run, method = prepared(tmp_path, **{"method": GRPO, **sections})
    return run, method, run.collect(groups, members)


# -- what is in a rollout --------------------------------------------------------------------------


def test_rows_are_episodes_in_order_and_each_in_time(tmp_path):
    """The rows follow, by hand, from the reset seeds and the recorded actions alone."""
    run, _, rollout = collected(tmp_path)
    d, row = rollout.decisions, 0
    returns, success = torch.zeros(12).double(), torch.zeros(12).double()
    for episode in range(12):
        walk = Walk(ends=True)
        walk.reset(seed=reset_seed(0, 1, episode // 3))
        place, goal, taken = torch.from_numpy(walk.place), torch.from_numpy(walk.goal), 0
        while True:
            assert int(d.episode[row]) == episode
            assert torch.allclose(
                rollout.context.observation[STATE][row, 0], place.float(), atol=1e-5
            )
            assert torch.allclose(
                rollout.context.observation[GOAL][row, 0], goal.float(), atol=1e-5
            )
            executed = 0
            for action in rollout.outputs[row]:
                before = (goal - place).norm()
                place = place + SPEED * action.clamp(-1, 1).double()
                near = float((goal - place).norm()) < NEAR
                reward = float(before - (goal - place).norm()) + near
                assert float(d.rewards[row, executed]) == pytest.approx(reward, abs=1e-5)
                returns[episode] += reward
                taken, executed = taken + 1, executed + 1
                if near or taken == LIMIT:
                    break
            assert int(d.executed[row]) == executed
            assert (d.rewards[row, executed:] == 0).all()
            assert bool(d.terminated[row]) == near
            assert bool(d.last[row]) == (near or taken == LIMIT)
            row += 1
            if near or taken == LIMIT:
                assert torch.allclose(
                    d.final.observation[STATE][episode, 0], place.float(), atol=1e-5
                )
                success[episode] = near
                break
    assert row == len(rollout.trajectory) == len(d.episode) == d.total
    assert torch.allclose(rollout.rewards.flatten(), returns, atol=1e-5)
    assert torch.allclose(rollout.parts["return"].flatten(), returns, atol=1e-5)
    metrics = run.metrics.close()
    assert metrics["episode/success"] == pytest.approx(float(success.mean()))
    assert metrics["episode/length"] == pytest.approx(float(d.executed.sum()) / 12)
    assert metrics["reward/return"] == pytest.approx(float(returns.mean()), abs=1e-5)
    assert len(d.last.nonzero()) == len(d.final) == 12
    assert rollout.ragged


def test_the_trajectory_belongs_to_its_rows(tmp_path):
    """The stored chain ends in the actions that were executed,
    and is scored again exactly from its stored condition.
    """
    run, method, rollout = collected(tmp_path)
    chains = rollout.trajectory
    assert torch.equal(run.policy.model.decode(chains.x0), rollout.outputs)
    assert torch.equal(run.policy.model.encode(rollout.context), chains.condition)
    for k in chains.steps:
        new, acted = run.policy.transition(chains, k), chains.acted(k)
        assert method.log_ratio(new, acted, chains.after(k)).abs().max() < 1e-3
        wrong = run.policy.transition(replace(chains, condition=chains.condition.roll(1, 0)), k)
        assert method.log_ratio(wrong, acted, chains.after(k)).abs().max() > 1e-2


def test_members_of_a_group_start_alike_and_go_their_own_ways(tmp_path):
    _, _, rollout = collected(tmp_path)
    episode = rollout.decisions.episode
    first = torch.tensor([int((episode == e).nonzero()[0]) for e in range(12)])
    starts = torch.cat(
        [rollout.context.observation[name][first, 0] for name in (STATE, GOAL)], -1
    ).view(4, 3, 4)
    assert torch.equal(starts, starts[:, :1].expand_as(starts))
    assert len(torch.unique(starts[:, 0], dim=0)) == 4
    assert len(torch.unique(rollout.trajectory.x0[first], dim=0)) == 12
    assert len(set(rollout.prompts)) == 4


def test_iterations_begin_elsewhere_and_repeat(tmp_path):
    run, _, rollout = collected(tmp_path)
    again = run.collect(4, 3)
    assert torch.equal(again.trajectory.x0, rollout.trajectory.x0)
    run.spent.iteration = 2
    other = run.collect(4, 3)
    assert not torch.equal(other.context.observation[GOAL][0], rollout.context.observation[GOAL][0])


def test_rows_spread_what_episodes_have(tmp_path):
    _, _, rollout = collected(tmp_path)
    values = torch.arange(12.0).view(4, 3)
    assert torch.equal(rollout.rows(values), rollout.decisions.episode.float())
    assert rollout.rows(values.double()).dtype == torch.float32


def test_a_group_relative_advantage_reaches_every_decision_of_its_episode(tmp_path):
    run, _, rollout = collected(tmp_path)
    advantage = group_relative(rollout.rewards)
    rows, seen = rollout.rows(advantage), []

    def loss(step):
        seen.append(step.advantage)
        return step.new.mean.flatten(1).sum(1) * 0, {}

    for batch in run.minibatches(rollout, 2):
        run.update(rollout, batch, advantage, loss)
        expected = torch.tensor(
            [
                float(advantage.flatten()[int(rollout.decisions.episode[row])])
                for row in batch.rows.tolist()
            ]
        )
        assert torch.allclose(seen[-1], expected, atol=1e-6)
        assert len(seen) % len(rollout.trajectory.steps) == 0
    assert torch.allclose(
        torch.stack([rows[rollout.decisions.episode == e].mean() for e in range(12)]).double(),
        advantage.flatten(),
        atol=1e-5,
    )


def test_environments_side_by_side_change_nothing(tmp_path):
    runs = []
    for count in (1, 3, 20):
        folder = tmp_path / str(count)
        folder.mkdir()
        runs.append(collected(folder, environments=count)[2])
    for other in runs[1:]:
        assert torch.allclose(
            other.trajectory.x, runs[0].trajectory.x, atol=1e-4
        )  # 1e-7 over the noisiest alpha
        assert torch.equal(other.decisions.executed, runs[0].decisions.executed)
        assert torch.allclose(other.rewards, runs[0].rewards, atol=1e-5)
        assert torch.equal(other.decisions.episode, runs[0].decisions.episode)


def test_a_shared_prefix_is_refused_with_a_sentence(tmp_path):
    run, _ = prepared(tmp_path, method=GRPO)
    with pytest.raises(ConfigError, match="shared_prefix is for prompts"):
        run.collect(4, 3, shared_prefix=True)


def test_prompts_are_episodes_of_one_decision(tmp_path):
    run, _ = prepare(
        parse.parse(toy.experiment(tmp_path)), tmp_path / "run", Processes(Accelerator(cpu=True))
    )
    run.spent.iteration = 1
    rollout = run.collect(4, 4)
    d = rollout.decisions
    assert not rollout.ragged
    assert torch.equal(d.episode, torch.arange(16))
    assert torch.equal(d.place, torch.arange(16))
    assert d.total == 16
    assert d.terminated.all()
    assert d.last.all()
    assert torch.allclose(d.rewards[:, 0], rollout.rewards.flatten())
    assert (d.executed == 1).all()


# -- several processes -----------------------------------------------------------------------------


def on_processes(tmp_path, count, work, **sections):
    """``work(run, method)`` on that many processes; a run of its own for each."""
    built, accelerators = [], peers(count)
    for index, accelerator in enumerate(accelerators):
        folder = tmp_path / f"{count}-{index}"
        folder.mkdir()
        built.append(prepared(folder, accelerator, **{"method": GRPO, **sections}))
    return together([partial(work, run, method) for run, method in built], accelerators)


def test_places_are_the_rows_of_one_process(tmp_path):
    """Every row has the number that it has where one process collects everything."""

    def collect(run: Run, method):
        return run.collect(4, 3, updates=2)

    (one,) = on_processes(tmp_path, 1, collect)
    assert torch.equal(one.decisions.place, torch.arange(one.decisions.total))
    two = on_processes(tmp_path, 2, collect)
    places = torch.cat([r.decisions.place for r in two])
    assert torch.equal(places.sort().values, torch.arange(one.decisions.total))
    assert not torch.equal(places, places.sort().values), (
        "the two must own groups that alternate for this to say anything"
    )
    for rollout in two:
        assert rollout.decisions.total == one.decisions.total
        place = rollout.decisions.place
        assert torch.allclose(rollout.trajectory.x0, one.trajectory.x0[place], atol=1e-5)
        assert torch.allclose(rollout.decisions.rewards, one.decisions.rewards[place], atol=1e-5)
        assert torch.equal(rollout.rewards, one.rewards) or torch.allclose(
            rollout.rewards, one.rewards, atol=1e-5
        )
        advantage = group_relative(one.rewards)
        assert torch.allclose(rollout.rows(advantage), one.rows(advantage)[place], atol=1e-4)


KINDS = {
    "minibatches": lambda run, rollout, updates, epoch: list(
        run.minibatches(rollout, updates, epoch + 1)
    )[epoch * updates :],
    "pairs": lambda run, rollout, updates, epoch: list(run.pairs(rollout, updates, epoch)),
    "chains": lambda run, rollout, updates, epoch: list(run.chains(rollout, updates, epoch)),
}


def rows_of(rollout, batch):
    """The (place, k) of a batch's rows; k is None where rows come with all their steps."""
    rows = torch.arange(len(rollout.trajectory))[batch.rows]
    steps = [None] * len(rows) if batch.k is None else batch.k.tolist()
    return list(zip(rollout.decisions.place[rows].tolist(), steps, strict=True))


def whole(kind, total, steps):
    """The (place, k) that an epoch must hold, each once."""
    return sorted(
        (row, k) for row in range(total) for k in ([-1] if kind == "minibatches" else steps)
    )


def sorted_rows(batches):
    return sorted((row, -1 if k is None else k) for batch in batches for row, k in batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("updates", [1, 3, 7])
def test_an_epoch_holds_everything_once_and_epochs_differ(tmp_path, kind, updates):
    run, _, rollout = collected(tmp_path)
    steps = list(rollout.trajectory.steps)
    epochs = [
        [rows_of(rollout, b) for b in KINDS[kind](run, rollout, updates, epoch)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert len(epoch) == updates
        assert sorted_rows(epoch) == whole(kind, rollout.decisions.total, steps)
        sizes = [len(batch) // (len(steps) if kind == "chains" else 1) for batch in epoch]
        assert max(sizes) - min(sizes) <= 1
    if updates > 1:
        assert len({str([sorted(map(str, b)) for b in epoch]) for epoch in epochs}) == 3
    again = [rows_of(rollout, b) for b in KINDS[kind](run, rollout, updates, 1)]
    assert again == epochs[1]
    run.spent.iteration = 2
    if updates > 1:
        assert [rows_of(rollout, b) for b in KINDS[kind](run, rollout, updates, 1)] != epochs[1]


def test_a_chains_steps_stand_together_in_their_order(tmp_path):
    run, _, rollout = collected(tmp_path)
    steps = list(rollout.trajectory.steps)
    for batch in run.chains(rollout, 3, 0):
        assert batch.whole == len(steps)
        assert batch.k is not None
        assert torch.equal(
            batch.k.view(-1, len(steps)), torch.tensor(steps).expand(len(batch.k) // len(steps), -1)
        )
        assert (batch.rows.view(-1, len(steps)) == batch.rows.view(-1, len(steps))[:, :1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 4])
def test_minibatches_are_the_same_on_any_number_of_processes(tmp_path, kind, count):
    def draw(run: Run, method):
        rollout = run.collect(4, 3)
        return [
            [rows_of(rollout, b) for b in KINDS[kind](run, rollout, 3, epoch)] for epoch in range(2)
        ]

    whole_groups = {"method": {**GRPO, "updates": 1}}
    (one,) = on_processes(tmp_path, 1, draw, **whole_groups)
    several = on_processes(tmp_path, count, draw, **whole_groups)
    for epoch in range(2):
        for update in range(3):
            union = [row for process in several for row in process[epoch][update]]
            assert sorted(union, key=str) == sorted(one[epoch][update], key=str)


def still(count):
    """A task whose episodes all have one decision."""
    return {"task": {"name": "tests.toy_control:Point", "limit": 4}, "environments": count}


@pytest.mark.parametrize("rows", [12, 10])
@pytest.mark.parametrize("updates", [2, 3, 5])
def test_episodes_of_one_decision_are_divided_without_a_remainder(tmp_path, rows, updates):
    run, _, rollout = collected(tmp_path, rows, 1, **still(5))
    assert not rollout.ragged
    assert rollout.decisions.total == rows
    batches = [rows_of(rollout, batch) for batch in run.minibatches(rollout, updates)]
    assert sorted_rows(batches) == whole("minibatches", rows, [])


def test_a_value_of_prompts_learns_from_the_same_rows_on_two_processes(tmp_path):
    """Rollouts are collected in one piece; the value's minibatches divide them into others."""

    def draw(run: Run, method):
        rollout = run.collect(8, 1)
        return [rows_of(rollout, b) for b in run.minibatches(rollout, 2)]

    (one,) = on_processes(tmp_path, 1, draw, **still(5))
    two = on_processes(tmp_path, 2, draw, **still(5))
    for update in range(2):
        assert sorted(two[0][update] + two[1][update], key=str) == sorted(one[update], key=str)


def test_processes_agree_on_whether_episodes_have_several_decisions(tmp_path):
    """Groups of which one process has only short episodes:
    both must divide their rows in the same way.
    """

    _, _, rollout = collected(tmp_path)
    d = rollout.decisions
    short = replace(
        d, episode=torch.arange(3), last=torch.ones(3, dtype=torch.bool), place=torch.arange(3)
    )
    short = replace(
        short, terminated=d.terminated[:3], rewards=d.rewards[:3], executed=d.executed[:3]
    )
    assert short.total > 3
    part = replace(rollout, decisions=short, trajectory=rollout.trajectory[:3])
    assert part.ragged, (
        "other processes have rows of the same episodes: 3 rows of this one are not all there is"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_may_have_no_row_of_a_minibatch(tmp_path, kind):
    """Random shares are uneven: with many updates one of two processes has nothing in some of them,
    and the update is still everybody's.
    """

    def learn(run: Run, method):
        rollout = run.collect(4, 1)
        batches = KINDS[kind](run, rollout, 18 if kind == "pairs" else 9, 0)
        sizes = [len(rows_of(rollout, b)) for b in batches]
        chains = torch.arange(rollout.decisions.total).float()[rollout.decisions.place]

        def loss(step):
            return step.new.mean.flatten(1).sum(1) * step.advantage, {
                "index": torch.as_tensor(step.advantage)
            }

        means = [run.update(rollout, b, chains, loss)["index"] for b in batches]
        return sizes, means, run.weights()

    (one,) = on_processes(tmp_path, 1, learn)
    two = on_processes(tmp_path, 2, learn)
    assert any(0 in sizes for sizes, *_ in two), "this must happen for the test to say anything"
    assert min(a + b for a, b in zip(two[0][0], two[1][0], strict=True)) > 0
    for _, means, weights in two:
        assert means == pytest.approx(one[1], abs=1e-4)
        assert (
            max(
                float((a - b).abs().max())
                for a, b in zip(weights.values, one[2].values, strict=True)
            )
            < 1e-5
        )


def test_a_critic_learns_with_empty_shares_too(tmp_path):
    def learn(run: Run, method):
        rollout = run.collect(4, 1)
        head = torch.nn.Linear(4, 1)
        torch.nn.init.ones_(head.weight), torch.nn.init.zeros_(head.bias)
        optimizer = run.new_optimizer(head.parameters(), schema.OptimizerConfig(lr=0.1))
        for batch in KINDS["minibatches"](run, rollout, 6, 0):
            x = rollout.trajectory.condition[batch.rows]
            run.descend(lambda part, x=x: head(x[part])[:, 0] ** 2, len(x), "critic", optimizer)
        return head.weight.detach().clone()

    (one,) = on_processes(tmp_path, 1, learn)
    for weight in on_processes(tmp_path, 2, learn):
        assert torch.allclose(weight, one, atol=1e-5)
    assert not torch.allclose(one, torch.ones(1, 4), atol=1e-2)


SPARSE = {
    "dppo": {
        "chain": {"steps": 5, "kernel": {"name": "ddim", "eta": 1.0}, "window": [2, 4]},
        "method": {
            "name": "dppo",
            "episodes": 4,
            "warm_up": 0,
            "epochs": 2,
            "minibatch": 3,
            "critic_minibatch": 2,
        },
    },
    "reinflow": {
        "chain": {"steps": 3, "kernel": {"name": "ddim", "eta": 0.0}, "window": [0, 3]},
        "method": {
            "name": "reinflow",
            "episodes": 4,
            "warm_up": 0,
            "epochs": 2,
            "minibatch": 2,
            "critic_minibatch": 2,
        },
    },
    "flow_grpo": {"method": {**GRPO, "groups": 4, "group": 2, "updates": 1}},
}
"""Sizes at which minibatches are so small that shares are empty; dppo with a frozen base."""


@pytest.mark.parametrize("name", SPARSE)
def test_methods_learn_the_same_with_empty_shares(tmp_path, monkeypatch, name):
    value, noise = StateValue(4, 16), LearnedStd(4, 8, 0.1, 0.24)
    monkeypatch.setattr(
        baseline, "StateValue", lambda features: deepcopy(value)
    )  # threads share torch's generator
    monkeypatch.setattr(reinflow, "LearnedStd", lambda *_: deepcopy(noise))

    def iterate(run: Run, method):
        honest = run.policy.model.denoise

        def denoise(x, t, condition):
            assert len(x), "most networks can't be asked about no row at all"
            return honest(x, t, condition)

        run.policy.model.denoise, run.iterations = denoise, lambda: iter([1])
        method.train(run)
        evaluations = torch.tensor([run.policy.model.evaluations], dtype=torch.float64)
        return run.weights(), (
            run.learner.optimizer.updates,
            float(run.processes.reduce(evaluations)),
        )

    flow = {"name": "mlp", "hidden": 32, "blocks": 1, "chunk": 4, "family": "flow"}
    sections = {"policy": flow, "optimizer": {"lr": 1e-3, "eps": 1e-4}, **SPARSE[name]}
    ((one, updates),) = on_processes(tmp_path, 1, iterate, **sections)
    for weights, count in on_processes(tmp_path, 2, iterate, **sections):
        assert count == updates
        assert (
            max(float((a - b).abs().max()) for a, b in zip(weights.values, one.values, strict=True))
            < 1e-5
        )


def test_normalised_is_over_the_rows_of_everybody(tmp_path):
    values = torch.randn(10).double() * 3 + 5
    share = {0: values[:7], 1: values[7:]}
    found = torch.cat(
        on_processes(tmp_path, 2, lambda run, _: run.normalised(share[run.processes.index]))
    )
    expected = (values - values.mean()) / (values.std(correction=0) + 1e-8)
    assert torch.allclose(found, expected, atol=1e-9)
    apart = torch.cat([(v - v.mean()) / v.std(correction=0) for v in share.values()])
    assert not torch.allclose(apart, expected, atol=1e-2)  # control: each by itself


def test_normalised_constants_are_zero(tmp_path):
    run, _ = prepared(tmp_path, method=GRPO)
    assert run.normalised(torch.full((5,), 3.7).double()).abs().max() < 1e-3


# -- group-relative methods on control -------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """The folder of a policy that walks slowly."""
    return cloned(tmp_path_factory.mktemp("slow"))


def improved(folder, pretrained, method):
    sizes = {
        "groups": 8,
        "group": 8,
        "updates": 2,
        "clip": 0.2,
        "reduce": "sum",
        "advantage": "group",
    }
    raw = experiment(
        folder,
        policy={"name": "mlp", "pretrained": pretrained},
        task={"name": "tests.toy_control:Point", "limit": 4},
        method={"name": method, **sizes},
        optimizer={"lr": 3e-3},
        budget={"iterations": 15},
        eval={"every": 0, "episodes": 60},
        environments=64,
    )
    return train(parse.parse(raw))


@pytest.mark.parametrize("method", ["flow_grpo", "grpo_guard"])
def test_group_relative_methods_improve_a_robot_policy(tmp_path, slow, method):
    """N episodes from every start state; no value, no change to the method."""
    result = improved(tmp_path, slow, method)
    assert result.summary["replay_gap"] < 0.02
    assert result.after["return"] > result.before["return"] + 0.12
    assert result.summary["env_decisions"] > 15 * 64
    assert result.summary["env_steps"] > result.summary["env_decisions"]


def test_control_a_turned_advantage_makes_a_robot_policy_worse(tmp_path, slow, monkeypatch):
    honest = flow_grpo.clipped_surrogate
    turned = lambda log_rho, advantage, clip: honest(log_rho, -advantage, clip)  # noqa: E731
    monkeypatch.setattr(flow_grpo, "clipped_surrogate", turned)
    result = improved(tmp_path, slow, "flow_grpo")
    assert result.after["return"] < result.before["return"]
