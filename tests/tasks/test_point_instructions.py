"""The point that is told where to go: episodes, rewards, pictures, demonstrations."""

import time

import numpy as np
import pytest
import torch

from assets import make_tiny_smolvla
from genpolicy.chain import DDIM, Chain
from genpolicy.config import errors, leaves
from genpolicy.config.origin import PERSON
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.models.lerobot_flow import LeRobotFlow
from genpolicy.policy.policy import ChainPolicy
from genpolicy.tasks.point_instructions import (
    CAMERA,
    COLOURS,
    PIXELS,
    SPEED,
    STATE,
    PointInstructions,
    paint,
    scene,
)

TASK = PointInstructions()


def straight(plane, slot: int, seed: int, goal: int) -> tuple[float, bool, bool, int]:
    """Go to a goal, one step a decision: return, success, terminated, steps."""
    world, seen = scene(seed, TASK.goals), plane.reset([slot], [seed])
    total = 0.0
    for steps in range(1, TASK.limit + 1):
        way = world.places[goal] - seen.observation[STATE][0, -1].numpy()
        step = plane.step([slot], torch.from_numpy(way / np.linalg.norm(way)).float()[None, None])
        seen, total = step.context, total + float(step.rewards.sum())
        if step.terminated | step.truncated:
            return total, bool(step.success), bool(step.terminated), steps
    raise AssertionError("the episode has no end")


def test_found_by_name_and_described():
    task = leaves.make("tasks", {"name": "point_instructions", "goals": 2}, PERSON)
    assert task.goals == 2
    assert task.shapes == {STATE: (2,), CAMERA: (3, PIXELS, PIXELS)}
    assert (task.action_dim, task.limit, task.has_success) == (2, 32, True)


def test_what_is_seen():
    plane = TASK.environments(3, 2)
    context = plane.reset([0, 2], [5, 9])
    assert {name: tuple(v.shape) for name, v in context.observation.items()} == {
        STATE: (2, 2, 2),
        CAMERA: (2, 2, 3, PIXELS, PIXELS),
    }
    assert all(v.dtype == torch.float32 for v in context.observation.values())
    assert torch.equal(context.observation[STATE][:, 0], context.observation[STATE][:, 1])
    assert (
        0
        <= float(context.observation[CAMERA].min())
        < float(context.observation[CAMERA].max())
        <= 1
    )
    assert list(context.prompts) == [TASK.asked(5), TASK.asked(9)]
    step = plane.step([0, 2], torch.full((2, 3, 2), 0.5))
    moved = step.context.observation[STATE]
    torch.testing.assert_close(
        moved[:, 1] - context.observation[STATE][:, 1], torch.full((2, 2), 1.5 * SPEED)
    )
    torch.testing.assert_close(moved[:, 1] - moved[:, 0], torch.full((2, 2), 0.5 * SPEED))
    assert (step.context.observation[CAMERA] != context.observation[CAMERA]).any()
    assert list(step.context.prompts) == list(context.prompts)


def test_the_picture_shows_what_the_words_say():
    for seed in range(50):
        world = scene(seed, TASK.goals)
        assert len(set(world.colours)) == TASK.goals
        picture = paint(world, 200)
        for place, colour in zip(world.places, world.colours, strict=True):
            column, row = ((1 + place[0]) * 100, (1 - place[1]) * 100)
            np.testing.assert_allclose(
                picture[:, int(row), int(column)], COLOURS[colour], atol=1e-6
            )
        named = f"go to the {world.colours[world.asked]} {world.shapes[world.asked]}"
        assert TASK.asked(seed) == named
    assert len({TASK.asked(seed) for seed in range(200)}) == 12


def test_only_the_named_goal_is_rewarded_and_any_ends_the_episode():
    plane = TASK.environments(1, 1)
    for seed in range(20):
        asked = scene(seed, TASK.goals).asked
        for goal in range(TASK.goals):
            right = goal == asked
            total, success, terminated, steps = straight(plane, 0, seed, goal)
            assert (total, success, terminated) == (float(right), right, True)
            assert 4 <= steps <= 15


def test_an_episode_that_goes_nowhere_is_cut():
    plane = TASK.environments(1, 1)
    plane.reset([0], [0])
    step = plane.step([0], torch.zeros(1, 40, 2))
    assert (bool(step.terminated), bool(step.truncated), int(step.executed)) == (
        False,
        True,
        TASK.limit,
    )
    with pytest.raises(ValueError, match="ended or not begun"):
        plane.step([0], torch.zeros(1, 1, 2))
    plane.reset([0], [0])
    assert int(plane.step([0], torch.zeros(1, 1, 2)).executed) == 1


def test_the_same_seed_is_the_same_episode():
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randn(10, 3, 4, 2, generator=generator)
    many, alone = TASK.environments(5, 1), TASK.environments(1, 1)
    slots, seeds = [4, 1, 2], [7, 8, 9]
    many.reset([1], [1234])
    first = many.reset(slots, seeds)
    steps = [many.step(slots, chunk * 0.2) for chunk in chunks[:2]]
    for row, seed in enumerate(seeds):
        assert torch.equal(
            alone.reset([0], [seed]).observation[CAMERA], first.observation[CAMERA][row : row + 1]
        )
        for chunk, together in zip(chunks, steps, strict=False):
            one = alone.step([0], chunk[row : row + 1] * 0.2)
            for name in ("rewards", "executed", "terminated", "truncated", "success"):
                assert torch.equal(getattr(one, name), getattr(together, name)[row : row + 1])
            assert torch.equal(
                one.context.observation[STATE], together.context.observation[STATE][row : row + 1]
            )


