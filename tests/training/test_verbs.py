"""The verbs of a run, each by itself: what is drawn, shared, passed over, redrawn and learned."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from genpolicy.chain.noise import PRIOR
from genpolicy.config import parse
from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.reward import RewardError
from genpolicy.contracts.task import Context
from genpolicy.evaluation import metrics_file
from genpolicy.learning.objective import log_ratio
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.models.toy import Toy
from genpolicy.policy.parts.base import Base
from genpolicy.policy.weights import Pool, Weights
from genpolicy.rollout import minibatch
from genpolicy.rollout.minibatch import Batch
from genpolicy.training.experiment import train
from genpolicy.training.optimizer import Optimizer, step_together
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.requirements import Needs
from tests import toy, toy_control
from tests.peers import peers, together

GRPO = {"name": "flow_grpo", "groups": 4, "group": 4, "clip": 0.2, "advantage": "group"}
WORLDS = {"prompts": toy.experiment, "robots": toy_control.experiment}


def prepared(folder, accelerator=None, world="prompts", **sections):
    """A run at iteration 1, without a loop around it."""
    raw = WORLDS[world](folder, **{"method": GRPO, **sections})
    processes = Processes(accelerator or Accelerator(cpu=True))
    run, _ = prepare(parse.parse(raw), folder / "run", processes)
    run.begin(1)
    return run


def on_processes(folder, count, work, **options):
    """Returns the results of ``work(run)`` on ``count`` processes, each with a run of its own."""
    accelerators, runs = peers(count), []
    for index, accelerator in enumerate(accelerators):
        place = folder / f"{count}-{index}"
        place.mkdir()
        runs.append(prepared(place, accelerator, **options))
    return together([partial(work, run) for run in runs], accelerators)


def largest_difference(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# Drawing


def drawn(run, purpose, number):
    """One draw of each kind under this key."""
    place = torch.arange(3)
    return (
        tuple(run.generator(purpose, number).integers(1 << 62, size=4).tolist()),
        tuple(run.rows(1 << 62, 4, purpose, number).tolist()),
        tuple(run.noise(purpose, place, number)(0, (2,)).flatten().tolist()),
    )


def test_a_key_names_its_draws_and_no_two_keys_share_a_stream(tmp_path):
    run = prepared(tmp_path)
    keys = [
        (purpose, number, iteration)
        for purpose in ("a", "a 0", "b", "")
        for number in (0, 1, 2)
        for iteration in (1, 2)
    ]
    found = {}
    for purpose, number, iteration in keys:
        run.begin(iteration)
        found[purpose, number, iteration] = drawn(run, purpose, number)
    for kind in range(3):
        assert len({each[kind] for each in found.values()}) == len(keys)
    run.begin(1)
    assert drawn(run, "a", 2) == found["a", 2, 1]
    longer, shorter = np.random.default_rng([7, 1, 0]), np.random.default_rng([7, 1])
    assert longer.integers(1 << 62) == shorter.integers(1 << 62), (
        "control: keys of several lengths would share one"
    )


def test_a_draw_without_a_number_is_number_0_of_its_own_purpose(tmp_path):
    run = prepared(tmp_path)
    assert torch.equal(run.rows(1000, 8, "critic"), run.rows(1000, 8, "critic", 0))
    assert not torch.equal(run.rows(1000, 8, "critic"), run.rows(1000, 8, "critic 0"))


def test_another_seed_draws_otherwise(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a, b = prepared(tmp_path / "a"), prepared(tmp_path / "b", seed=1)
    assert all(x != y for x, y in zip(drawn(a, "a", 0), drawn(b, "a", 0), strict=True))


def test_two_processes_draw_what_one_draws_each_its_share(tmp_path):
    def work(run):
        place = run.mine(np.arange(7))
        noise = run.noise("renoised", place, 3)(PRIOR, (2, 4))
        uniform = run.mine(run.generator("times", 1).random((2, 7)))
        return place, run.rows(1000, 7, "rows"), run.rows(1000, (2, 7), "rows", 1), noise, uniform

    (one,) = on_processes(tmp_path, 1, work)
    assert one[1].shape == (7,)
    assert one[2].shape == (2, 7)
    two = on_processes(tmp_path, 2, work)
    assert sorted(torch.cat([place for place, *_ in two]).tolist()) == list(range(7))
    for place, rows, table, noise, uniform in two:
        assert torch.equal(rows, one[1][place])
        assert torch.equal(table, one[2][:, place])
        assert torch.equal(noise, one[3][place])
        assert torch.equal(uniform, one[4][:, place])
    assert not torch.equal(two[0][1], two[1][1][: len(two[0][1])]), "control: shares differ"


# Contexts


def test_contexts_of_prompts_draw_and_judge_nothing(tmp_path):
    run = prepared(tmp_path, reward={"tests.toy:nan": 1.0}, eval={"every": 0, "samples": 4})
    context, place = run.contexts(4)
    assert torch.equal(place, torch.arange(4))
    assert run.policy.model.evaluations == 0
    with pytest.raises(RewardError):  # control: a rollout is drawn and judged
        run.collect(4, 1)
    assert run.policy.model.evaluations > 0
    (tmp_path / "judged").mkdir()
    assert tuple(context.prompts) == prepared(tmp_path / "judged").collect(4, 2).prompts


def test_contexts_of_prompts_go_on_from_iteration_to_iteration(tmp_path):
    task = {"name": "prompts", "prompts": str(tmp_path / "prompts.txt"), "order": "sequential"}
    run, found = prepared(tmp_path, task=task), []
    for iteration in (1, 2):
        run.begin(iteration)
        found += run.contexts(2)[0].prompts
    assert tuple(found) == toy.PROMPTS


@pytest.mark.parametrize("world", WORLDS)
def test_the_shares_of_two_processes_make_the_whole_of_one(tmp_path, world):
    def work(run):
        context, place = run.contexts(7)
        assert run.policy.model.evaluations == 0
        return context, place, run.policy.model.encode(context).detach()

    ((context, place, encoded),) = on_processes(tmp_path, 1, work, world=world)
    assert torch.equal(place, torch.arange(7))
    two = on_processes(tmp_path, 2, work, world=world)
    assert sorted(torch.cat([mine for _, mine, _ in two]).tolist()) == list(range(7))
    for seen, mine, codes in two:
        assert list(seen.prompts) == [context.prompts[p] for p in mine.tolist()]
        assert torch.allclose(codes, encoded[mine], atol=1e-6)
        assert not torch.allclose(codes, encoded[: len(mine)], atol=1e-3) or len(mine) == 0


def test_contexts_of_recorded_frames_are_rows_of_the_data(tmp_path):
    run = prepared(tmp_path, world="robots")
    context, _ = run.contexts(5)
    rows = run.rows(len(run.data), 5, "contexts")
    seen = context.observation[toy_control.STATE][:, -1]
    assert torch.equal(seen, run.data.values[toy_control.STATE][rows])
    run.begin(2)
    assert not torch.equal(run.contexts(5)[0].observation[toy_control.STATE][:, -1], seen)


@dataclass
class Captions:
    """Nine captioned pictures in memory; no caption is a prompt of the task."""

    def __len__(self):
        return 9

    def pictures(self, index):
        captions = [f"caption {row}" for row in index.tolist()]
        return Context(captions), torch.full((len(index), 3, 8, 8), 0.5)


PICTURES = {
    "data": {"name": f"{__name__}:Captions"},
    "reward": {"tests.toy:nan": 1.0},
    "eval": {"every": 0, "samples": 4},
}
"""An experiment on captioned pictures; whoever judges anything is refused."""


def test_contexts_of_captioned_pictures_are_drawn_captions_and_nothing_is_judged(tmp_path):
    def work(run):
        context, place = run.contexts(7)
        assert run.policy.model.evaluations == 0
        return list(context.prompts), place

    ((captions, place),) = on_processes(tmp_path, 1, work, **PICTURES)
    assert torch.equal(place, torch.arange(7))
    assert len(set(captions)) > 1
    two = on_processes(tmp_path, 2, work, **PICTURES)
    assert sorted(torch.cat([mine for _, mine in two]).tolist()) == list(range(7))
    for seen, mine in two:
        assert seen == [captions[p] for p in mine.tolist()]
    (tmp_path / "again").mkdir()
    run = prepared(tmp_path / "again", **PICTURES)
    rows = run.rows(len(run.data), 7, "contexts")
    assert captions == [f"caption {row}" for row in rows.tolist()]
    run.begin(2)
    assert run.contexts(7)[0].prompts != captions
    with pytest.raises(RewardError):  # control: a rollout is judged
        run.collect(4, 1)


# Passes over chosen rows

PASSES = {
    "minibatches": lambda run, rollout, updates, epoch, chosen: run.minibatches(
        rollout, updates, epoch + 1, chosen
    ),
    "pairs": lambda run, *rest: run.pairs(*rest),
    "chains": lambda run, *rest: run.chains(*rest),
}


def held(rollout, batch):
    """The (place, step) pairs of a minibatch;
    rows that come with all their steps have step None.
    """
    rows = torch.arange(len(rollout.trajectory))[batch.rows]
    steps = [None] * len(rows) if batch.k is None else batch.k.tolist()
    return list(zip(rollout.decisions.place[rows].tolist(), steps, strict=True))


def in_order(pairs):
    return sorted(pairs, key=str)


def everything(kind, rollout, places):
    """The (place, step) pairs that an epoch over these places must hold, each once."""
    steps = [None] if kind == "minibatches" else list(rollout.trajectory.steps)
    return sorted([(place, k) for place in places for k in steps], key=str)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("world", WORLDS)
def test_a_pass_over_chosen_rows_holds_each_of_them_once_and_no_other(tmp_path, kind, world):
    run = prepared(tmp_path, world=world)
    rollout = run.collect(4, 4)
    place = rollout.decisions.place
    chosen = place % 5 == 0
    found = [held(rollout, b) for b in PASSES[kind](run, rollout, 3, 0, chosen)]
    wanted = everything(kind, rollout, place[chosen].tolist())
    assert in_order(chain.from_iterable(found)) == wanted
    again = [held(rollout, b) for b in PASSES[kind](run, rollout, 3, 0, chosen)]
    assert again == found
    whole = [held(rollout, b) for b in PASSES[kind](run, rollout, 3, 0, None)]
    assert in_order(chain.from_iterable(whole)) == everything(kind, rollout, place.tolist())


@pytest.mark.parametrize("kind", PASSES)
def test_every_epoch_is_a_pass_in_an_order_of_its_own(tmp_path, kind):
    run = prepared(tmp_path, world="robots")
    rollout = run.collect(4, 4)
    chosen = rollout.decisions.place % 2 == 0
    first = [held(rollout, b) for b in PASSES[kind](run, rollout, 2, 0, chosen)]
    later = [held(rollout, b) for b in PASSES[kind](run, rollout, 2, 1, chosen)]
    later = later[len(first) :] if kind == "minibatches" else later
    assert in_order(chain.from_iterable(first)) == in_order(chain.from_iterable(later))
    assert first != later


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("world", WORLDS)
def test_minibatches_without_a_chosen_row_are_left_out_on_all_processes_alike(
    tmp_path, kind, world
):
    def work(run):
        rollout = run.collect(4, 4)
        chosen = torch.isin(rollout.decisions.place, torch.tensor([3, 10, 12]))
        name = "rows" if kind == "minibatches" else kind
        plain, order = getattr(minibatch, name), run.generator(f"pass over {name}", 0)
        unfiltered = [len(b) for b in plain(rollout, 8, order, chosen)]
        batches = list(PASSES[kind](run, rollout, 8, 0, chosen))
        return [held(rollout, b) for b in batches], unfiltered

    ((one, unfiltered),) = on_processes(tmp_path, 1, work, world=world)
    assert all(one)
    assert 0 in unfiltered, "control: some minibatch must be empty"
    assert len(one) == sum(size > 0 for size in unfiltered)
    (a, _), (b, _) = on_processes(tmp_path, 2, work, world=world)
    assert len(a) == len(b) == len(one)
    if kind != "pairs":
        assert [] in a or [] in b, "one process has no row of a minibatch that the other fills"
    for mine, others, whole in zip(a, b, one, strict=True):
        assert in_order(mine + others) == in_order(whole)


def test_no_chosen_row_is_no_minibatch(tmp_path):
    def work(run):
        rollout = run.collect(4, 2)
        nothing = torch.zeros(len(rollout.trajectory), dtype=torch.bool)
        return [len(list(PASSES[kind](run, rollout, 2, 0, nothing))) for kind in PASSES]

    for count in (1, 2):
        assert on_processes(tmp_path, count, work) == [[0, 0, 0]] * count


def test_rows_of_groups_that_share_their_start_are_not_chosen_one_by_one(tmp_path):
    run = prepared(tmp_path)
    rollout = run.collect(4, 4, shared_prefix=True)
    chosen = rollout.decisions.place % 2 == 0
    with pytest.raises(ValueError, match="share their start"):
        list(run.minibatches(rollout, 1, 1, chosen))
    apart = replace(rollout, trajectory=replace(rollout.trajectory, shared=1))
    assert sum(map(len, run.minibatches(apart, 1, 1, chosen))) == 8


# Redrawing


def redrawn(run, groups=4, members=3, **options):
    """Redrawn decisions at this process's share of so many prompts, and how often it asked."""
    context, group = run.contexts(groups)
    place = (group[:, None] * members + torch.arange(members)).flatten()
    condition = run.policy.model.encode(context).repeat_interleave(members, 0)
    before = run.policy.model.evaluations
    rollout = run.redraw(condition, place, groups * members, members=members, **options)
    return rollout, run.policy.model.evaluations - before


