"""GIFs show the episode that was played:
its length, its time, its outcome, and small enough to look at.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genpolicy.evaluation import film as films
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.film import Film, film, save, side_by_side
from genpolicy.evaluation.pictures import BAD, GAP, GOOD, GREY, SMALLEST
from genpolicy.policy.files import saved
from genpolicy.policy.policy import ChainPolicy
from tests.toy_control import Point, cloned

torch.set_num_threads(1)
SEED = 50


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ChainPolicy:
    return saved(cloned(tmp_path_factory.mktemp("clone"))).load()


def opened(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """A GIF's frames and how long each stays, in milliseconds."""
    gif, frames, pauses = Image.open(path), [], []
    for place in range(gif.n_frames):
        gif.seek(place)
        frames.append(np.asarray(gif.convert("RGB")))
        pauses.append(gif.info["duration"])
    return frames, pauses


def near(pixel: np.ndarray, colour: str) -> bool:
    asked = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool(np.abs(pixel.astype(int) - asked).max() < 24)


def test_films_are_the_episodes_of_the_evaluation(policy: ChainPolicy):
    task = Point()
    environments = task.environments(6, 1)
    seen = evaluate_control(policy, environments, episodes=12, seed=SEED)
    chosen = [0, 3, 4, 7, 11]
    shots = film(policy, task, environments, seed=SEED, episodes=chosen)
    assert {shot.success for shot in shots} == {True, False}, "the toy should have both"
    for shot, episode in zip(shots, chosen, strict=True):
        assert shot.seed == SEED + episode
        assert shot.success == bool(seen.success[episode])
        assert shot.steps == seen.lengths[episode]
        assert shot.total == pytest.approx(float(seen.returns[episode]), abs=1e-5)
        assert len(shot.frames) == shot.steps  # 10 a second are fewer than a GIF shows
    other = film(policy, task, environments, seed=SEED + 1, episodes=chosen)
    assert [shot.steps for shot in other] != [shot.steps for shot in shots]


def test_a_fast_camera_is_thinned_and_keeps_the_end(policy: ChainPolicy):
    task = Point(limit=30)
    task.fps = 40  # every third is shown
    environments = task.environments(2, 1)
    (shot,) = film(policy, task, environments, seed=SEED, episodes=[0])
    assert len(shot.frames) == len({*range(0, shot.steps, 3), shot.steps - 1})
    assert shot.seconds == pytest.approx(3 / 40)
    task.fps, whole = 1, film(policy, task, environments, seed=SEED, episodes=[0])[0]
    assert np.array_equal(shot.frames[-1], whole.frames[-1])


def test_a_long_episode_gets_no_more_frames_than_can_be_looked_at(policy: ChainPolicy):
    task = Point(limit=251, ends=False)
    (shot,) = film(policy, task, task.environments(1, 1), seed=SEED, episodes=[0])
    assert shot.steps == 251
    assert len(shot.frames) == 84 + 1 <= films.LONGEST, "every third, and the last"
    assert shot.seconds == pytest.approx(3 / 10)


def frames(count: int, size: int = 24) -> list[np.ndarray]:
    """A white square that moves over black."""
    made = np.zeros((count, size, size, 3), np.uint8)
    for place in range(count):
        made[place, 4:8, place % (size - 4) : place % (size - 4) + 4] = 255
    return list(made)


@pytest.mark.parametrize(
    ("success", "colour", "said"),
    [(True, GOOD, "success"), (False, BAD, "failure"), (None, GREY, "return 2.5")],
)
def test_the_border_tells_the_outcome(tmp_path: Path, success: bool | None, colour: str, said: str):
    shot = Film(7, 0.1, frames(5), steps=5, total=2.5, success=success)
    assert shot.outcome == said
    save({"": shot}, tmp_path / "deep" / "one.gif")
    shown, pauses = opened(tmp_path / "deep" / "one.gif")
    assert len(shown) == 5
    assert pauses == [100] * 4 + [1100]
    for picture in shown:
        assert near(picture[1, 1], colour)
        assert picture[SMALLEST // 2, SMALLEST // 2].max() < 24, "the middle is the world's black"
    assert not np.array_equal(shown[0], shown[1])


def test_side_by_side_holds_the_end_of_the_shorter(tmp_path: Path):
    short, long = (
        Film(7, 0.1, frames(2), 2, success=True),
        Film(7, 0.1, frames(6), 6, success=False),
    )
    save({"before": long, "after": short}, tmp_path / "pair.gif")
    shown, _ = opened(tmp_path / "pair.gif")
    assert len(shown) == 6
    half = (shown[0].shape[1] - GAP) // 2
    left, right = (
        [picture[:, :half] for picture in shown],
        [picture[:, -half:] for picture in shown],
    )
    assert near(left[0][1, 1], BAD)
    assert near(right[0][1, 1], GOOD)
    assert not np.array_equal(left[1], left[5])
    assert np.array_equal(right[1], right[5])
    assert not np.array_equal(right[0], right[1])


def test_side_by_side_plays_one_start(tmp_path: Path, policy: ChainPolicy):
    task = Point(limit=30)
    pair = side_by_side(
        {"before": policy, "after": policy}, task, SEED, tmp_path / "pair.gif", episode=3
    )
    (alone,) = film(policy, task, task.environments(1, 1), seed=SEED, episodes=[3])
    assert list(pair) == ["before", "after"]
    for shot in pair.values():
        assert all(np.array_equal(a, b) for a, b in zip(shot.frames, alone.frames, strict=True))
    assert (tmp_path / "pair.gif").is_file()


def test_a_gif_is_made_smaller_until_it_fits(tmp_path: Path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (4, 120, 120, 3), np.uint8)
    shot = Film(7, 0.1, list(noise), 4, success=True)
    save({"": shot}, tmp_path / "large.gif")
    monkeypatch.setattr(films, "BYTES", 30_000)
    save({"": shot}, tmp_path / "small.gif")
    sizes = [(tmp_path / f"{name}.gif").stat().st_size for name in ("large", "small")]
    assert sizes[0] > 30_000 >= sizes[1]
    assert len(opened(tmp_path / "small.gif")[0]) == 4
