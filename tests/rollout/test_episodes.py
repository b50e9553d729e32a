"""Playing episodes: an episode is a function of its seed and its noise,
wherever and beside whatever it is played.
"""

from dataclasses import replace

import pytest
import torch

from genpolicy.chain import DDIM, Chain, FloorStd, Noise
from genpolicy.chain.noise import PRIOR
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.models.mlp import MLP
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.episodes import play, reset_seed
from genpolicy.rollout.recorder import live
from tests.toy_control import GOAL, NEAR, SPEED, STATE, Point, Recorded, Walk

SEEDS = [100 + 7 * e for e in range(9)]
K = 3
ROUNDING = 1e-5
"""The change that batched matrix products may make."""


def walker(history=2, chunk=4):
    """A policy with fresh weights that happens to walk about, and reaches some goals."""
    torch.manual_seed(0)
    model = MLP(history=history, chunk=chunk, hidden=32, blocks=1, family="flow")
    model.initialise(Recorded(episodes=10))
    parameters = list(model.trainable().values())
    parameters[-1].data += 0.3 * torch.randn_like(parameters[-1])
    return ChainPolicy(model, Chain(model.schedule, model.grid(K), FloorStd(DDIM(1.0), 0.4)))


def names(count=9):
    return Noise(3, 1, torch.arange(count) // 3, torch.arange(count) % 3)


def played(policy, task, slots, seeds=SEEDS, noise=None, watch=None, history=2):
    """(episode, h) -> everything about that decision, one row each."""
    found = {}
    environments = task.environments(slots, history)
    for d in play(
        policy,
        environments,
        seeds,
        noise if noise is not None else names(len(seeds)),
        keep=(0, K),
        watch=watch,
    ):
        for row, name in enumerate(zip(d.episode.tolist(), d.h.tolist(), strict=True)):
            assert name not in found, "a decision is made once"
            found[name] = {
                **{f"seen {n}": v[row] for n, v in d.context.observation.items()},
                **{f"then {n}": v[row] for n, v in d.step.context.observation.items()},
                "chain": d.trajectory.x[row],
                "actions": d.actions[row],
                **{
                    n: getattr(d.step, n)[row]
                    for n in ("rewards", "executed", "terminated", "truncated", "success")
                },
            }
    return found


def difference(one, other):
    """The largest difference of two plays; infinite where they have other decisions."""
    if one.keys() != other.keys():
        return float("inf")
    return max(
        float((one[name][n].double() - other[name][n].double()).abs().max())
        for name in one
        for n in one[name]
    )


class Stream(Noise):
    """The known mistake: one stream for whoever comes first."""

    def __call__(self, k, shape, device="cpu"):
        return torch.randn(len(self), *shape)

    def __getitem__(self, index):
        return Stream(self.seed, self.iteration, self.group[index], self.member[index])

    def at(self, decision):
        return self


class Unaware(Noise):
    """The known mistake: the same noise at every decision."""

    def __getitem__(self, index):
        return Unaware(self.seed, self.iteration, self.group[index], self.member[index])

    def at(self, decision):
        return self


TASK = Point(limit=10)


@pytest.mark.parametrize("slots", [3, 20])
def test_the_same_whatever_the_number_of_slots(slots):
    policy = walker()
    one, many = played(policy, TASK, 1), played(policy, TASK, slots)
    assert difference(one, many) < ROUNDING
    lengths = {
        e: sum(int(d["executed"]) for (episode, _), d in one.items() if episode == e)
        for e in range(len(SEEDS))
    }
    assert len(set(lengths.values())) > 1, (
        "the toy must have episodes of several lengths for this to say anything"
    )


def test_control_a_shared_stream_depends_on_the_slots():
    policy, noise = walker(), names()
    stream = Stream(noise.seed, noise.iteration, noise.group, noise.member)
    assert (
        difference(played(policy, TASK, 1, noise=stream), played(policy, TASK, 3, noise=stream))
        > 0.1
    )


def test_the_same_in_any_order():
    policy, noise = walker(), names()
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])
    straight = played(policy, TASK, 4)
    shuffled = played(policy, TASK, 4, [SEEDS[e] for e in order.tolist()], noise[order])
    assert (
        difference(straight, {(int(order[e]), h): d for (e, h), d in shuffled.items()}) < ROUNDING
    )
    assert difference(straight, shuffled) > 0.1  # control: another name is another episode


