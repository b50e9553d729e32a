"""A person takes over and hands back, on the toy of control."""

import math
from dataclasses import replace

import pytest
import torch

from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.rollout.person import Intervention, Watched, takeovers
from genpolicy.rollout.replay import Replay
from tests.toy_control import GOAL, STATE, Point, prepared

NEVER = Intervention(patience=10**6)
SOON = Intervention(patience=3)


def standing(rule: Intervention, count: int = 4, chunk: int = 4, **task):
    """Every decision of episodes from seeds 0, 1, ... in which the robot stands still."""
    task = Point(**{"limit": 12, "skill": 0.3, **task})
    world = Watched(task.environments(count, 1), task, rule)
    going, told = list(range(count)), [[] for _ in range(count)]
    views = [world.reset(going, going)]
    while going:
        step = world.step(going, torch.zeros(len(going), chunk, 2))
        views.append(step.context)
        for row, slot in enumerate(going):
            names = ("rewards", "executed", "terminated", "truncated", "success")
            told[slot].append(
                {n: getattr(step, n)[row] for n in (*names, "actions", "human")}
                | {n: v[row, -1] for n, v in step.context.observation.items()}
            )
        over = (step.terminated | step.truncated).tolist()
        going = [slot for slot, ended in zip(going, over, strict=True) if not ended]
    return told, views[0]


def test_a_robot_that_stands_still_is_rescued_and_without_a_person_it_is_not():
    assert all(e[-1]["success"] and e[-1]["terminated"] for e in standing(SOON)[0])
    assert not any(e[-1]["success"] for e in standing(NEVER)[0])


def test_a_decision_is_the_robots_or_the_persons_and_take_over_is_no_end():
    for episode in standing(SOON)[0]:
        first = episode[0]  # three steps without progress: the robot's chunk of four ends early
        assert first["executed"] == 3
        assert not first["terminated"]
        assert not first["truncated"]
        assert not first["human"].any()
        for decision in episode[1:]:
            inside = torch.arange(4) < decision["executed"]
            assert (decision["human"] == inside).all()
            behind = decision["actions"][~inside]  # the person's last one, again
            assert (behind == decision["actions"][inside][-1]).all()


def test_rewards_and_places_are_those_of_the_executed_actions_by_hand():
    told, begin = standing(SOON)
    for slot, episode in enumerate(told):
        place, goal = (begin.observation[name][slot, -1].double() for name in (STATE, GOAL))
        for decision in episode:
            for j in range(int(decision["executed"])):
                before = (goal - place).norm()
                place = place + 0.25 * decision["actions"][j].double()
                reward = before - (goal - place).norm() + float((goal - place).norm() < 0.2)
                assert decision["rewards"][j] == pytest.approx(float(reward), abs=1e-6)
            assert torch.allclose(decision[STATE].double(), place, atol=1e-6)
            assert (decision["rewards"][int(decision["executed"]) :] == 0).all()


def test_the_person_hands_back_after_steps_of_progress_and_takes_over_again():
    told, _ = standing(replace(SOON, hand_back=2), count=1, limit=13, skill=0.1)
    runs = [(bool(d["human"].any()), int(d["executed"])) for d in told[0]]
    assert runs == [(False, 3), (True, 2), (False, 3), (True, 2), (False, 3)]
    assert told[0][-1]["truncated"]
    assert not any(d["truncated"] for d in told[0][:-1])


def test_only_a_share_of_the_starts_is_watched_and_noise_moves_the_person():
    assert all(not d["human"].any() for e in standing(replace(SOON, share=0))[0] for d in e)
    plain, noisy = (standing(replace(SOON, noise=n))[0] for n in (0, 0.1))
    again = standing(replace(SOON, noise=0.1), count=2)[0]
    assert not torch.equal(plain[0][1]["actions"], noisy[0][1]["actions"])
    assert torch.equal(again[1][1]["actions"], noisy[1][1]["actions"])  # however many slots


def test_take_overs_are_counted_at_their_first_decision():
    human = torch.tensor([[1], [1], [0], [1], [1], [0]]).bool()
    first = torch.tensor([1, 0, 0, 0, 1, 0]).bool()
    assert takeovers(human, first).tolist() == [True, False, False, True, True, False]