def spread(states, members):
    """The largest distance within each group, [m]."""
    grouped = states.unflatten(0, (-1, members))
    return (grouped - grouped[:, :1]).abs().flatten(1).amax(1)


@pytest.mark.parametrize("branch_at", [None, 1])
def test_decisions_are_redrawn_as_memory_allows(tmp_path, branch_at):
    """Whole groups at a time, to the numbers and for the evaluations of all at once."""
    run = prepared(tmp_path)
    whole, evaluations = redrawn(run, branch_at=branch_at)
    asked, denoise = [], run.policy.model.denoise

    def watched(x, t, condition):
        asked.append(len(x))
        return denoise(x, t, condition)

    run.policy.model.denoise = watched
    run.micro_batches.size = 7  # two groups of three
    parts, again = redrawn(run, branch_at=branch_at)
    assert max(asked) <= 6
    assert again == evaluations
    for name in ("start", "x", "mean", "std", "x0"):
        a, b = (getattr(rollout.trajectory, name) for rollout in (whole, parts))
        assert torch.allclose(a, b, atol=1e-6), name
    assert len(parts.trajectory.condition) == len(whole.trajectory.condition)


def test_groups_that_are_divided_among_processes_are_not_redrawn(tmp_path):
    """The shares of `contexts` are single rows: their members would meet others in a group."""

    def work(run):
        context, place = run.contexts(8)
        with pytest.raises(ValueError, match="whole groups of 2 consecutive numbers"):
            run.redraw(run.policy.model.encode(context), place, 8, members=2)
        return len(run.redraw(run.policy.model.encode(context), place, 8).trajectory)  # control

    assert on_processes(tmp_path, 2, work) == [4, 4]


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_members_of_a_group_share_exactly_their_first_steps(tmp_path, k):
    """K = 4 steps, the first three of which draw noise."""
    run = prepared(tmp_path)
    rollout, evaluations = redrawn(run, branch_at=k)
    chains = rollout.trajectory
    assert chains.steps == range(k, 3)
    assert (spread(chains.start, 3) == 0).all()
    assert (spread(chains.before(k), 3) == 0).all()
    assert (spread(chains.after(k), 3) > 0.1).all()
    assert (spread(chains.x0, 3) > 0.1).all()
    trunks = chains.before(k)[::3]
    assert (trunks[1:] - trunks[:-1]).flatten(1).abs().amax(1).min() > 0.1, "groups differ"
    # the network is asked once per group up to the branch, and at the branch itself
    assert evaluations == 4 * (k + 1) + 12 * (4 - k - 1)
    apart, whole = redrawn(run)
    assert (spread(apart.trajectory.start, 3) > 0.1).all(), "control: without a branch they differ"
    assert apart.trajectory.steps == range(3)
    assert whole == 12 * 4