def test_the_same_alone():
    policy, noise = walker(), names()
    together = played(policy, TASK, 4)
    for e in (0, 5):
        alone = played(policy, TASK, 1, [SEEDS[e]], noise[e : e + 1])
        assert (
            difference(
                {name: d for name, d in together.items() if name[0] == e},
                {(e, h): d for (_, h), d in alone.items()},
            )
            < ROUNDING
        )


@pytest.mark.parametrize("slots", [1, 4])
def test_noise_is_named_by_group_member_and_decision(slots):
    policy, noise = walker(), names()
    for (e, h), decision in played(policy, TASK, slots).items():
        start = noise[e : e + 1].at(torch.tensor([h]))(PRIOR, policy.model.event_shape)[0]
        assert torch.equal(decision["chain"][0], start)
    unaware = Unaware(noise.seed, noise.iteration, noise.group, noise.member)
    starts = {e: [] for e in range(len(SEEDS))}
    for (e, _), decision in played(policy, TASK, slots, noise=unaware).items():
        starts[e].append(decision["chain"][0])
    assert any(
        len(s) > 1 and torch.equal(s[0], s[1]) for s in starts.values()
    )  # control: what decisions are named for


def test_decisions_of_an_episode_follow_one_another():
    """Observations, rewards, executed actions and the end follow, by hand,
    from the seed and the actions alone.
    """
    found = played(walker(), TASK, 4)
    for e, seed in enumerate(SEEDS):
        begun = Walk(ends=True)
        begun.reset(seed=seed)
        place, goal = torch.from_numpy(begun.place), torch.from_numpy(begun.goal)
        frames, taken, ended = [place.clone()] * 2, 0, False
        decisions = [found[e, h] for h in range(sum(name[0] == e for name in found))]
        for h, d in enumerate(decisions):
            assert not ended, "nothing is decided after the end"
            assert torch.allclose(d[f"seen {STATE}"], torch.stack(frames[-2:]).float(), atol=1e-5)
            assert torch.allclose(d[f"seen {GOAL}"], goal.float().expand(2, 2), atol=1e-5)
            executed = 0
            for j in range(4):
                before = float((goal - place).norm())
                place = place + SPEED * d["actions"][j].clamp(-1, 1).double()
                after = float((goal - place).norm())
                frames.append(place.clone())
                taken, executed = taken + 1, executed + 1
                assert float(d["rewards"][j]) == pytest.approx(
                    before - after + (after < NEAR), abs=1e-5
                )
                if after < NEAR or taken == TASK.limit:
                    ended = True
                    break
            assert (d["rewards"][executed:] == 0).all()
            assert int(d["executed"]) == executed
            assert torch.allclose(d[f"then {STATE}"], torch.stack(frames[-2:]).float(), atol=1e-5)
            reached = float((goal - place).norm()) < NEAR
            assert bool(d["terminated"]) == reached
            assert bool(d["truncated"]) == (ended and not reached)
            assert bool(d["success"]) == reached
            assert ended == (h == len(decisions) - 1)
    kinds = [(bool(d["terminated"]), bool(d["truncated"])) for d in found.values()]
    assert set(kinds) == {(False, False), (True, False), (False, True)}


class Strict:
    """Environments that refuse to be acted upon after the end, and count;
    with several frames of history.
    """

    def __init__(self, task, count):
        self.inner, self.count = task.environments(count, 2), count
        self.over, self.begun, self.steps = dict.fromkeys(range(count), True), [], 0

    def reset(self, slots, seeds):
        assert all(self.over[slot] for slot in slots), "an episode was cut short"
        assert len(set(slots)) == len(slots)
        self.over |= dict.fromkeys(slots, False)
        self.begun += seeds
        return self.inner.reset(slots, seeds)

    def step(self, slots, actions):
        if any(self.over[slot] for slot in slots):
            raise AssertionError("an ended episode was acted upon")
        step = self.inner.step(slots, actions)
        self.steps += int(step.executed.sum())
        for slot, over in zip(slots, (step.terminated | step.truncated).tolist(), strict=True):
            self.over[slot] = over
        return step


