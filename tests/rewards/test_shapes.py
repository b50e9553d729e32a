"""The shapes world: true pictures score, every kind of wrong picture does not,
and the split keeps scenes apart.
"""

from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from benchmarks.shapes_checker import mixture, old_scores, through
from benchmarks.shapes_checker import pictures as mixed_pictures
from genpolicy.rewards import _shapes as world
from genpolicy.rewards._shapes import Scene, Thing
from genpolicy.rewards.shapes_dense import shapes_dense
from genpolicy.rewards.shapes_strict import shapes_strict

ASSET = Path(__file__).parents[2] / "assets" / "shapes-sd3"
TEXT = "a red circle left of a blue square"
RED_CIRCLE, BLUE_SQUARE = Thing("red", "circle"), Thing("blue", "square")
LEFT, RIGHT = (8.0, 16.0, 5.5), (24.0, 16.0, 5.5)


def strict_dense(*objects, text=TEXT):
    """Both scores of one drawn picture."""
    return world.scores(world.draw(objects)[None], [text])[0].tolist()


@pytest.fixture(scope="module")
def autoencoder():
    """The embedded model's."""
    return AutoencoderKL.from_pretrained(ASSET, subfolder="vae", torch_dtype=torch.float32)


def true_pictures(n, seed=0):
    """Pictures drawn from random captions, and the captions."""
    rng = np.random.default_rng(seed)
    texts = [world.captions()[i] for i in rng.integers(len(world.captions()), size=n)]
    return np.stack([world.render(world.parse(text), rng) for text in texts]), texts


def test_there_are_528_captions_of_264_scenes_and_all_parse():
    scenes = [world.parse(text) for text in world.captions()]
    assert [world.caption(scene) for scene in scenes] == world.captions()
    assert len(set(scenes)) == 528
    assert len({world.canonical(scene) for scene in scenes}) == 264


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red circle left of a red circle",
        "a pink circle left of a blue square",
        "a red circle near a blue square",
        "red circle left of blue square",
    ],
)
def test_what_is_no_caption_is_refused_in_one_sentence(text):
    with pytest.raises(ValueError, match="is not a shapes caption") as error:
        world.parse(text)
    assert "\n" not in str(error.value)


def test_parse_forgives_case_spaces_and_a_full_stop():
    assert world.parse("  A red circle  left of a Blue square. ") == world.parse(TEXT)


def test_canonical_joins_the_two_ways_to_say_a_scene():
    assert world.canonical(world.parse("a blue square right of a red circle")) == world.parse(TEXT)
    assert world.canonical(world.parse("a blue square left of a red circle")) != world.parse(TEXT)


def test_true_pictures_score_and_shuffled_captions_do_not():
    images, texts = true_pictures(2000)
    strict, dense = world.scores(images, texts).mean(0)
    assert strict >= 0.995
    assert dense >= 0.998
    scenes = [world.canonical(world.parse(text)) for text in texts]
    other = [a != b for a, b in zip(scenes, scenes[1:] + scenes[:1], strict=True)]
    strict, dense = world.scores(images, texts[1:] + texts[:1])[other].mean(0)
    assert strict <= 0.01
    assert dense <= 0.4


def test_every_caption_has_a_true_picture_and_its_paraphrase_agrees():
    rng = np.random.default_rng(1)
    for text in world.captions():
        scene = world.parse(text)
        said_back = world.caption(Scene(scene.second, world.CONVERSE[scene.relation], scene.first))
        image = world.render(scene, rng)[None]
        assert (world.scores(image, [text]) == world.scores(image, [said_back])).all()


