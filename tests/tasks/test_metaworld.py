"""MetaWorld: the goal is seen after every step, an episode is its seed's,
a demonstration is what happened.
"""

import warnings

import numpy as np
import pytest
import torch

from genpolicy.config import leaves
from genpolicy.config.errors import ConfigError, RenderError
from genpolicy.config.origin import PERSON
from genpolicy.rollout.person import Intervention, Watched
from genpolicy.tasks import _sawyer_pictures
from genpolicy.tasks._sawyer import PICTURES, POINTS, STATE, WORLD, Cloud, Sawyer, catalogue
from genpolicy.tasks._sawyer_pictures import Studio, moment
from genpolicy.tasks._simulators import library
from genpolicy.tasks.metaworld import MetaWorld

PEG, ASSEMBLY, BUTTON = "peg-insert-side-v3", "assembly-v3", "button-press-topdown-v3"
PUSH = "push-v3"
mujoco = library("mujoco", "the test")  # told how to draw without a screen


class Clipped(Sawyer):
    """The trap: the goal's bounds are still those of a hidden goal,
    so that step() clips it to 0.
    """

    def __init__(self, env, reward):
        super().__init__(env, reward)
        self._world._partially_observable = True
        assert (
            self._world.sawyer_observation_space.high[-1] == 0
        )  # it is cached here, as its constructor does
        self._world._partially_observable = False


def goals(simulation, seed):
    """The goal as reset() and as step() show it, and where it is."""
    first, _ = simulation.reset(seed=seed)
    second, *_ = simulation.step(np.zeros(4, np.float32))
    return first[WORLD][-3:], second[WORLD][-3:], simulation._world._target_pos.astype(np.float32)


def successes(task, simulation, seeds):
    """Counts the episodes that the expert wins in this simulation."""
    task.__dict__["_stage"] = simulation
    return sum(task.demonstrate(seed, 0.0).success for seed in seeds)


@pytest.mark.parametrize("env", [PEG, ASSEMBLY])
def test_the_goal_is_seen(env):
    for seed in range(3):
        at_reset, at_step, target = goals(Sawyer(env, "sparse"), seed)
        assert np.array_equal(at_reset, target)
        assert np.array_equal(at_step, target)
    assert successes(MetaWorld(env), Sawyer(env, "sparse"), range(4)) >= 3


@pytest.mark.parametrize("env", [PEG, ASSEMBLY])
def test_a_clipped_goal_would_be_seen(env):
    at_reset, at_step, target = goals(Clipped(env, "sparse"), 0)
    assert np.array_equal(at_reset, target)
    assert not np.array_equal(at_step, target)
    assert successes(MetaWorld(env), Clipped(env, "sparse"), range(4)) == 0


def played(simulation, env, seed, steps=60):
    """The observations, and MetaWorld's own rewards, of its expert's first steps."""
    script = library("metaworld.policies", "the test").ENV_POLICY_MAP[env]()
    simulation.reset(seed=seed)
    seen, rewards = [simulation.numbers], []
    for _ in range(steps):
        action = (
            script.get_action(simulation.numbers.astype(np.float64)).clip(-1, 1).astype(np.float32)
        )
        rewards.append(simulation.step(action)[1])
        seen.append(simulation.numbers)
    return np.array(seen), np.array(rewards)


def plain(env):
    """MetaWorld's own reset and touch."""
    simulation = Sawyer(env, "dense")
    for shortcut in ("_reset_hand", "touching_object"):
        simulation._world.__dict__.pop(shortcut)
    return simulation


def assert_shortcuts_change_nothing(env):
    quick, slow = Sawyer(env, "dense"), plain(env)
    for seed in (3, 4):  # the second begins where an episode has been
        for ours, theirs in zip(played(quick, env, seed), played(slow, env, seed), strict=True):
            assert np.array_equal(ours, theirs), env


@pytest.mark.parametrize("env", [PEG, ASSEMBLY, "shelf-place-v3"])
def test_shortcuts_are_exact(env):
    assert_shortcuts_change_nothing(env)


@pytest.mark.slow
def test_shortcuts_are_exact_on_all_fifty():
    for env in catalogue():
        assert_shortcuts_change_nothing(env)