def test_the_shared_steps_are_drawn_with_noise_of_the_group(tmp_path):
    """A shared step moves as far from its mean as any other: it is not the mean itself."""
    run = prepared(tmp_path)
    chains = redrawn(run, branch_at=2)[0].trajectory
    again = redrawn(run, branch_at=2)[0].trajectory
    other = redrawn(run, branch_at=2, number=1)[0].trajectory
    assert torch.equal(chains.x, again.x)
    assert not torch.allclose(chains.before(2), other.before(2), atol=0.1)
    trunk = run.policy.chain.sample(
        run.policy.denoiser,
        chains.condition[::3],
        replace(run.noise("redraw", torch.arange(4)), member=torch.full((4,), -1)),
        run.policy.model.event_shape,
    )
    assert torch.allclose(trunk.before(2), chains.before(2)[::3], atol=1e-6)


def test_branched_decisions_are_scored_as_they_were_drawn(tmp_path):
    run = prepared(tmp_path)
    rollout, _ = redrawn(run, branch_at=1)

    def loss(step):
        found = log_ratio(step.new, step.old, step.x, reduce="sum")
        return found, {"away": found.detach().abs(), "index": torch.full((12,), float(step.index))}

    found = run.update(rollout, Batch(slice(0, 12)), torch.zeros(12), loss)
    assert found["away"] < 1e-4
    assert found["index"] == 0.5, "the two steps from the branch on"
    moved = run.update(rollout, Batch(slice(0, 12)), torch.zeros(12), loss)
    assert moved["away"] > 1e-3, "control: the weights have moved"


