"""Chunks, limits, histories,
and that an episode is a function of its seed and its actions alone.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genpolicy.config.errors import RenderError
from genpolicy.tasks._environments import Environments
from tests.tasks import worlds

STATE, PICTURE = "observation.state", "observation.images.top"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def environments():
    """A maker of environments that are closed after the test."""
    made = []

    def make(world, count=1, history=1, limit=20, workers=0):
        made.append(Environments(world, count, history, limit, "walk", workers))
        return made[-1]

    yield make
    for some in made:
        some.close()


def chunk(*rows):
    """One slot's actions [1,T,2] from their first numbers."""
    return torch.tensor([[[row, 0.0] for row in rows]])


def test_a_chunk_stops_where_the_episode_ends(environments):
    walk = environments(worlds.Walk)
    context = walk.reset([0], [0])
    assert context.prompts == ["walk"]
    assert context.observation[STATE].shape == (1, 1, 2)
    assert context.observation[STATE].dtype == torch.float32
    needed = int(torch.ceil(3 - context.observation[STATE][0, 0, 0]))
    step = walk.step([0], torch.ones(1, 8, 2))
    assert step.executed.tolist() == [needed]
    assert step.rewards.tolist() == [[2.0] * needed + [0.0] * (8 - needed)]
    assert (step.terminated.tolist(), step.truncated.tolist(), step.success.tolist()) == (
        [True],
        [False],
        [True],
    )
    assert step.context.observation[STATE][0, -1, 0] > 3


def test_the_limit_truncates(environments):
    counter = environments(worlds.Counter, limit=5)
    counter.reset([0], [0])
    first, second = counter.step([0], chunk(0, 0, 0)), counter.step([0], chunk(0, 0, 0))
    assert (first.executed.item(), first.truncated.item(), first.terminated.item()) == (
        3,
        False,
        False,
    )
    assert (second.executed.item(), second.truncated.item(), second.terminated.item()) == (
        2,
        True,
        False,
    )
    assert second.rewards.tolist() == [[1, 1, 0]]


def test_an_end_at_the_limit_is_the_tasks_own(environments):
    free = environments(worlds.Walk)
    free.reset([0], [0])
    needed = free.step([0], torch.ones(1, 8, 2)).executed.item()
    walk = environments(worlds.Walk, limit=needed)
    walk.reset([0], [0])
    step = walk.step([0], torch.ones(1, 8, 2))
    assert (step.executed.item(), step.terminated.item(), step.truncated.item()) == (
        needed,
        True,
        False,
    )


def test_a_simulation_may_cut_earlier(environments):
    cuts = environments(worlds.Cuts)
    cuts.reset([0], [0])
    step = cuts.step([0], chunk(0, 0, 0, 0))
    assert (step.executed.item(), step.terminated.item(), step.truncated.item()) == (3, False, True)


def test_success_is_kept(environments):
    counter = environments(worlds.Counter)
    counter.reset([0], [0])
    assert [counter.step([0], chunk(0)).success.item() for _ in range(4)] == [
        False,
        True,
        True,
        True,
    ]
    counter.reset([0], [0])
    assert not counter.step([0], chunk(0)).success.item()


def test_history_is_of_environment_steps(environments):
    counter = environments(worlds.Counter, history=4)
    seen = [counter.reset([0], [0])] + [counter.step([0], chunk(0, 0)).context for _ in range(3)]
    frames = [context.observation[STATE][0, :, 0].tolist() for context in seen]
    assert frames == [[0, 0, 0, 0], [0, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 6]]
    assert counter.reset([0], [0]).observation[STATE][0, :, 0].tolist() == [0, 0, 0, 0]


def test_pictures_are_between_0_and_1(environments):
    counter = environments(worlds.Counter, history=2)
    counter.reset([0], [0])
    picture = counter.step([0], chunk(0)).context.observation[PICTURE]
    assert picture.shape == (1, 2, 3, 2, 2)
    assert torch.equal(picture[0, :, 0, 0, 0], torch.tensor([0.0, 1 / 255]))


def test_actions_are_clipped(environments):
    walk = environments(worlds.Walk)
    walk.reset([0], [0])
    assert walk.step([0], chunk(-7.0)).rewards.item() == -1


def episode(walk, slot, seed):
    """Every observation and reward of 3 decisions, whose actions depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    seen, rewards = [walk.reset([slot], [seed]).observation[STATE]], []
    for _ in range(3):
        step = walk.step([slot], torch.rand(1, 2, 2, generator=generator) - 0.5)
        seen.append(step.context.observation[STATE])
        rewards.append(step.rewards)
    return torch.cat([torch.cat(seen).flatten(), torch.cat(rewards).flatten()])


def side_by_side(walk, slots, seeds):
    """The same episodes, interleaved."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    seen, rewards = [walk.reset(slots, seeds).observation[STATE]], []
    for _ in range(3):
        actions = torch.cat(
            [torch.rand(1, 2, 2, generator=generator) - 0.5 for generator in generators]
        )
        step = walk.step(slots, actions)
        seen.append(step.context.observation[STATE])
        rewards.append(step.rewards)
    return [
        torch.cat([torch.stack(seen)[:, n].flatten(), torch.stack(rewards)[:, n].flatten()])
        for n in range(len(seeds))
    ]