def test_control_a_hand_that_never_settles_is_seen():
    restless = plain(PUSH)
    restless._world._reset_hand = lambda *_: setattr(
        restless._world, "init_tcp", restless._world.tcp_center
    )
    assert not np.array_equal(played(restless, PUSH, 3, 0)[0], played(plain(PUSH), PUSH, 3, 0)[0])


def test_touch_is_metaworlds():
    """All along an episode in which the expert grasps: neither always so nor never."""
    simulation = Sawyer(PUSH, "sparse")
    world, script = (
        simulation._world,
        library("metaworld.policies", "the test").ENV_POLICY_MAP[PUSH](),
    )
    simulation.reset(seed=3)
    felt = []
    for _ in range(80):
        simulation.step(
            script.get_action(simulation.numbers.astype(np.float64)).clip(-1, 1).astype(np.float32)
        )
        felt.append(world.touching_main_object)
        assert felt[-1] == type(world).touching_object(world, world._get_id_main_object())
    assert any(felt)
    assert not all(felt)


def test_a_demonstration_is_what_happened():
    """The demonstrated actions, played in environments whose slots were used before,
    give the same frames, rewards and success.
    """
    task = MetaWorld(BUTTON)
    shown = task.demonstrate(3, 0.1)
    assert shown.success
    assert torch.equal(task.demonstrate(3, 0.1).actions, shown.actions)
    length = len(shown.actions)
    assert shown.rewards.tolist() == [0.0] * (length - 1) + [1.0]
    assert shown.actions.abs().max() <= 1
    assert {
        name: tuple(value.shape[1:]) for name, value in shown.observation.items()
    } == task.shapes
    environments = task.environments(2, 1)
    environments.reset([0, 1], [8, 9])
    environments.step([0, 1], torch.rand(2, 30, 4) * 2 - 1)
    first = environments.reset([1], [3])
    assert torch.equal(first.observation[WORLD][0, 0], shown.observation[WORLD][0])
    step = environments.step([1], shown.actions[None, : length - 1])
    assert not step.terminated.item()
    for name in task.shapes:
        assert torch.equal(step.context.observation[name][0, 0], shown.observation[name][-1])
    step = environments.step([1], torch.cat([shown.actions[None, -1:], torch.zeros(1, 3, 4)], 1))
    assert (step.terminated.item(), step.success.item(), step.executed.item()) == (True, True, 1)
    environments.close()


def test_noise_is_the_seeds_and_less_on_the_gripper():
    task = MetaWorld(BUTTON)
    first, second = (task.demonstrate(seed, 0.0).observation[STATE][0] for seed in (0, 1))
    assert torch.equal(first, second)  # the hand starts where it always does
    worlds = [task.demonstrate(seed, 0.0).observation[WORLD][0] for seed in (0, 1)]
    assert not torch.equal(*worlds)
    calm, noisy = task.demonstrate(0, 0.0), task.demonstrate(0, 0.1)
    moved = (noisy.actions[0] - calm.actions[0]).abs()
    assert moved.max() > 0
    noises = np.random.Generator(np.random.Philox(key=0)).standard_normal(4) * [0.1, 0.1, 0.1, 0.03]
    assert torch.allclose(
        noisy.actions[0], (calm.actions[0] + torch.tensor(noises)).clamp(-1, 1).float(), atol=1e-6
    )


def test_experts_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MetaWorld(PEG).demonstrate(0, 0.0)


def test_the_dense_reward_is_metaworlds():
    dense, sparse = (
        MetaWorld(BUTTON, reward=reward).demonstrate(0, 0.0).rewards
        for reward in ("dense", "sparse")
    )
    assert len(dense) == len(sparse)
    assert 0 <= dense.min() < 1 < dense.max() <= 10
    assert sparse.unique().tolist() == [0, 1]


def test_what_is_asked_and_how_fast():
    task = leaves.make("tasks", {"name": "metaworld", "env": PEG}, PERSON)
    assert (task.instruction, task.limit, task.action_dim) == ("peg insert side", 150, 4)
    sawyer = Sawyer(PEG, "sparse")
    assert task.fps == round(1 / sawyer._world.dt)
    assert task.action_low == sawyer.action_space.low.tolist()
    assert task.action_high == sawyer.action_space.high.tolist()


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean peg-insert-side-v3"):
        leaves.make("tasks", {"name": "metaworld", "env": "peg-insert-v3"}, PERSON)
    with pytest.raises(ValueError, match="limit is 0"):
        MetaWorld(PEG, limit=0)
    with pytest.raises(ValueError, match="did you mean points"):
        leaves.make("tasks", {"name": "metaworld", "env": PEG, "see": "point"}, PERSON)