@pytest.mark.parametrize("k", [-1, 3, 4, 9])
def test_a_branch_outside_of_the_window_is_refused(tmp_path, k):
    with pytest.raises(ValueError, match="branch_at"):
        redrawn(prepared(tmp_path), branch_at=k)


def test_a_branch_keeps_the_whole_window_whatever_window_the_iteration_draws(tmp_path):
    """Windows of one step: those that end before the branch have no noise after it."""
    run = prepared(
        tmp_path,
        chain={"steps": 4, "kernel": {"name": "ddim", "eta": 1.0}, "window_size": 1},
    )
    ends = set()
    for iteration in range(1, 9):
        run.spent.iteration = iteration
        ends.add(redrawn(run)[0].trajectory.steps.stop)
        assert redrawn(run, branch_at=1)[0].trajectory.steps == range(1, 3)
    assert ends == {1, 2, 3}, "control: the iterations draw all windows"


def likelihood(step):
    return -step.new.log_prob(step.x, reduce="sum"), {}


@pytest.mark.parametrize("k", [None, 1])
def test_a_process_without_rows_redraws_nothing_and_learns_with_the_others(tmp_path, k):
    def work(run):
        empty = run.processes.index == 1
        groups = 0 if empty else 2
        context, group = run.contexts(4)
        place = (torch.arange(groups)[:, None] * 3 + torch.arange(3)).flatten()
        condition = run.policy.model.encode(context)[group[:groups] * 0]
        before = run.policy.model.evaluations
        rollout = run.redraw(condition.repeat_interleave(3, 0), place, 6, members=3, branch_at=k)
        asked = run.policy.model.evaluations - before
        for batch in run.minibatches(rollout, 1):
            run.update(rollout, batch, torch.ones(len(rollout.trajectory)), likelihood)
        return len(rollout.trajectory), asked, run.weights().values

    (rows, asked, one), (none, nothing, other) = on_processes(tmp_path, 2, work)
    assert (rows, none, nothing) == (6, 0, 0)
    assert asked > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("k", [None, 1])