@pytest.mark.parametrize(
    ("objects", "strict", "dense"),
    [
        pytest.param([(RED_CIRCLE, *LEFT), (BLUE_SQUARE, *RIGHT)], 1, 1.0, id="right"),
        pytest.param(
            [(Thing("green", "circle"), *LEFT), (BLUE_SQUARE, *RIGHT)], 0, 0.6, id="wrong colour"
        ),
        pytest.param(
            [(Thing("red", "triangle"), *LEFT), (BLUE_SQUARE, *RIGHT)], 0, 0.6, id="wrong shape"
        ),
        pytest.param([(RED_CIRCLE, *RIGHT), (BLUE_SQUARE, *LEFT)], 0, 0.8, id="swapped relation"),
        pytest.param(
            [(RED_CIRCLE, 16, 8, 5.5), (BLUE_SQUARE, 16, 24, 5.5)], 0, 0.8, id="wrong axis"
        ),
        pytest.param(
            [(Thing("blue", "circle"), *LEFT), (Thing("red", "square"), *RIGHT)],
            0,
            0.4,
            id="exchanged",
        ),
        pytest.param([(RED_CIRCLE, *LEFT)], 0, 0.4, id="missing object"),
        pytest.param([], 0, 0.0, id="nothing"),
        pytest.param(
            [(RED_CIRCLE, *LEFT), (BLUE_SQUARE, *RIGHT), (Thing("yellow", "square"), 16, 27, 3)],
            0,
            0.9,
            id="third object",
        ),
        pytest.param(
            [(RED_CIRCLE, *LEFT), (BLUE_SQUARE, *RIGHT), (RED_CIRCLE, 16, 27, 3)],
            0,
            0.9,
            id="the same again",
        ),
    ],
)
def test_each_kind_of_mistake_costs_what_it_should(objects, strict, dense):
    assert strict_dense(*objects) == pytest.approx([strict, dense])


def test_order_of_what_is_found_does_not_matter():
    assert strict_dense((BLUE_SQUARE, *RIGHT), (RED_CIRCLE, *LEFT)) == [1, 1]


def test_detect_says_where_and_what():
    image = world.draw([(RED_CIRCLE, *LEFT), (BLUE_SQUARE, *RIGHT)])
    left, right = sorted(world.detect(image), key=lambda found: found.x)
    assert (left.colour, left.shape, right.colour, right.shape) == (
        "red",
        "circle",
        "blue",
        "square",
    )
    assert (left.x, left.y, right.x, right.y) == pytest.approx((8, 16, 24, 16), abs=0.5)
    assert left.area == pytest.approx(np.pi * 5.5**2, rel=0.12)


def test_other_forms_are_no_shape():
    image = world.draw([(BLUE_SQUARE, *RIGHT)])
    ring = image.copy()
    ring[13:19, 21:27] = world.BACKGROUND
    bar = world.draw([])
    bar[14:18, 4:20] = world.COLOURS["red"]
    assert world.detect(image)[0].shape == "square"
    assert [o.shape for o in (*world.detect(ring), *world.detect(bar))] == ["other", "other"]


def test_an_object_between_two_colours_has_neither():
    """Orange is no yellow; the old rule, the negative control, took it for yellow."""
    caption = "a yellow triangle left of a blue square"
    images, texts = mixed_pictures("yellow", "red", 0.5, each=40, seed=0)
    assert world.scores(images, texts)[:, 0].max() == 0
    assert old_scores(images, texts)[:, 0].mean() >= 0.9
    orange = mixture("yellow", "red", 0.5)
    with patch.object(world, "COLOURS", {**world.COLOURS, "orange": orange}):
        picture = world.draw([(Thing("orange", "triangle"), *LEFT), (BLUE_SQUARE, *RIGHT)])
    assert {found.colour for found in world.detect(picture)} == {"other", "blue"}
    assert world.scores(picture[None], [caption])[0, 0] == 0
    assert old_scores(picture[None], [caption])[0, 0] == 1


@pytest.mark.parametrize("pair", list(permutations(world.COLOURS, 2)), ids=" ".join)
def test_mixtures_halfway_fail_and_pure_colours_pass_through_the_autoencoder(pair, autoencoder):
    halves, texts = mixed_pictures(*pair, 0.5, each=16, seed=1)
    assert world.scores(through(autoencoder, halves), texts)[:, 0].mean() <= 0.07
    pure, texts = mixed_pictures(*pair, 0.0, each=16, seed=1)
    assert world.scores(through(autoencoder, pure), texts)[:, 0].mean() == 1


def test_true_pictures_pass_through_the_autoencoder(autoencoder):
    images, texts = true_pictures(600, seed=3)
    assert world.scores(through(autoencoder, images), texts)[:, 0].mean() >= 0.995