@pytest.mark.parametrize("spread", [0.4, 0.01])
def test_a_smaller_spread_is_the_middle_of_the_range(spread):
    """A start moves along the line to the middle;
    with the same seed it is the same share of the way.
    """
    whole, part = Sawyer(ASSEMBLY, "sparse"), Sawyer(ASSEMBLY, "sparse", spread=spread)
    middle = np.array([0.0, 0.8, 0.1])  # of the peg, MetaWorld's sawyer_assembly_peg_v3.py
    moved = []
    for seed in range(20):
        far, near = ((goals(simulation, seed)[0] - middle)[:2] for simulation in (whole, part))
        assert np.allclose(near, spread * far, atol=1e-6)
        moved.append(abs(far - near).max())
    assert min(moved) > 1e-3  # the whole range would be told apart


def test_a_spread_that_leaves_no_start_is_told_at_once():
    with pytest.raises(ValueError, match="spread is too small for coffee-push-v3"):
        MetaWorld("coffee-push-v3", spread=0.1).environments(1, 1)
    for spread in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"spread is {spread}"):
            MetaWorld(PEG, spread=spread)


def test_a_picture_or_one_sentence(monkeypatch):
    environments = MetaWorld(PEG).environments(1, 1)
    environments.reset([0], [0])

    def fail(*_):
        raise ImportError("Cannot initialize\na EGL device display")

    with monkeypatch.context() as without:
        without.setattr(mujoco, "Renderer", fail)
        with pytest.raises(
            RenderError,
            match="MuJoCo can't draw here: Cannot initialize a EGL device display; set MUJOCO_GL",
        ):
            environments.render(0)
    try:
        picture = environments.render(0)
    except RenderError:
        return  # this machine has no way to draw
    finally:
        environments.close()
    assert picture.shape == (240, 240, 3)
    assert picture.dtype == np.uint8
    # Upright: beside the arm, the grey floor is above and the wooden table (more red than blue) is
    # below.
    warmth = picture[:, 150:, 0].astype(float) - picture[:, 150:, 2]
    assert warmth[180:].mean() > 20 > 10 > warmth[:50].mean()


def can_draw():
    """True where this machine has a way to draw."""
    try:
        Sawyer(BUTTON, "sparse", "pixels").reset(seed=0)[0][PICTURES]
    except RenderError:
        return False
    return True


SEES = [("pixels", PICTURES), ("points", POINTS)]


def moved(simulation, name, change):
    """The observation ``name`` of seed 0, before and after ``change(world)``."""
    first, _ = simulation.reset(seed=0)
    before = first[name].copy()
    change(simulation._world)
    mujoco.mj_forward(simulation._world.model, simulation._world.data)
    return before, simulation._frame(simulation.numbers)[name]


def shift_goal(world):
    world._target_pos = world._target_pos + np.array([0.05, -0.03, 0.0])


def shift_object(world):
    world.data.qpos[9] += 0.05  # x of the puck, after the arm's seven joints and its two fingers


@pytest.mark.parametrize(("see", "name"), SEES)
def test_goal_and_object_are_seen_and_nothing_else_says_where(see, name):
    if see == "pixels" and not can_draw():
        return
    task = MetaWorld(PUSH, see=see)
    assert task.shapes == {STATE: (4,), name: (3, 64, 64) if see == "pixels" else (128, 3)}
    simulation = Sawyer(PUSH, "sparse", see)
    for change in (shift_goal, shift_object):
        before, after = moved(simulation, name, change)
        assert before.shape == task.shapes[name]
        different = (before != after).any(0 if see == "pixels" else 1).mean()
        assert 0.001 < different < 0.75  # of a cloud, the puck has 88 points of 128
    assert np.array_equal(*moved(simulation, name, lambda world: None))
    frame, _ = simulation.reset(seed=0)
    assert set(frame) == set(task.shapes)
    other, _ = simulation.reset(seed=1)
    assert np.array_equal(frame[STATE], other[STATE])
    assert not np.array_equal(frame[name], other[name])