def test_two_processes_redraw_what_one_redraws(tmp_path, k):
    def work(run):
        rollout, evaluations = redrawn(run, branch_at=k)
        return rollout.decisions.place, rollout.trajectory.x, rollout.trajectory.x0, evaluations

    ((place, x, x0, evaluations),) = on_processes(tmp_path, 1, work)
    assert torch.equal(place, torch.arange(12))
    two = on_processes(tmp_path, 2, work)
    assert sum(each[3] for each in two) == evaluations
    for mine, states, ends, _ in two:
        assert torch.allclose(states, x[mine], atol=1e-5)
        assert torch.allclose(ends, x0[mine], atol=1e-5)


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("kind", PASSES)
def test_two_processes_pass_over_redrawn_decisions_as_one_does(tmp_path, kind, chosen):
    def work(run):
        rollout, _ = redrawn(run)
        some = rollout.decisions.place % 5 == 0 if chosen else None
        return [held(rollout, b) for b in PASSES[kind](run, rollout, 3, 0, some)]

    (one,) = on_processes(tmp_path, 1, work)
    a, b = on_processes(tmp_path, 2, work)
    assert [in_order(x + y) for x, y in zip(a, b, strict=True)] == [
        in_order(whole) for whole in one
    ]


@pytest.mark.parametrize("k", [None, 2])
def test_experience_redraws_at_the_decisions_whose_indices_it_returns(tmp_path, k):
    """Samples of one decision stand together and share their first k steps."""

    def work(run):
        experience = Experience(run, cut_fails=False)
        before = run.policy.model.evaluations
        rollout, index = experience.redraw(4, 1, samples=3, branch_at=k)
        evaluations = run.policy.model.evaluations - before
        seen = experience.conditions[experience.replay.now[index]]
        assert torch.equal(rollout.trajectory.condition, seen)
        other = experience.conditions[experience.replay.now[index.roll(3)]]
        assert not torch.equal(rollout.trajectory.condition, other)
        return rollout, index, evaluations

    options = {"world": "robots", "data": {"name": "tests.rl100_toy:Outcomes", "episodes": 12}}
    ((rollout, index, evaluations),) = on_processes(tmp_path, 1, work, **options)
    chains = rollout.trajectory
    assert index.view(4, 3).eq(index.view(4, 3)[:, :1]).all()
    assert len(index.unique()) > 1
    assert evaluations == (12 * 4 if k is None else 4 * (k + 1) + 12 * (4 - k - 1))
    shared = spread(chains.before(chains.first), 3) == 0
    assert shared.all() if k is not None else not shared.any()
    assert (spread(chains.x0, 3) > 0).all()
    two = on_processes(tmp_path, 2, work, **options)
    assert sum(each[2] for each in two) == evaluations
    for mine, found, _ in two:
        place = mine.decisions.place
        assert torch.equal(found, index[place])
        assert torch.allclose(mine.trajectory.x0, chains.x0[place], atol=1e-5)


# Descending


def scaled(run, rows):
    """(losses, their rows' numbers) on the model's last bias: squares of what it should be."""
    bias = run.trainable[-1]

    def losses(part):
        wanted = rows[part].double()
        value = ((bias[0] - wanted) ** 2 + bias[1] * wanted).float()
        return value, {"row": rows[part].float(), "square": rows[part].float() ** 2}

    return losses


SHARES = {
    1: [torch.arange(6)],
    2: [torch.arange(6), torch.arange(0)],
    3: [torch.tensor([3, 5]), torch.arange(0), torch.tensor([0, 1, 2, 4])],
}
"""Rows of one process, of two of which one has none, and of three with uneven ones."""
PLAIN = {
    "optimizer": {"lr": 3e-3, "eps": 1e-4, "max_grad_norm": 1e9},
    # what two or three processes can share out; nothing is collected
    "method": {"name": "flow_grpo", "groups": 12, "group": 4},
}