@pytest.mark.parametrize("slots", [1, 3, 20])
@pytest.mark.parametrize("watched", [False, True])
def test_ended_episodes_are_never_acted_upon_and_every_seed_is_begun_once(slots, watched):
    strict = Strict(TASK, slots)
    steps = list(
        play(walker(), strict, SEEDS, names(), watch=(lambda *_: None) if watched else None)
    )
    assert sorted(strict.begun) == sorted(SEEDS)
    assert sum(int(d.step.executed.sum()) for d in steps) == strict.steps
    assert max(len(d.episode) for d in steps) == min(slots, len(SEEDS))


def test_control_going_on_after_the_end_is_noticed():
    policy, strict = walker(), Strict(TASK, 3)

    def go_on():
        context = strict.reset([0, 1, 2], SEEDS[:3])
        for _ in range(4):
            x0 = policy.sample(policy.model.encode(context), names(3)).x0
            context = strict.step([0, 1, 2], policy.model.decode(x0)).context

    with pytest.raises(AssertionError, match="an ended episode was acted upon"):
        go_on()


def test_history_begins_anew_with_an_episode():
    found = played(walker(history=3), TASK, 2, history=3)
    later = 0
    for (e, h), d in found.items():
        frames = d[f"seen {STATE}"]
        if h == 0:
            start, _ = Walk(True).reset(seed=SEEDS[e])
            assert torch.equal(frames, torch.from_numpy(start[STATE]).expand(3, 2))
        else:
            assert torch.equal(frames, found[e, h - 1][f"then {STATE}"])
            later += int(not torch.equal(frames[0], frames[1]))
    assert later > 0


@pytest.mark.parametrize("task", [TASK, Point(limit=6), Point(limit=7, ends=False)])
def test_watching_changes_nothing(task):
    policy, calls = walker(), []

    def watch(slots, episodes, before, action, step):
        assert action.shape == (len(slots), 1, 2)
        assert len(slots) == len(episodes) == len(before) == len(step.executed)
        assert (step.executed == 1).all()
        for row, episode in enumerate(episodes):
            calls.append(
                (
                    episode,
                    before[row : row + 1].observation[STATE][0],
                    action[row, 0],
                    step.rewards[row, 0],
                )
            )

    plain, watched = played(policy, task, 3), played(policy, task, 3, watch=watch)
    assert difference(plain, watched) == 0
    for e in range(len(SEEDS)):
        mine = [d for (episode, _), d in plain.items() if episode == e]
        seen = [call for call in calls if call[0] == e]
        assert len(seen) == sum(int(d["executed"]) for d in mine)
        actions = torch.cat([d["actions"][: int(d["executed"])] for d in mine])
        assert torch.equal(torch.stack([call[2] for call in seen]), actions)
        rewards = torch.cat([d["rewards"][: int(d["executed"])] for d in mine])
        assert torch.equal(torch.stack([call[3] for call in seen]), rewards)
        place = seen[0][1][-1]
        for _, before, action, _ in seen:
            assert torch.allclose(before[-1], place, atol=1e-5)
            place = place + SPEED * action.clamp(-1, 1)


def test_what_success_was_stays_where_the_goal_does_not_end_the_episode():
    task = Point(limit=40, ends=False)
    found = played(walker(), task, 3)
    for e in range(len(SEEDS)):
        mine = [found[e, h] for h in range(10)]
        verdicts = [bool(d["success"]) for d in mine]
        assert verdicts == sorted(verdicts), "a success is not taken back"
        assert sum(int(d["executed"]) for d in mine) == 40
        assert [bool(d["truncated"]) for d in mine] == [False] * 9 + [True]


def test_nothing_is_kept_that_is_not_asked_for():
    policy = walker()
    assert all(
        d.trajectory.mean.shape[1] == 0
        for d in play(policy, TASK.environments(2, 2), SEEDS[:2], names(2), keep=(0, 0))
    )
    assert all(
        list(d.trajectory.steps) == [0, 1]
        for d in play(policy, TASK.environments(2, 2), SEEDS[:2], names(2))
    )


def test_no_graph_is_built():
    decisions = list(play(walker(), TASK.environments(2, 2), SEEDS[:2], names(2)))
    assert not any(
        d.trajectory.mean.requires_grad or d.trajectory.x0.requires_grad for d in decisions
    )
    assert torch.is_grad_enabled()


# -- seeds -----------------------------------------------------------------------------------------