def is_function_of_seed(make, workers):
    """Bit for bit: alone in a fresh slot, in a used slot, and beside others in other slots."""
    alone = [episode(make(count=1), 0, seed) for seed in (5, 6, 7)]
    walk = make(count=4, workers=workers)
    for slot in range(4):
        episode(walk, slot, 40 + slot)
    used = [episode(walk, slot, seed) for slot, seed in ((2, 5), (2, 6), (0, 7))]
    together = side_by_side(walk, [3, 0, 2], [5, 6, 7])
    return all(
        torch.equal(a, b) and torch.equal(a, c)
        for a, b, c in zip(alone, used, together, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2, 9])
def test_an_episode_is_a_function_of_its_seed(environments, workers):
    assert is_function_of_seed(lambda **how: environments(worlds.Walk, **how), workers)


def test_a_leak_would_be_seen(environments):
    assert not is_function_of_seed(lambda **how: environments(worlds.Leaky, **how), 0)


def test_who_acts_after_the_end_is_told(environments):
    counter = environments(worlds.Counter, limit=2)
    with pytest.raises(ValueError, match="reset it first"):
        counter.step([0], chunk(0))
    counter.reset([0], [0])
    counter.step([0], chunk(0, 0))
    with pytest.raises(ValueError, match="reset it first"):
        counter.step([0], chunk(0))


def test_bad_actions_get_a_sentence(environments):
    walk = environments(worlds.Walk)
    walk.reset([0], [0])
    with pytest.raises(ValueError, match="diverged"):
        walk.step([0], chunk(float("nan")))
    with pytest.raises(ValueError, match="has 3 numbers; this environment takes 2"):
        walk.step([0], torch.zeros(1, 1, 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_no_picture_is_one_sentence(environments, workers):
    with pytest.raises(RenderError, match="can't be drawn here: no screen"):
        environments(worlds.Walk, workers=workers).render(0)


def test_a_workers_exception_arrives_and_it_goes_on(environments):
    odd = environments(worlds.Odd, count=2, workers=2)
    odd.reset([0, 1], [0, 1])
    with pytest.raises(ValueError, match="the arm has come off") as caught:
        odd.step([0, 1], torch.cat([chunk(1), chunk(0)]))
    assert str(caught.value) == "the arm has come off"
    assert "Traceback" in caught.value.__notes__[0]
    assert odd.step([0, 1], torch.cat([chunk(0), chunk(0)])).executed.tolist() == [1, 1]


def test_a_world_that_cannot_be_made_is_told(environments):
    with pytest.raises(ValueError, match="there is no such arm"):
        environments(worlds.Broken, workers=1)


def test_a_workers_death_is_told(environments):
    odd = environments(worlds.Odd, workers=1)
    odd.reset([0], [0])
    with pytest.raises(RuntimeError, match=r"ended unexpectedly \(exit code 3\)"):
        odd.step([0], chunk(-1))
    with pytest.raises(RuntimeError, match="ended unexpectedly"):
        odd.reset([0], [0])


def alive(pid):
    """True where a process runs (one that nobody has waited for yet does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid):
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_workers_hold_no_torch_ignore_signals_and_end(environments):
    odd = environments(worlds.Odd, count=2, workers=2)
    pids, torches = odd.reset([0, 1], [0, 1]).observation[STATE][:, 0].int().T.tolist()
    assert torches == [0, 0]
    assert len({os.getpid(), *pids}) == 3
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pids[0], name)
    assert odd.step([0, 1], torch.zeros(2, 1, 2)).executed.tolist() == [1, 1]
    odd.close()
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("world", ["Odd", "Stuck"])
def test_workers_end_with_a_killed_parent(world):
    """...also in the middle of a step that hangs. The script starts workers without a guard for its name, as notebooks do."""
    code = f"""
import os, signal, time, torch
from genpolicy.tasks._environments import Environments
from tests.tasks import worlds
odd = Environments(worlds.{world}, 1, 1, 9, "walk", workers=1)
print(int(odd.reset([0], [0]).observation["observation.state"][0, 0, 0]), flush=True)
if "{world}" == "Stuck":
    odd._shares[0].ask("step", [0], torch.zeros(1, 1, 2).numpy())
    time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert gone(int(done.stdout))
