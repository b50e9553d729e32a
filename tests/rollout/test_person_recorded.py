"""A person and `record: true` at once: frames count every step of both, decisions mix nobody's, and
the data set that is made of them says who acted.
"""

from itertools import pairwise

import pytest
import torch
import yaml

from genpolicy.datasets.lerobot_dataset import LeRobotDataset
from genpolicy.rollout.columns import DECISION, EXECUTED, INTERVENTION, START
from genpolicy.rollout.compaction import compact
from genpolicy.rollout.person import Intervention
from genpolicy.rollout.recorder import FRAMES
from genpolicy.rollout.replay import Replay
from tests.toy_control import GOAL, SPEED, STATE, experiment, prepared

RULE = Intervention(patience=3, hand_back=2, noise=0.05)
EPISODES = 6
SECTIONS = {
    "method": {"name": "bc"},
    "environments": 4,
    "task": {"name": "tests.toy_control:Point", "skill": 0.2, "limit": 15},
}


def collected(folder, rule=RULE, **sections):
    """A run that has played its first iteration's episodes, and what it kept of them."""
    torch.manual_seed(0)
    run, _ = prepared(folder, **SECTIONS, **sections)
    rollout = run.collect(EPISODES, 1, keep=True, person=rule)
    return run, rollout, run.collector.store.episodes(1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of a recording run, the run, its rollout and its episodes."""
    folder = tmp_path_factory.mktemp("recorded")
    return folder, *collected(folder, record=True)


@pytest.fixture(scope="module")
def made(recorded):
    """The data set that is made of them."""
    folder = recorded[0]
    raw = experiment(folder, **SECTIONS, record=True)
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(raw))
    done = compact(folder / "run", folder / "set", trust=True)
    return LeRobotDataset(str(folder / "set")), done


def steps(episode, name):
    """One value of every executed step, [L]."""
    T = episode["rewards"].shape[1]
    return episode[name][torch.arange(T) < episode["executed"][:, None]]


def test_both_act_in_these_episodes_and_hand_over_inside_a_chunk(recorded):
    episodes = recorded[3]
    people = [e["human"].any(1) for e in episodes]
    assert all(p.any() and not p.all() for p in people)
    pairs = {pair for p in people for pair in pairwise(p.tolist())}
    assert pairs >= {(False, True), (True, False)}, "taken over, and handed back"
    cut = [e["executed"][:-1] < 4 for e in episodes]
    assert any(c[p[:-1]].any() for c, p in zip(cut, people, strict=True)), "the person's chunk"
    assert any(c[~p[:-1]].any() for c, p in zip(cut, people, strict=True)), "the robot's chunk"


def test_frames_are_what_was_seen_before_every_step_of_robot_and_person(recorded):
    for episode in recorded[3]:
        count, begins = int(episode["executed"].sum()), episode["executed"].cumsum(0)
        begins = begins - episode["executed"]
        for name, frames in episode[FRAMES].items():
            assert len(frames) == count
            assert torch.equal(frames[begins], episode["observation"][name][:, -1])
        place = torch.cat([episode[FRAMES][STATE], episode["final"][STATE][0]])
        action = steps(episode, "actions").clamp(-1, 1)
        assert torch.allclose(place[1:], place[:-1] + SPEED * action, atol=1e-6)
        planned = recorded[1].policy.actions(episode["x0"]).float()
        planned = steps({**episode, "actions": planned}, "actions").clamp(-1, 1)
        assert not torch.allclose(place[1:], place[:-1] + SPEED * planned, atol=1e-3), "control"


def test_no_decision_mixes_the_two(recorded):
    for episode in recorded[3]:
        inside = torch.arange(4) < episode["executed"][:, None]
        assert torch.equal(episode["human"], inside & episode["human"].any(1, keepdim=True))
        assert (episode["terminated"] | episode["truncated"]).tolist() == [False] * (
            len(inside) - 1
        ) + [True]


def test_the_counts_are_those_of_the_steps(recorded):
    _, run, rollout, episodes = recorded
    logged = run.metrics.close()
    assert logged["person/steps"] == sum(int(e["human"].sum()) for e in episodes)
    taken = 0
    for episode in episodes:
        acts = [False, *episode["human"].any(1).tolist()]
        taken += sum(now and not before for before, now in pairwise(acts))
    assert logged["person/takeovers"] == taken > EPISODES - 1
    total = sum(int(e["executed"].sum()) for e in episodes)
    assert logged["episode/length"] == pytest.approx(total / EPISODES)
    paid = torch.stack([steps(e, "rewards").double().sum() for e in episodes])
    assert torch.allclose(rollout.rewards.flatten(), paid)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[n], other[n]) for n in one)
    return one == other


def test_recording_changes_nothing_bit_for_bit(recorded, tmp_path):
    _, _, plain = collected(tmp_path)
    for one, other in zip(recorded[3], plain, strict=True):
        assert FRAMES not in other
        assert same({n: v for n, v in one.items() if n != FRAMES}, other)
    _, _, alone = collected(tmp_path / "alone", rule=None)
    assert any(
        not same(one["actions"], other["actions"]) for one, other in zip(plain, alone, strict=True)
    ), "control: without the person it is another run"


def test_episodes_played_before_a_kill_keep_their_frames(recorded, tmp_path):
    run, _, whole = collected(tmp_path, record=True)
    paths = sorted((run.collector.store.folder / "1").glob("*.pt"))
    assert len(paths) == EPISODES
    for path in paths[1::2]:
        path.unlink()
    run.collect(EPISODES, 1, keep=True, person=RULE)
    again = run.collector.store.episodes(1)
    assert all(same(a, b) for a, b in zip(whole, again, strict=True))
    assert all(same(a, b) for a, b in zip(whole, recorded[3], strict=True))


# -- the data set ----------------------------------------------------------------------------------


def test_the_data_set_says_of_every_frame_who_acted(recorded, made):
    (data, done), episodes = made, recorded[3]
    human = torch.cat([steps(e, "human") for e in episodes])
    assert torch.equal(data.columns[INTERVENTION].flatten() > 0, human)
    assert done.human == int(human.sum())
    assert done.frames == len(data) == len(human)
    for name in (STATE, GOAL):
        assert torch.equal(data.columns[name], torch.cat([e[FRAMES][name] for e in episodes]))
    decision = data.columns[DECISION].flatten()
    for number in range(EPISODES):
        own = data.episode == number
        for each in decision[own].unique():
            assert len(human[own & (decision == each)].unique()) == 1


def test_a_replay_of_the_data_set_has_the_decisions_that_were_lived(recorded, made):
    """At the frames where decisions began: executed steps, whose they are, rewards, what came next,
    and what was done.
    """
    (data, _), (_, run, _, episodes) = made, recorded
    model = run.policy.model
    lived = Replay.of_episodes(episodes, True, model)
    found = Replay.of_dataset(data, model, True)
    assert len(found) == len(data)
    decision = data.columns[DECISION].flatten() + 1000 * data.episode
    begins = torch.ones(len(data), dtype=torch.bool)
    begins[1:] = decision[1:] != decision[:-1]
    there = found[begins.nonzero().flatten()]
    assert len(there) == len(lived)
    # a decision of the person's or robot's that was followed by the same one's is as long
    assert torch.equal(there.executed, lived.executed)
    assert torch.equal(there.executed, data.columns[EXECUTED].flatten()[begins].long())
    for name in ("human", "terminated", "success", "first", "episode"):
        assert torch.equal(getattr(there, name), getattr(lived, name)), name
    assert torch.allclose(there.rewards, lived.rewards, atol=1e-6)
    seen, other = there.views.observation[STATE], lived.views.observation[STATE]
    assert torch.equal(seen[there.now], other[lived.now])
    going = ~lived.terminated
    assert torch.equal(seen[there.after[going]], other[lived.after[going]])
    inside = torch.arange(4) < lived.executed[:, None]
    done = [model.decode(r.event.to(model.device)).cpu().clamp(-1, 1) for r in (there, lived)]
    assert torch.allclose(done[0][inside], done[1][inside], atol=1e-4)
    robots = ~lived.human.any(1)
    assert START in data.columns
    assert torch.allclose(there.start[robots], lived.start[robots].float())
    assert there.start[~robots].isnan().all()