def test_a_chunk_is_its_actions_one_by_one():
    plane, single = TASK.environments(20, 1), TASK.environments(20, 1)
    slots = list(range(20))
    context = plane.reset(slots, slots)
    single.reset(slots, slots)
    towards = torch.stack([torch.from_numpy(scene(s, TASK.goals).places[0]) for s in slots])
    chunk = (towards - context.observation[STATE][:, 0]).float()[:, None].repeat(1, 16, 1) * 3
    step = plane.step(slots, chunk)
    assert int(step.terminated.sum()) > 0
    for row in slots:
        going, rewards = True, 0.0
        for h in range(16):
            if going:
                one = single.step([row], chunk[row : row + 1, h : h + 1])
                rewards += float(one.rewards.sum())
                going = not bool(one.terminated | one.truncated)
                taken = h + 1
        assert (taken, rewards) == (int(step.executed[row]), float(step.rewards[row].sum()))
        assert torch.equal(one.context.observation[STATE][0], step.context.observation[STATE][row])


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_demonstrations_succeed_unless_mistaken(noise):
    shown = [TASK.demonstrate(seed, noise) for seed in range(100)]
    assert sum(d.success for d in shown) == 100
    first, again = shown[0], TASK.demonstrate(0, noise)
    assert [one.instruction for one in shown] == [TASK.asked(seed) for seed in range(100)]
    assert len({one.instruction for one in shown}) > 1
    assert torch.equal(first.actions, again.actions)
    assert first.actions.shape == (len(first.rewards), 2)
    assert first.actions.abs().max() <= 1
    assert first.rewards.tolist() == [0.0] * (len(first.rewards) - 1) + [1.0]
    assert {n: tuple(v.shape[1:]) for n, v in first.observation.items()} == TASK.shapes
    begun = TASK.environments(1, 1).reset([0], [0])
    assert all(
        torch.equal(value[0], begun.observation[name][0, 0])
        for name, value in first.observation.items()
    )
    assert PointInstructions(goals=1, mistaken=1.0).demonstrate(0, noise).success
    wrong = [PointInstructions(mistaken=0.4).demonstrate(seed, noise) for seed in range(300)]
    assert 0.5 < sum(d.success for d in wrong) / 300 < 0.7
    assert all(float(d.rewards.sum()) == d.success for d in wrong)


def test_a_tiny_smolvla_is_made_for_it(tmp_path, monkeypatch, capsys):
    """The script that makes the embedded policy, with next to no training:
    the folder is whole and moves.
    """
    small = {"episodes": 6, "steps": 3, "batch": 8, "every": 1, "examine": 2}
    out = tmp_path / "made"
    monkeypatch.setattr(
        "sys.argv", ["make", "--out", str(out), *(f"--{n}={v}" for n, v in small.items())]
    )
    make_tiny_smolvla.main()
    assert "success" in capsys.readouterr().out
    moved = out.rename(tmp_path / "elsewhere")
    assert sum(file.stat().st_size for file in moved.rglob("*")) < 2e6
    for file in moved.rglob("*.json"):
        assert str(tmp_path) not in file.read_text()
        assert "/tmp" not in file.read_text()
    model = LeRobotFlow(str(moved), device="cpu")
    assert dict(model.shapes) == dict(TASK.shapes)
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(5), DDIM(0.0)))
    assert evaluate_control(policy, TASK.environments(2, 1), episodes=2, seed=0).lengths.min() > 0

    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    monkeypatch.chdir(moved)  # to LeRobot's own tools the name of the VLM is relative
    theirs = SmolVLAPolicy.from_pretrained(".")
    assert make_pre_post_processors(theirs.config, pretrained_path=".")
    own = theirs.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.policy.state_dict().items())


def test_render():
    plane = TASK.environments(2, 1)
    with pytest.raises(ValueError, match="slot 1 has no episode"):
        plane.render(1)
    plane.reset([1], [3])
    picture = plane.render(1)
    assert picture.dtype == np.uint8
    assert picture.shape == (256, 256, 3)
    assert (picture == 255).all(-1).any()
    plane.close()


def test_thousands_of_steps_a_second():
    plane = TASK.environments(64, 1)
    slots = list(range(64))
    start = time.process_time()
    for seed in range(10):
        plane.reset(slots, [64 * seed + s for s in slots])
        plane.step(slots, torch.zeros(64, 4, 2))
    assert 10 * 64 * 4 / (time.process_time() - start) > 2000


def test_wrong_settings_and_actions():
    for settings, sentence in (
        ({"goals": 0}, "goals is 0; it must be at least 1"),
        ({"goals": 5}, "goals is 5; there are 4 colours"),
        ({"limit": 0}, "limit is 0"),
        ({"mistaken": 1.5}, r"mistaken is 1.5; it must lie in \[0, 1\]"),
    ):
        with pytest.raises(errors.ConfigError, match=sentence):
            PointInstructions(**settings)
    plane = TASK.environments(1, 1)
    plane.reset([0], [0])
    with pytest.raises(ValueError, match="not a finite number"):
        plane.step([0], torch.full((1, 1, 2), float("nan")))