def test_the_goal_in_the_picture_is_green_and_where_it_is():
    if not can_draw():
        return
    simulation = Sawyer(PUSH, "sparse", "pixels")
    for right, down in ((0.1, 0.0), (0.0, 0.1), (-0.1, 0.0)):

        def move(world, x=right, y=down):
            world._target_pos = world._target_pos + np.array([x, y, 0.0])

        places = []
        for picture in moved(simulation, PICTURES, move):
            assert picture.dtype == np.uint8
            red, green, blue = picture.astype(int)
            rows, columns = np.nonzero((green > 2 * red) & (green > 2 * blue))
            assert 4 < len(rows) < 60
            places.append(np.array([rows.mean(), columns.mean()]))
        down_by, right_by = places[1] - places[0]
        # The view is from the far side: what is further from the arm (y) is lower, what is at the
        # arm's right (x) is left.
        assert abs(down_by - 90 * down) < 4
        assert abs(right_by + 90 * right) < 4


@pytest.mark.parametrize(("see", "name"), SEES)
@pytest.mark.parametrize("workers", [0, 1])
def test_lazy_frames_are_the_eager_ones(see, name, workers):
    """A chunk at once, drawn late, shows what single steps show;
    with history, also past moments.
    """
    if see == "pixels" and not can_draw():
        return
    actions = torch.rand(1, 7, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    task = MetaWorld(PUSH, see=see, workers=workers)
    environments = [task.environments(1, 3), MetaWorld(PUSH, see=see).environments(1, 1)]
    firsts = [some.reset([0], [5]).observation for some in environments]
    assert torch.equal(firsts[0][name][:, 2:], firsts[1][name])
    late = environments[0].step([0], actions).context.observation
    singly = [
        environments[1].step([0], actions[:, j : j + 1]).context.observation for j in range(7)
    ]
    for each in (STATE, name):
        assert torch.equal(late[each], torch.cat([seen[each] for seen in singly[-3:]], 1))
        assert not torch.equal(late[each][:, 0], late[each][:, 2])
    assert late[name].dtype == torch.float32
    for some in environments:
        some.close()


@pytest.mark.parametrize("env", [PEG, ASSEMBLY])
def test_fixtures_are_in_place_from_the_first_frame_on(env):
    """MetaWorld's reset moves a peg or a box and leaves its geoms where they were:
    a stale picture.
    """
    simulation = Sawyer(env, "sparse", "points")
    simulation.reset(seed=0)
    first = simulation.reset(seed=3)[0][POINTS]
    second = simulation.step(np.zeros(4, np.float32))[0][POINTS]
    assert abs(first - second).max() < 0.03
    stale = Sawyer(env, "sparse")
    stale.reset(seed=0)
    stale.reset(seed=3)
    assert abs(Cloud(stale._world.model, 128)(moment(stale._world)) - second).max() > 0.05


def test_a_films_camera_changes_nothing():
    if not can_draw():
        return
    first, second = (Sawyer(PUSH, "sparse", "pixels") for _ in range(2))
    shown, film = first.reset(seed=2)[0][PICTURES], first.render()
    assert film.shape == (240, 240, 3)
    assert np.array_equal(first.reset(seed=2)[0][PICTURES], shown)
    assert np.array_equal(second.reset(seed=2)[0][PICTURES], shown)
    assert np.array_equal(first.render(), film)
    first.close()
    assert np.array_equal(second.reset(seed=2)[0][PICTURES], shown)


def test_what_nobody_sees_is_not_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(Studio, "__init__", lambda self, model, size: None)
    monkeypatch.setattr(
        Studio, "draw", lambda self, seen: drawn.append(1) or np.zeros((3, 64, 64), np.uint8)
    )
    monkeypatch.setattr(_sawyer_pictures, "_studios", {})
    environments = MetaWorld(PUSH, see="pixels").environments(2, 2)
    environments.reset([0, 1], [0, 1])
    assert len(drawn) == 2  # repeated frames are one picture
    environments.step([0, 1], torch.zeros(2, 8, 4))
    assert len(drawn) == 2 + 2 * 2
    environments.close()


@pytest.mark.parametrize(("see", "name"), SEES)
def test_the_same_seed_looks_the_same(see, name):
    """Whatever was seen before, and in another simulation of the same task."""
    if see == "pixels" and not can_draw():
        return
    first, second = (Sawyer(ASSEMBLY, "sparse", see) for _ in range(2))
    shown = first.reset(seed=3)[0][name]
    second.reset(seed=8)[0][name]
    second.step(np.ones(4, np.float32))
    assert np.array_equal(second.reset(seed=3)[0][name], shown)
    assert not np.array_equal(second.reset(seed=4)[0][name], shown)


@pytest.mark.parametrize("env", [PEG, ASSEMBLY])
def test_eyes_do_not_touch_the_world(env):
    shown = [MetaWorld(env, see=see).demonstrate(3, 0.1) for see in ("state", "points")]
    assert torch.equal(shown[0].actions, shown[1].actions)
    assert torch.equal(shown[0].observation[STATE], shown[1].observation[STATE])


def test_eyes_change_nothing_but_what_is_seen():
    shown = [MetaWorld(BUTTON, see=see).demonstrate(3, 0.1) for see in ("state", "points")]
    assert torch.equal(shown[0].actions, shown[1].actions)
    assert torch.equal(shown[0].observation[STATE], shown[1].observation[STATE])
    clouds = shown[1].observation[POINTS]
    assert clouds.shape == (len(shown[1].actions), 128, 3)
    still = (clouds == clouds[0]).all(2).all(0)
    hand = clouds[:, :32].mean(1) - shown[1].observation[STATE][:, :3]
    assert still.sum() > 15  # the table's things
    assert hand.std(0).max() < 0.01  # the gripper's points go where the hand goes
    assert clouds[:, 0].std(0).max() > 0.05
    if can_draw():
        pictures = MetaWorld(BUTTON, see="pixels").demonstrate(3, 0.1).observation[PICTURES]
        assert pictures.shape == (len(shown[1].actions), 3, 64, 64)
        assert 0.9 < pictures.max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("env", sorted(catalogue()))
def test_every_task(env):
    """The goal is seen, and seeds are episodes, whatever ran before;
    the expert wins most of the time.
    """
    task = MetaWorld(env)
    at_reset, at_step, target = goals(Sawyer(env, "sparse"), 0)
    assert np.array_equal(at_reset, target)
    assert np.array_equal(at_step, target)
    shown = [task.demonstrate(seed, 0.0) for seed in (0, 1, 2, 3, 0)]
    assert torch.equal(shown[0].actions, shown[-1].actions)
    assert torch.equal(shown[0].observation[WORLD], shown[-1].observation[WORLD])
    assert sum(demonstration.success for demonstration in shown[:4]) >= 2
    clouds = Sawyer(env, "sparse", "points")
    assert np.isfinite(clouds.reset(seed=0)[0][POINTS]).all()
    assert not np.array_equal(clouds.reset(seed=1)[0][POINTS], clouds.reset(seed=0)[0][POINTS])


# -- a person --------------------------------------------------------------------------------------


def rescued(patience: int) -> tuple[list[bool], int]:
    """The success of three episodes of reach in which the robot does nothing, and the steps of the
    person who takes over after so many without progress.
    """
    task = MetaWorld("reach-v3", limit=100)
    world = Watched(task.environments(1, 1), task, Intervention(patience=patience))
    success, steps = [], 0
    for seed in range(3):
        world.reset([0], [seed])
        over = False
        while not over:
            step = world.step([0], torch.zeros(1, 8, 4))
            steps += int(step.human.sum())
            over = bool(step.terminated | step.truncated)
        success.append(bool(step.success))
    world.close()
    return success, steps


def test_the_script_takes_over_where_a_robot_makes_no_progress():
    success, steps = rescued(patience=10)
    assert all(success)
    assert steps > 0
    assert rescued(patience=1000) == ([False] * 3, 0)


def test_the_script_can_not_take_over_where_its_numbers_are_not_shown():
    with pytest.raises(ConfigError, match="see: state"):
        MetaWorld("reach-v3", see="points").person()
