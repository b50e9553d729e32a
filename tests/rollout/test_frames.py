"""Frames between decisions: they are kept where they are asked for, and change nothing."""

import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.rollout.frames import FrameByFrame
from genpolicy.rollout.recorder import FRAMES, live
from genpolicy.training.experiment import train
from tests import toy
from tests.datasets.cart import CAMERA, STATE, Cart
from tests.rollout.test_store import SEEDS, Book, Eye, differences
from tests.toy_control import prepared

SECTIONS = {"method": {"name": "bc"}, "environments": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return prepared(tmp_path_factory.mktemp("frames"), **SECTIONS)[0]


def lived(run, book, frames=True):
    eye = Eye(run.collector.environments)
    noise = Noise.rows(0, 1, torch.arange(len(SEEDS)), 1)
    watched = FrameByFrame(eye) if frames else None
    return live(run.policy, watched or eye, SEEDS, noise, ledger=book, frames=watched), eye


def test_frames_are_seen_before_every_action_and_change_nothing(run):
    book, plain = Book(), Book()
    found, slow = lived(run, book)
    whole, fast = lived(run, plain, frames=False)
    assert max(differences(found, whole).values()) == 0
    assert slow.calls < fast.calls, "control: chunks were carried out action by action"
    for episode, rows in book.known.items():
        assert FRAMES not in plain.known[episode]
        begins = rows["executed"].cumsum(0) - rows["executed"]
        for name, frames in rows[FRAMES].items():
            assert len(frames) == int(rows["executed"].sum())
            assert torch.equal(frames[begins], rows["observation"][name][:, -1])
        place = rows[FRAMES][STATE]
        assert (place[1:] != place[:-1]).any(1).all(), "control: the point moves in between too"


def test_episodes_that_were_played_already_need_no_frames(run):
    book, half = Book(), Book()
    whole, _ = lived(run, book)
    half.known = {e: rows for e, rows in book.known.items() if e % 2}
    again, _ = lived(run, half)
    assert max(differences(again, whole).values()) == 0
    for episode, rows in half.known.items():
        for name, frames in rows[FRAMES].items():
            assert torch.equal(frames, book.known[episode][FRAMES][name])


def test_pictures_are_kept_as_bytes():
    world = FrameByFrame(Pictured(Cart(camera=True)))
    world.reset([0], [3])
    world.step([0], torch.full((1, 2, 1), -0.1))
    frames = world.frames(0)
    assert frames[CAMERA].dtype == torch.uint8
    assert frames[CAMERA].flatten().tolist() == [51] * 24 + [102] * 24
    world.reset([0], [4])
    world.step([0], torch.zeros(1, 1, 1))
    assert len(world.frames(0)[CAMERA]) == 1, "another episode begins anew"


class Pictured:
    """A cart whose pictures get brighter, step by step."""

    def __init__(self, cart):
        self.inner, self.count, self.taken = cart.environments(1, 1), 1, 0

    def reset(self, slots, seeds):
        self.taken = 0
        return self._seen(self.inner.reset(slots, seeds))

    def step(self, slots, actions):
        self.taken += 1
        step = self.inner.step(slots, actions)
        self._seen(step.context)
        return step

    def _seen(self, context):
        context.observation[CAMERA] = torch.full((1, 1, 3, 2, 4), (self.taken + 1) / 5)
        return context


def test_a_run_that_records_keeps_every_iteration(tmp_path):
    recording, _ = prepared(tmp_path / "a", **SECTIONS, record=True)
    plain, _ = prepared(tmp_path / "b", **SECTIONS)
    for run in (recording, plain):
        run.collect(3, 1, keep=run is plain)
        run.collector.trim(1)
    assert len(recording.kept(1)) == 3
    assert all(FRAMES in episode for episode in recording.kept(1))
    assert plain.collector.store.iterations() == [], "control"


def test_there_is_nothing_to_record_of_prompts(tmp_path):
    with pytest.raises(ConfigError, match="record keeps what robots see"):
        train(parse.parse(toy.experiment(tmp_path, record=True)))
