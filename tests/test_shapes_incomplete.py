"""The harder picture task: its splits share no scene, its captions are true of their pictures but
incomplete, and what is shipped is what the script says.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from genpolicy.rewards import _shapes as world

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def script():
    """assets/make_shapes_incomplete.py."""
    sys.path.insert(0, str(ASSETS))
    try:
        import make_shapes_incomplete
    finally:
        sys.path.remove(str(ASSETS))
    return make_shapes_incomplete


def scenes(texts):
    return {world.canonical(world.parse(text)) for text in texts}


def pairs(texts):
    return {frozenset((scene.first, scene.second)) for scene in scenes(texts)}


def test_no_scene_is_in_two_parts_and_new_pairs_are_in_no_other(script):
    parts = script.parts()
    assert sorted(text for part in parts for text in part) == sorted(world.captions())
    assert sum(len(scenes(part)) for part in parts) == 264
    assert all(not pairs(part) & pairs(parts.new_pairs) for part in parts[:3])
    assert all(len({world.parse(text).first for text in part}) == 12 for part in parts)
    assert pairs(parts.held_out) & pairs(parts.pictured)  # the control: unseen captions, seen pairs


@pytest.mark.parametrize("name", ["pictured", "train", "held_out", "new_pairs"])
def test_the_shipped_caption_files_are_the_split(name, script):
    file = ASSETS / "shapes-sd3-incomplete" / f"captions_{name}.txt"
    assert tuple(file.read_text(encoding="utf-8").splitlines()) == getattr(script.parts(), name)


def test_the_caption_is_true_of_a_picture_with_a_copy_but_not_all_of_it(script):
    texts = script.parts().pictured[:100]
    drawn = script.pictures(texts, 1.0, seed=3, each=1)
    assert world.scores(drawn, texts)[:, 0].max() == 0
    kinds = 0
    for objects, text in zip(world.detect_all(drawn), texts, strict=True):
        scene = world.parse(text)
        found = [world.Thing(o.colour, o.shape) for o in objects]
        kinds += len(found) == 3 and set(found) == {scene.first, scene.second}
    assert kinds >= 95
    complete = script.pictures(texts, 0.0, seed=3, each=1)
    assert world.scores(complete, texts)[:, 0].mean() >= 0.99


def test_the_share_is_the_share(script):
    texts = script.parts().pictured
    drawn = script.pictures(texts, script.SHARE, seed=0, each=2)
    extra = np.mean([len(objects) == 3 for objects in world.detect_all(drawn)])
    assert extra == pytest.approx(script.SHARE, abs=0.03)