def test_a_task_without_a_person_and_a_rule_that_is_none_are_refused():
    task = Point()
    with pytest.raises(ConfigError, match="patience"):
        Intervention(patience=0)
    with pytest.raises(ConfigError, match="share"):
        Intervention(share=2)
    with pytest.raises(ConfigError, match="no expert"):
        Watched(task.environments(1, 1), object(), SOON)  # type: ignore[arg-type]


# -- in a run --------------------------------------------------------------------------------------

RULE = Intervention(patience=2, hand_back=2, noise=0.05)


def collected(folder, rule, environments=7):
    torch.manual_seed(0)
    task = {"name": "tests.toy_control:Point", "skill": 0.2}
    run, _ = prepared(folder, method={"name": "bc"}, environments=environments, task=task)
    rollout = run.collect(6, 2, keep=True, person=rule)
    return run, rollout, run.collector.store.episodes(1)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return a == b


def test_nothing_changes_bit_for_bit_where_the_rule_never_fires(tmp_path):
    _, _, alone = collected(tmp_path / "alone", None)
    run, _, watched = collected(tmp_path / "watched", NEVER)
    for a, b in zip(alone, watched, strict=True):
        assert not b["human"].any()
        assert same(a, {name: value for name, value in b.items() if name != "human"})
    model = run.policy.model
    for name in ("event", "start", "rewards", "executed", "human", "terminated"):
        a, b = (getattr(Replay.of_episodes(e, model=model), name) for e in (alone, watched))
        assert same(a, b)
    _, _, helped = collected(tmp_path / "helped", RULE)
    assert any(e["human"].any() for e in helped)  # the control: this rule fires


def test_the_replay_holds_the_executed_chunk_and_the_rollout_counts(tmp_path):
    run, rollout, episodes = collected(tmp_path, RULE)
    model = run.policy.model
    found = Replay.of_episodes(episodes, model=model)
    theirs = found.human.any(1)
    planned = torch.cat([e["x0"] for e in episodes])
    done = torch.cat([e["actions"] for e in episodes])
    assert theirs.any()
    assert not theirs.all()
    assert torch.equal(found.event[~theirs], planned[~theirs])
    assert found.start[theirs].isnan().all()
    assert not found.start[~theirs].isnan().any()
    decoded = model.decode(found.event[theirs].to(model.device)).cpu()
    inside = found.human[theirs]
    assert torch.allclose(decoded[inside], done[theirs][inside], atol=1e-5)
    wrong = model.decode(planned[theirs].to(model.device)).cpu()  # the plan nobody carried out
    assert not torch.allclose(wrong[inside], done[theirs][inside], atol=0.05)
    assert (found.terminated == torch.cat([e["terminated"] for e in episodes])).all()
    assert not math.isnan(float(rollout.rewards.sum()))
    assert set(rollout.parts) == {"return"}


def test_an_episode_is_the_same_in_any_slots_and_after_a_kill(tmp_path):
    run, _, whole = collected(tmp_path / "seven", RULE)
    _, _, alone = collected(tmp_path / "three", RULE, environments=3)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a["human"], b["human"])
        assert torch.allclose(a["actions"], b["actions"], atol=1e-4)
    paths = sorted((run.collector.store.folder / "1").glob("*.pt"))
    for path in paths[::2]:
        path.unlink()
    run.collect(6, 2, keep=True, person=RULE)
    assert all(same(a, b) for a, b in zip(whole, run.collector.store.episodes(1), strict=True))
    # another rule is another origin: nothing of the old is taken for its own
    run.collect(6, 2, keep=True, person=NEVER)
    assert not any(e["human"].any() for e in run.collector.store.episodes(1))


def test_a_person_sees_what_the_robot_sees():
    task = Point(skill=0.5)
    seen = Context([""], {STATE: torch.zeros(1, 2, 2), GOAL: torch.tensor([[[9.0, 9], [3, 4]]])})
    assert task.person().progress(seen) == -5
    assert torch.allclose(task.person().act(seen), torch.tensor([6.0, 8.0]))