@pytest.mark.parametrize("times", [1, 2])
def test_an_object_of_no_colour_is_an_object(times):
    """A third, purple one: the old rule did not see it."""
    colours = {**world.COLOURS, "purple": mixture("red", "blue", 0.5)}
    with patch.object(world, "COLOURS", colours):
        picture = world.draw(
            [
                (RED_CIRCLE, *LEFT),
                (BLUE_SQUARE, *RIGHT),
                (Thing("purple", "circle"), 16, 27, 4),
            ]
        )
    picture = picture.repeat(times, axis=0).repeat(times, axis=1)
    assert sorted(found.colour for found in world.detect(picture)) == ["blue", "other", "red"]
    assert world.scores(picture[None], [TEXT])[0].tolist() == pytest.approx([0, 0.9])
    assert old_scores(picture[None], [TEXT])[0].tolist() == [1, 1]


def test_scores_survive_noise_and_hold_at_other_sizes():
    images, texts = true_pictures(300)
    noisy = images + np.random.default_rng(0).normal(0, 12, images.shape)
    assert world.scores(noisy.clip(0, 255).astype(np.uint8), texts)[:, 0].mean() >= 0.98
    twice = images.repeat(2, axis=1).repeat(2, axis=2)
    assert world.scores(twice, texts)[:, 0].mean() >= 0.99


@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0, float("nan"), float("inf"), -3.0, 7.0])
def test_flat_and_broken_pictures_score_zero(fill):
    context = SimpleNamespace(prompts=[TEXT, TEXT])
    images = torch.full((2, 3, 32, 32), fill)
    assert shapes_strict(images, context).tolist() == [0, 0]
    assert shapes_dense(images, context).tolist() == [0, 0]


def test_static_does_not_earn_dense_reward():
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert shapes_dense(noise, SimpleNamespace(prompts=[TEXT] * 64)).mean() < 0.05


def test_rewards_take_float_pictures_and_return_one_float_a_row():
    images, texts = true_pictures(32)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    context = SimpleNamespace(prompts=texts)
    for reward, column in ((shapes_strict, 0), (shapes_dense, 1)):
        value = reward(batch.requires_grad_(), context)
        assert value.dtype == torch.float32
        assert value.shape == (32,)
        assert value.tolist() == world.scores(images, texts)[:, column].tolist()


def test_as_many_captions_as_pictures():
    with pytest.raises(ValueError, match="2 pictures but 1 captions"):
        world.scores(np.zeros((2, 32, 32, 3), np.uint8), [TEXT])


def test_split_sizes_and_no_scene_in_two_parts():
    parts = world.split()
    assert [len(part) for part in parts] == [352, 88, 88]
    assert sorted(text for part in parts for text in part) == sorted(world.captions())
    scenes = [{world.canonical(world.parse(text)) for text in part} for part in parts]
    assert [len(part) for part in scenes] == [176, 44, 44]
    assert not scenes[0] & scenes[1] | scenes[0] & scenes[2] | scenes[1] & scenes[2]


def test_a_split_by_caption_would_share_scenes():
    """Negative control: shuffling captions instead of scenes leaks."""
    order = np.random.default_rng(0).permutation(528)
    scenes = [world.canonical(world.parse(world.captions()[i])) for i in order]
    assert set(scenes[:352]) & set(scenes[352:])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_thing_and_relation_occurs_in_every_part(seed):
    for part in world.split(seed):
        scenes = [world.parse(text) for text in part]
        assert len({scene.first for scene in scenes}) == 12
        assert {scene.relation for scene in scenes} == set(world.RELATIONS)


def test_split_is_a_function_of_its_seed():
    again = world.split.__wrapped__(0)
    assert again == world.split(0)
    assert again != world.split(1)


@pytest.mark.parametrize("name", world.Split._fields)
def test_the_shipped_caption_files_are_the_split(name):
    lines = (ASSET / f"captions_{name}.txt").read_text(encoding="utf-8").splitlines()
    assert tuple(lines) == getattr(world.split(), name)