def test_reset_seeds_are_a_pure_function_and_all_different():
    names = [
        (seed, iteration, group)
        for seed in range(3)
        for iteration in range(-1, 5)
        for group in range(40)
    ]
    seeds = {name: reset_seed(*name) for name in names}
    assert len(set(seeds.values())) == len(names)
    assert all(0 <= s < 2**31 for s in seeds.values())
    assert reset_seed(1, 2, 3) == seeds[1, 2, 3]


@pytest.mark.parametrize("seed", [-1, 2**31, 2**40 + 1, 2**63 - 1])
def test_any_seed_that_noise_takes_resets_too(seed):
    Noise(seed, 0, torch.tensor([0]), torch.tensor([0]))(0, (2,))
    assert 0 <= reset_seed(seed, 1, 2) < 2**31


# -- evaluation ------------------------------------------------------------------------------------


def evaluated(slots=4, episodes=11, seed=50, task=TASK, **options):
    return evaluate_control(
        walker(), task.environments(slots, 2), episodes=episodes, seed=seed, **options
    )


def test_evaluation_plays_the_seeds_one_by_one():
    found, direct = (
        evaluated(),
        played(
            walker(),
            TASK,
            2,
            [50 + e for e in range(11)],
            Noise(50, -1, torch.arange(11), torch.zeros(11).long()),
        ),
    )
    for e in range(11):
        mine = [d for (episode, _), d in direct.items() if episode == e]
        assert float(found.returns[e]) == pytest.approx(
            sum(float(d["rewards"].sum()) for d in mine), abs=1e-5
        )
        assert int(found.lengths[e]) == sum(int(d["executed"]) for d in mine)
        assert bool(found.success[e]) == bool(mine[-1]["success"])
    assert found.decisions == len(direct)
    assert found.samples == 11


@pytest.mark.parametrize("count", [2, 3, 4])
def test_evaluation_is_the_same_on_any_number_of_processes(count):
    """The message that each process would send is caught, and each gets all of them:
    11 episodes do not divide evenly.
    """
    whole, sent = evaluated(), []
    for index in range(count):
        evaluated(process=(index, count), gather=lambda value: sent.append(value) or value)
    fields = 4
    joined = [
        torch.cat([sent[process * fields + field] for process in range(count)])
        for field in range(fields)
    ]
    for value, mine in zip((whole.success, whole.returns, whole.lengths), joined, strict=False):
        assert torch.allclose(value, mine[:11], atol=ROUNDING)
    assert whole.decisions == float(joined[3][:11].sum())


def test_evaluation_of_a_wider_or_narrower_room_is_the_same():
    assert torch.allclose(evaluated(1).returns, evaluated(20).returns, atol=ROUNDING)
    assert not torch.allclose(evaluated(seed=51).returns, evaluated().returns, atol=1e-2)


def test_metrics_and_intervals():
    found = evaluated()
    metrics = found.metrics()
    assert metrics["success_rate"] == pytest.approx(float(found.success.mean()))
    low, high = metrics["ci95/success_rate"]
    p, n, z = float(found.success.mean()), 11, 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert (low, high) == pytest.approx((centre - half, centre + half))
    assert metrics["return"] == pytest.approx(float(found.returns.mean()))
    assert metrics["length"] == pytest.approx(float(found.lengths.mean()))
    assert metrics["n"] == 11
    assert "success_rate" not in evaluated(judged=False).metrics()


def test_the_deployed_mean_draws_only_the_start():
    """Two policies that differ in the noise of their kernel alone meet the same starts:
    common random numbers.
    """
    policy = walker()
    loud = replace(policy, chain=replace(policy.chain, kernel=FloorStd(DDIM(1.0), 1.0)))
    one, other = (played(p, TASK, 3) for p in (policy, loud))
    for e in range(len(SEEDS)):
        assert torch.equal(one[e, 0]["chain"][0], other[e, 0]["chain"][0])
        assert not torch.equal(one[e, 0]["chain"][1], other[e, 0]["chain"][1])


def test_live_keeps_the_seeds_order():
    lived = live(walker(), TASK.environments(4, 2), SEEDS, names())
    starts = (lived.decisions.episode.diff(prepend=torch.tensor([-1])) > 0).nonzero().flatten()
    for e, row in enumerate(starts.tolist()):
        frame, _ = Walk(True).reset(seed=SEEDS[e])
        assert torch.equal(lived.context.observation[STATE][row, 0], torch.from_numpy(frame[STATE]))