def descended(run):
    """Two steps of descend; what they return, what is logged, and where the weights are."""
    mine = SHARES[run.processes.count][run.processes.index]
    bias = run.trainable[-1].detach().clone()
    found = [run.descend(scaled(run, mine), len(mine), "thing") for _ in range(2)]
    return bias, found, run.metrics.close(), run.weights().values


@pytest.mark.parametrize("micro", ["auto", 1, 4])
def test_descend_returns_and_logs_the_means_over_all_rows(tmp_path, micro):
    ((bias, found, logged, _),) = on_processes(tmp_path, 1, descended, micro_batch=micro, **PLAIN)
    rows = torch.arange(6.0)
    assert found[0]["row"] == found[1]["row"] == pytest.approx(2.5)
    assert found[0]["square"] == pytest.approx(float((rows**2).mean()))
    loss = ((bias[0] - rows) ** 2 + bias[1] * rows).mean()
    assert found[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    names = {f"thing/{name}" for name in ("lr", "loss", "grad_norm", "row", "square")}
    assert {name for name in logged if "/" in name and name.startswith("thing")} == names
    assert logged["thing/lr"] == pytest.approx(3e-3)
    assert logged["thing/loss"] == pytest.approx((found[0]["loss"] + found[1]["loss"]) / 2)
    gradient = torch.tensor([2 * float(bias[0] - 2.5), 2.5]).norm()
    assert logged["thing/grad_norm"] == pytest.approx(float(gradient), abs=0.02)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("micro", ["auto", 1])
def test_a_process_without_rows_takes_the_step_of_all(tmp_path, count, micro):
    ((_, found, logged, weights),) = on_processes(tmp_path, 1, descended, **PLAIN)
    for _, means, told, values in on_processes(
        tmp_path, count, descended, micro_batch=micro, **PLAIN
    ):
        assert largest_difference(values, weights) < 1e-6
        for mine, whole in zip(means, found, strict=True):
            assert mine == pytest.approx(whole, rel=1e-5)
        for name in ("thing/lr", "thing/loss", "thing/grad_norm", "thing/row"):
            assert told[name] == pytest.approx(logged[name], rel=1e-5)
    shares = SHARES[3]
    apart = [float(share.float().mean()) for share in shares if len(share)]
    assert np.mean(apart) != pytest.approx(2.5), "control: the mean of the processes' means"


def scaled_step(accelerator, rows):
    """The norm of an fp16 step on 4 rows of all processes, the scale, and the weights."""
    network, processes = torch.nn.Linear(2, 1), Processes(accelerator)
    for parameter in network.parameters():
        parameter.data.fill_(0.5)
    reduce = processes.reduce if processes.count > 1 else None
    settings = OptimizerConfig(lr=0.1, max_grad_norm=1e9)
    optimizer = Optimizer(settings, list(network.parameters()), True, reduce)
    optimizer.zero_grad()
    if rows:
        optimizer.backward((network(torch.ones(rows, 2)) ** 2).sum() / 4)
    norm = step_together([optimizer], 0.0)
    return norm, optimizer.scaler.get_scale(), [p.detach() for p in network.parameters()]


@pytest.mark.parametrize("shares", [(4, 0), (0, 4)])
def test_a_process_without_rows_takes_the_step_of_all_in_fp16_too(shares):
    """The process has scaled no loss yet, and scales its gradients like the others."""
    norm, scale, weights = scaled_step(Accelerator(cpu=True), 4)
    assert norm > 1
    assert largest_difference(weights, [torch.full_like(w, 0.5) for w in weights]) > 0.05
    accelerators = peers(2)
    works = [partial(scaled_step, *each) for each in zip(accelerators, shares, strict=True)]
    for other_norm, other_scale, other in together(works, accelerators):
        assert other_norm == pytest.approx(norm, rel=1e-6)
        assert other_scale == scale
        assert largest_difference(other, weights) < 1e-6


def test_where_nobody_has_a_row_nothing_is_learned(tmp_path):
    def work(run):
        before = run.weights()
        nothing = scaled(run, torch.arange(0))
        assert run.descend(nothing, 0, "thing") == {}
        return largest_difference(run.weights().values, before.values)

    for count in (1, 2):
        assert on_processes(tmp_path, count, work) == [0.0] * count


def test_an_optimiser_of_its_own_leaves_the_policy_alone(tmp_path):
    run = prepared(tmp_path)
    head = torch.nn.Linear(2, 1)
    optimizer = run.new_optimizer(head.parameters(), OptimizerConfig(lr=0.1))
    before, first = run.weights(), head.weight.detach().clone()
    x = torch.ones(3, 2)
    run.descend(lambda part: head(x[part])[:, 0] ** 2, 3, "critic", optimizer)
    assert largest_difference(run.weights().values, before.values) == 0
    assert not torch.equal(head.weight, first)
    assert (run.learner.optimizer.updates, optimizer.updates) == (0, 1)
    logged = run.metrics.close()
    assert logged["critic/lr"] == pytest.approx(0.1)
    assert "time/update critic" in logged


# Weights and pools


def parameters(*values):
    return [torch.nn.Parameter(torch.tensor([value, -value])) for value in values]


def numbers(values):
    return [float(value.detach()[0]) for value in values]


def set_to(learned, *values):
    for parameter, value in zip(learned, values, strict=True):
        parameter.data.fill_(value)


def test_weights_follow_renew_and_restore_by_hand():
    learned = parameters(1.0, 2.0)
    copy = Weights(learned)
    set_to(learned, 5.0, 10.0)
    assert numbers(copy.values) == [1, 2], "a copy does not move with what it copies"
    copy.follow(0.75)
    assert numbers(copy.values) == [0.75 * 1 + 0.25 * 5, 0.75 * 2 + 0.25 * 10]
    copy.follow(1.0)
    assert numbers(copy.values) == [2, 4]
    copy.follow(0.0)
    assert numbers(copy.values) == [5, 10]
    assert numbers(learned) == [5, 10]
    set_to(learned, 7.0, 8.0)
    copy.renew()
    set_to(learned, 9.0, 9.0)
    assert numbers(copy.values) == [7, 8]
    copy.restore()
    assert numbers(learned) == [7, 8]
    set_to(learned, 0.0, 0.0)
    assert numbers(copy.values) == [7, 8], "nor does it after it was restored"


def test_using_puts_values_in_place_and_takes_them_away_whatever_happens():
    learned = parameters(1.0)
    a = Weights(learned)
    set_to(learned, 2.0)
    b = Weights(learned)
    set_to(learned, 3.0)
    with a.using():
        assert numbers(learned) == [1]
        with b.using():
            assert numbers(learned) == [2]
        assert numbers(learned) == [1]
    assert numbers(learned) == [3]
    with pytest.raises(KeyError), a.using():
        raise KeyError
    assert numbers(learned) == [3]
    assert numbers(a.values) == [1]


def test_weights_are_resumed_and_share_nothing_with_what_they_came_from():
    learned = parameters(1.0, 2.0)
    first, second = Weights(learned), Weights(parameters(0.0, 0.0))
    second.load_state_dict(first.state_dict())
    assert numbers(second.values) == [1, 2]
    second.follow(0.5)
    assert numbers(second.values) == [0.5, 1]
    assert numbers(first.values) == [1, 2]
    with pytest.raises((RuntimeError, ValueError)):
        Weights(parameters(1.0)).load_state_dict(first.state_dict())


def pooled(size: int, uniform: list[float]) -> tuple[list[torch.nn.Parameter], Pool]:
    """A pool of copies of 1, 2, 3, ... with these random numbers."""
    learned = parameters(1.0)
    pool = Pool(learned, size)
    for value, number in enumerate(uniform, 2):
        set_to(learned, float(value))
        pool.add(number)
    return learned, pool


def kept_by(pool: Pool) -> list[float]:
    """The copies that a pool holds."""
    return [numbers(pool[place].values)[0] for place in range(len(pool))]


def test_a_pool_holds_all_copies_up_to_its_size_and_is_resumed():
    assert kept_by(pooled(4, [0.9, 0.0, 0.5])[1]) == [1, 2, 3, 4]
    learned, pool = pooled(3, [0.0, 0.0, 0.0])
    assert kept_by(pool) == [4, 2, 3], "place int(0 x 4) of a full pool"
    pool.add(0.99)
    assert kept_by(pool) == [4, 2, 3], "place int(.99 x 5) is none of its three"
    other = parameters(0.0)
    resumed = Pool(other, 3)
    resumed.load_state_dict(pool.state_dict())
    with resumed[1].using():
        assert numbers(other) == [2]
    for one, parameter in ((pool, learned), (resumed, other)):
        set_to(parameter, 7.0)
        one.add(0.45)  # int(.45 x 6) is 2: it counts what was taken before
        assert kept_by(one) == [4, 2, 7]
    with pytest.raises(ValueError, match="at least 1"):
        Pool(learned, 0)


def test_every_copy_stays_in_a_full_pool_with_the_same_probability():
    """Three of nine: each in a third of many pools. Control: the last three in all of them."""
    generator = torch.Generator().manual_seed(0)
    count = torch.zeros(10)
    for _ in range(3000):
        uniform = torch.rand(8, generator=generator).tolist()
        for value in kept_by(pooled(3, uniform)[1]):
            count[int(value)] += 1
    share = count[1:] / 3000
    assert float((share - 1 / 3).abs().max()) < 0.04, share  # 4.6 standard errors


def test_what_acts_with_other_weights_is_the_policy_with_those_weights(tmp_path):
    run = prepared(tmp_path)
    honest = run.collect(4, 2).trajectory.x0
    old = run.weights()
    set_to(run.trainable, *([0.3] * len(run.trainable)))
    with old.using():
        assert torch.equal(run.collect(4, 2).trajectory.x0, honest)
    assert not torch.allclose(run.collect(4, 2).trajectory.x0, honest, atol=1e-2)


# Collecting otherwise


def test_another_policy_collects_in_the_place_of_the_one_that_learns(tmp_path):
    run = prepared(tmp_path)
    own = run.collect(4, 2)
    counted = run.policy.model.evaluations
    other = replace(run.policy, model=Toy(seed=5))
    found = run.collect(4, 2, policy=other)
    assert run.policy.model.evaluations == counted
    assert other.model.evaluations == 8 * 4
    assert not torch.allclose(found.trajectory.x0, own.trajectory.x0, atol=1e-4)
    same = run.collect(4, 2, policy=replace(run.policy))
    assert torch.equal(same.trajectory.x0, own.trajectory.x0)


def test_a_window_says_which_steps_are_noisy_kept_and_trained(tmp_path):
    run = prepared(tmp_path)
    rollout = run.collect(4, 2, window=(1, 3))
    assert rollout.trajectory.steps == range(1, 3)
    assert run.collect(4, 2).trajectory.steps == run.window == range(3)
    with_policy = run.collect(4, 2, window=(1, 3), policy=replace(run.policy))
    assert torch.equal(with_policy.trajectory.x, rollout.trajectory.x)

    def loss(step):
        found = log_ratio(step.new, step.old, step.x, reduce="sum")
        return found, {"away": found.detach().abs()}

    # the same chain outside of its window: its first step was taken without noise
    start = rollout.trajectory.start
    drawn = run.policy.with_window((1, 3))
    grid = run.policy.chain.grid
    now = run.policy.denoiser(start, grid[:1].expand(8), rollout.trajectory.condition)
    alpha, sigma = (f(grid[1]) for f in (drawn.model.schedule.alpha, drawn.model.schedule.sigma))
    flowed = (alpha * now.x0 + sigma * now.eps).float().detach()
    assert torch.allclose(rollout.trajectory.before(1), flowed, atol=1e-4)
    assert run.update(rollout, Batch(slice(0, 8)), torch.zeros(8), loss)["away"] < 1e-4


# What is saved has one owner


def test_what_is_a_part_is_not_registered_and_the_other_way_round(tmp_path):
    run = prepared(tmp_path)
    part, other = Base.of(run.policy.model, 0.5), Base.of(run.policy.model, 0.4)
    run.register(trained=part)
    with pytest.raises(ValueError, match="one owner"):
        run.attach(base=part)
    assert "base" not in run.policy.parts
    assert "base" not in run.deployed.parts
    run.attach(base=other)
    assert run.policy.parts["base"] is run.deployed.parts["base"] is other
    with pytest.raises(ValueError, match="one owner"):
        run.register(again=other)
    with pytest.raises(ValueError, match="one owner"):
        run.register(base=run.weights())
    assert run.state.registered["trained"] is part
    assert {"again", "base"}.isdisjoint(run.state.registered)


def test_a_part_of_the_same_name_replaces_the_one_before(tmp_path):
    run = prepared(tmp_path)
    first, second = (Base.of(run.policy.model, above) for above in (0.5, 0.4))
    run.attach(base=first)
    run.attach(base=first)
    run.attach(base=second)
    assert run.policy.parts == run.deployed.parts == {"base": second}
    assert run.state.parts == {"base": second}


def test_a_registered_name_has_one_object(tmp_path):
    """Two objects under one name would be saved as one, and nobody would be told."""
    run = prepared(tmp_path)
    old = run.weights()
    run.register(old=old)
    run.register(old=old)
    with pytest.raises(ValueError, match="old"):
        run.register(old=run.weights())
    with pytest.raises(ValueError, match="spent"):
        run.register(spent=run.weights())
    assert run.state.registered["old"] is old
    assert run.state.registered["spent"] is run.spent


class Counter:
    """Counts iterations."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@dataclass
class Late:
    """``method: {name: "tests.training.test_verbs:Late"}``: it registers inside of its loop."""

    needs: ClassVar[Needs] = Needs()

    def train(self, run):
        counter = Counter()
        for _ in run.iterations():
            run.register(counter=counter)
            counter.count += 1
            run.log("count", counter.count)


def test_what_is_registered_inside_of_the_loop_is_resumed_too(tmp_path):
    method, evaluation = {"name": "tests.training.test_verbs:Late"}, {"every": 0, "samples": 4}
    raw = toy.experiment(tmp_path, method=method, eval=evaluation, budget={"iterations": 2})
    folder = train(parse.parse(raw)).folder
    resumed = folder / "config.yaml"
    resumed.write_text(resumed.read_text().replace("iterations: 2\n", "iterations: 4\n"))
    train(resumed)
    counts = [row["count"] for row in metrics_file.read(folder) if "count" in row]
    assert counts == [1, 2, 3, 4]
