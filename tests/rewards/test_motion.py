"""The motion world: true videos score, every kind of wrong video does not, and the split keeps
captions apart.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genpolicy.cli.main import main
from genpolicy.rewards import _motion as world
from genpolicy.rewards import _shapes as shapes
from genpolicy.rewards._shapes import Thing
from genpolicy.rewards.motion_dense import motion_dense
from genpolicy.rewards.motion_strict import motion_strict

TEXT = "a red circle moves right"
RED_CIRCLE = Thing("red", "circle")
EVEN = np.linspace(9, 23, 9)


def film(way, thing=RED_CIRCLE, across=16.0, others=()):
    """A video of a thing at x = ``way``, [F, 32, 32, 3], with still others."""
    return np.stack([shapes.draw([(thing, x, across, 5.0), *others]) for x in way])


def strict_dense(video, text=TEXT):
    """Both scores of one video."""
    return world.scores(video[None], [text])[0].tolist()


def true_videos(each=4, seed=0, pause=0):
    """Videos of all captions, and the captions."""
    rng = np.random.default_rng(seed)
    texts = world.captions() * each
    return np.stack([world.render(world.parse(text), rng, pause) for text in texts]), texts


def test_there_are_48_captions_and_all_parse():
    motions = [world.parse(text) for text in world.captions()]
    assert [world.caption(motion) for motion in motions] == world.captions()
    assert len(set(motions)) == 48
    assert world.parse("  A red circle  moves Right. ") == world.parse(TEXT)


@pytest.mark.parametrize(
    "text", ["", "a red circle", "a pink circle moves up", "a red circle jumps"]
)
def test_what_is_no_caption_is_refused_in_one_sentence(text):
    with pytest.raises(ValueError, match="is not a motion caption") as error:
        world.parse(text)
    assert "\n" not in str(error.value)


def test_true_videos_score_and_other_captions_do_not():
    videos, texts = true_videos()
    assert world.scores(videos, texts).min() == 1
    other = world.scores(videos, texts[1:] + texts[:1])  # the next caption differs in direction
    assert other[:, 0].max() == 0
    assert other[:, 1].max() <= 0.75


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        pytest.param(lambda videos: videos[:, :1].repeat(9, 1), 0.5, id="still"),
        pytest.param(lambda videos: videos[:, ::-1], 0.5, id="reversed"),
    ],
)
def test_a_video_that_does_not_move_as_said_has_half(change, dense):
    videos, texts = true_videos(each=2)
    scores = world.scores(change(videos), texts)
    assert scores[:, 0].max() == 0
    np.testing.assert_allclose(scores[:, 1], dense)


def test_a_pause_on_the_way_is_not_even():
    videos, texts = true_videos(each=2, pause=3)
    scores = world.scores(videos, texts)
    assert scores[:, 0].max() == 0
    # colour and shape are right, five of eight steps go right
    assert scores[:, 1].max() <= (1 + 1 + 5 / 8 + 5 / 8) / 4


@pytest.mark.parametrize(
    ("video", "dense"),
    [
        pytest.param(film(EVEN), 1.0, id="right"),
        pytest.param(film(EVEN, Thing("green", "circle")), 0.75, id="wrong colour"),
        pytest.param(film(EVEN, Thing("red", "square")), 0.75, id="wrong shape"),
        pytest.param(film([9] * 4 + [23] * 5), 0.5 + 1 / 32, id="teleport"),
        pytest.param(film([9, 15, 11, 17, 13, 19, 15, 21, 17]), 0.5 + 1 / 8, id="to and fro"),
        pytest.param(
            film(EVEN, others=[(Thing("blue", "square"), 16, 27, 3.5)]), 0.9, id="another"
        ),
        pytest.param(film([9], across=16).repeat(9, 0), 0.5, id="still"),
        pytest.param(film(EVEN)[::-1], 0.5, id="reversed"),
        pytest.param(film(EVEN).transpose(0, 2, 1, 3), 0.5, id="down"),
        pytest.param(np.full((9, 32, 32, 3), 245, np.uint8), 0.0, id="nothing"),
    ],
)
def test_each_kind_of_mistake_costs_what_it_should(video, dense):
    strict, found = strict_dense(video)
    assert strict == (dense == 1.0)
    assert found == pytest.approx(dense, abs=0.01)


def test_a_frame_without_the_object_costs_its_share():
    video = film(EVEN)
    video[4] = shapes.BACKGROUND
    strict, dense = strict_dense(video)
    assert strict == 0
    assert dense == pytest.approx((8 / 9 + 8 / 9 + 6 / 8 + 6 / 8) / 4)


def test_other_lengths_and_sizes_score_alike():
    for length in (5, 17):
        assert strict_dense(film(np.linspace(9, 23, length))) == [1, 1]
    assert strict_dense(film(EVEN).repeat(2, 1).repeat(2, 2)) == [1, 1]


def test_noise_earns_nothing():
    noise = torch.rand(8, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    context = SimpleNamespace(prompts=[TEXT] * 8)
    assert motion_strict(noise, context).max() == 0
    assert motion_dense(noise, context).mean() < 0.05


@pytest.mark.parametrize("fill", [0.0, 1.0, float("nan"), -3.0])
def test_flat_and_broken_videos_score_zero(fill):
    videos = torch.full((2, 9, 3, 32, 32), fill)
    context = SimpleNamespace(prompts=[TEXT] * 2)
    assert motion_strict(videos, context).tolist() == [0, 0]
    assert motion_dense(videos, context).tolist() == [0, 0]


def test_rewards_take_float_videos_and_return_one_float_per_row():
    videos, texts = true_videos(each=1)
    batch = torch.from_numpy(videos).permute(0, 1, 4, 2, 3).float() / 255
    for reward in (motion_strict, motion_dense):
        value = reward(batch, SimpleNamespace(prompts=texts))
        assert value.dtype == torch.float32
        assert value.tolist() == [1.0] * len(texts)


def test_pictures_and_missing_captions_are_refused():
    with pytest.raises(ValueError, match="judge videos"):
        motion_strict(torch.zeros(1, 3, 32, 32), SimpleNamespace(prompts=[TEXT]))
    with pytest.raises(ValueError, match="2 videos but 1 captions"):
        world.scores(np.zeros((2, 9, 32, 32, 3), np.uint8), [TEXT])


@pytest.mark.parametrize("name", ["motion_strict", "motion_dense"])
def test_the_laws_of_rewards_hold(name, capsys):
    assert main(["check", f"genpolicy.rewards.{name}"]) == 0
    said = capsys.readouterr().out
    assert "keeps every law" in said
    assert "finite: 0, 1, " in said or "finite: 0.25, 1, " in said, "the one that is right earns 1"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_split_holds_everything_in_every_part_and_shares_nothing(seed):
    parts = world.split(seed)
    assert [len(part) for part in parts] == [24, 12, 12]
    assert sorted(text for part in parts for text in part) == sorted(world.captions())
    for part in parts:
        motions = [world.parse(text) for text in part]
        assert len({motion.thing for motion in motions}) == 12
        counts = [sum(m.direction == word for m in motions) for word in world.DIRECTIONS]
        assert len(set(counts)) == 1
