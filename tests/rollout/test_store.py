"""Episodes on disk: written once and whole, kept as long as somebody learns from them,
and never played twice.
"""

import shutil
from dataclasses import fields
from functools import partial

import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.rollout.episodes import reset_seed
from genpolicy.rollout.recorder import live
from genpolicy.rollout.store import EpisodeStore
from tests.peers import peers, together
from tests.toy_control import prepared

EPISODES, SLOTS = 19, 4
CLONING = {"method": {"name": "bc"}, "environments": SLOTS}


# -- the store -------------------------------------------------------------------------------------


def sample(number):
    return {
        "x0": torch.full((2, 3), float(number)),
        "success": torch.tensor([False, True]),
        "prompts": ["walk", "to the goal"],
        "observation": {"observation.state": torch.arange(4.0) + number},
    }


def test_what_somebody_else_has_put_beside_the_episodes_stays_and_stops_nothing(tmp_path):
    store = EpisodeStore(tmp_path)
    store.write(1, "0-0-ab", sample(1))
    store.write(2, "0-0-ab", sample(2))
    shutil.copytree(store.folder / "1", store.folder / "1.bak")
    (store.folder / "7").write_text("a note")
    for name in ("0 copy.pt", "0-0-ab (1).pt", "1.pt"):
        shutil.copy(store.folder / "2/0-0-ab.pt", store.folder / "2" / name)
    assert store.iterations() == [1, 2]
    assert len(store.episodes(2)) == 1
    assert [path.name for path, _ in store.whole(2)] == ["0-0-ab.pt"]
    store.trim(1)
    assert store.iterations() == [2]
    assert (store.folder / "1.bak").is_dir()


def test_what_is_written_is_read(tmp_path):
    store = EpisodeStore(tmp_path)
    assert store.read(3, "0-0") is None
    store.write(3, "0-0", sample(7))
    found = store.read(3, "0-0")
    assert torch.equal(found["x0"], sample(7)["x0"])
    assert torch.equal(
        found["observation"]["observation.state"], sample(7)["observation"]["observation.state"]
    )
    assert found["prompts"] == ["walk", "to the goal"]
    assert found["success"].dtype == torch.bool
    assert store.read(3, "0-1") is None
    assert store.read(2, "0-0") is None
    assert EpisodeStore(tmp_path).read(3, "0-0") is not None, "another process reads it too"


def test_episodes_come_by_group_and_member(tmp_path):
    store = EpisodeStore(tmp_path)
    names = ["10-0", "0-1", "2-0", "0-0", "2-11", "2-2"]
    for number, name in enumerate(names):
        store.write(1, name, sample(number))
    order = [names[int(e["x0"][0, 0])] for e in store.episodes(1)]
    assert order == ["0-0", "0-1", "2-0", "2-2", "2-11", "10-0"]
    assert order != sorted(names), "control: as texts they stand otherwise"
    assert store.episodes(2) == []


def test_what_was_staged_when_the_process_died_is_no_episode(tmp_path):
    store = EpisodeStore(tmp_path)
    store.write(1, "0-0", sample(0))
    folder = next(tmp_path.rglob("0-0.pt")).parent
    whole = (folder / "0-0.pt").read_bytes()
    (folder / "1-0.staged").write_bytes(whole[: len(whole) // 2])
    (folder / "0-0.staged").write_bytes(b"rubbish")
    assert store.read(1, "1-0") is None
    assert len(store.episodes(1)) == 1
    assert torch.equal(store.read(1, "0-0")["x0"], sample(0)["x0"])
    store.write(1, "1-0", sample(1))
    assert [float(e["x0"][0, 0]) for e in store.episodes(1)] == [0, 1]
    (folder / "2-0.pt").write_bytes(
        whole[: len(whole) // 2]
    )  # control: under an episode's name it would be read
    with pytest.raises(Exception):  # noqa: B017, PT011
        store.episodes(1)


def test_a_write_that_dies_leaves_what_was_there(tmp_path, monkeypatch):
    store, honest = EpisodeStore(tmp_path), torch.save
    store.write(1, "0-0", sample(0))

    def dying(value, file):
        honest(value, file)
        file.truncate(file.tell() // 2)
        raise OSError("no space is left")

    monkeypatch.setattr(torch, "save", dying)
    for name in ("0-0", "1-0"):
        with pytest.raises(OSError, match="no space"):
            store.write(1, name, sample(9))
    assert [float(e["x0"][0, 0]) for e in store.episodes(1)] == [0]
    assert store.read(1, "1-0") is None


def test_trimming_keeps_what_is_pinned_and_what_comes_later(tmp_path):
    store = EpisodeStore(tmp_path)
    store.trim(5)  # nothing is there yet
    for iteration in (1, 2, 3, 9, 10, 11):
        store.write(iteration, "0-0", sample(iteration))
    store.pinned |= {2, 10}
    store.trim(9)
    assert [i for i in range(1, 12) if store.episodes(i)] == [2, 10, 11]
    store.pinned.clear()
    store.trim(10)  # control: what is not pinned goes; 9 is less than 10, though not as a text
    assert [i for i in range(1, 12) if store.episodes(i)] == [11]


def test_episodes_of_another_origin_are_forgotten(tmp_path):
    store = EpisodeStore(tmp_path)
    for name in ("0-0-aa", "0-1-aa", "0-0-bb"):
        store.write(4, name, sample(0))
    store.write(5, "0-0-aa", sample(1))
    store.forget_others(4, "bb")
    assert store.read(4, "0-0-bb") is not None
    assert len(store.episodes(4)) == 1
    assert len(store.episodes(5)) == 1, "control: of this iteration alone"


# -- living with a ledger --------------------------------------------------------------------------


class Book:
    """A ledger in memory, and in which order it was written."""

    def __init__(self, known=()):
        self.known, self.order = dict(known), []

    def read(self, episode):
        return self.known.get(episode)

    def write(self, episode, rows):
        self.order.append(episode)
        self.known[episode] = rows

    def found(self, known, asked):
        pass


class Eye:
    """Environments that remember the seeds they were reset with,
    and break down after so many calls of step.
    """

    def __init__(self, inner, calls=10**9):
        self.inner, self.count, self.calls, self.seeds, self.ended = (
            inner,
            inner.count,
            calls,
            [],
            0,
        )

    def reset(self, slots, seeds):
        self.seeds += list(seeds)
        return self.inner.reset(slots, seeds)

    def step(self, slots, actions):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        answer = self.inner.step(slots, actions)
        self.ended += int((answer.terminated | answer.truncated).sum())
        return answer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return prepared(tmp_path_factory.mktemp("lived"), **CLONING)[0]


SEEDS = list(range(100, 100 + EPISODES))


def lived(run, book, eye, seeds=SEEDS, noise=0):
    return live(
        run.policy, eye, seeds, Noise.rows(noise, 1, torch.arange(len(seeds)), 1), ledger=book
    )


@pytest.fixture(scope="module")
def whole(run):
    """Played without an interruption: what came of it, and its book."""
    book, eye = Book(), Eye(run.collector.environments)
    return lived(run, book, eye), book, eye


def differences(a, b):
    """The largest difference of everything that two `Lived` hold; where shapes differ, infinite."""
    found = {}
    for name in ("x", "mean", "std", "x0", "condition"):
        found[name] = getattr(a.trajectory, name), getattr(b.trajectory, name)
    for field in fields(a.decisions):
        if field.name not in ("final", "total"):
            found[field.name] = getattr(a.decisions, field.name), getattr(b.decisions, field.name)
    for name in a.context.observation:
        found[name] = a.context.observation[name], b.context.observation[name]
        found[f"final {name}"] = (
            a.decisions.final.observation[name],
            b.decisions.final.observation[name],
        )
    found |= {f"part {name}": (a.parts[name], b.parts[name]) for name in a.parts}
    found["outputs"] = a.outputs, b.outputs
    return {
        name: float((x.double() - y.double()).abs().max()) if x.shape == y.shape else float("inf")
        for name, (x, y) in found.items()
    }


def test_every_episode_is_written_once_as_it_ends(run, whole):
    result, book, eye = whole
    assert sorted(book.order) == list(range(EPISODES))
    assert book.order != sorted(book.order), "some are over before others that began earlier"
    assert sorted(eye.seeds) == SEEDS
    lengths = result.decisions.episode.bincount()
    for episode, rows in book.known.items():
        assert len(rows["x0"]) == int(lengths[episode])
        assert torch.equal(rows["x0"], result.trajectory.x0[result.decisions.episode == episode])
    without = live(
        run.policy, run.collector.environments, SEEDS, Noise.rows(0, 1, torch.arange(EPISODES), 1)
    )
    assert max(differences(without, result).values()) == 0


@pytest.mark.parametrize("calls", [0, 5, 9, 12])
def test_a_collection_that_was_cut_off_goes_on_with_what_is_missing_to_the_bit(run, whole, calls):
    """Whatever had ended was written; the rest is played, each once, as if nothing had happened."""
    result, _, _ = whole
    book, broken = Book(), Eye(run.collector.environments, calls)
    with pytest.raises(KeyboardInterrupt):
        lived(run, book, broken)
    before = set(book.known)
    assert len(before) == broken.ended, "all that ended was written before anybody acted again"
    assert calls < 10 or 0 < len(before) < EPISODES
    book.order.clear()
    eye = Eye(run.collector.environments)
    again = lived(run, book, eye)
    assert sorted(eye.seeds) == [seed for e, seed in enumerate(SEEDS) if e not in before]
    assert sorted(book.order) == [e for e in range(EPISODES) if e not in before]
    found = differences(again, result)
    assert max(found.values()) == 0, {name: value for name, value in found.items() if value}


def test_whichever_episodes_are_known_the_others_are_the_same_to_the_bit(run, whole):
    """Also where those that are left would act beside others than they did:
    matrix products round by their number of rows.
    """
    result, book, _ = whole
    for known in ([0], [1, 2], [e for e in range(EPISODES) if e % 3], [*range(EPISODES - 1)]):
        eye = Eye(run.collector.environments)
        again = lived(run, Book({e: book.known[e] for e in known}), eye)
        assert len(eye.seeds) == EPISODES - len(known)
        found = differences(again, result)
        assert max(found.values()) == 0, (
            known,
            {name: value for name, value in found.items() if value},
        )


def test_control_other_seeds_and_other_noise_are_other_episodes(run, whole):
    result, _, _ = whole
    other = lived(run, Book(), Eye(run.collector.environments), [seed + 1000 for seed in SEEDS])
    assert differences(other, result)["x0"] > 0.1
    luck = lived(run, Book(), Eye(run.collector.environments), noise=1)
    assert differences(luck, result)["x0"] > 0.1


def test_a_complete_book_needs_no_environment(run, whole):
    result, book, _ = whole
    eye = Eye(run.collector.environments, calls=0)
    copy = Book(book.known)
    assert max(differences(lived(run, copy, eye), result).values()) == 0
    assert eye.seeds == []
    assert copy.order == []


def test_what_acting_costs_does_not_depend_on_the_interruption(run, whole):
    """The budget may be in evaluations, and each sample's are told:
    an episode costs the same whoever played it.
    """

    def cost(book):
        before = run.policy.model.evaluations
        lived(run, book, Eye(run.collector.environments))
        return run.policy.model.evaluations - before

    assert cost(Book({e: rows for e, rows in whole[1].known.items() if e % 3})) == cost(Book())


# -- collecting ------------------------------------------------------------------------------------


def names(run, iteration):
    """Group and member of what is there, and the files' endings."""
    there = (run.folder / "episodes" / str(iteration)).glob("*")
    return {"-".join(path.stem.split("-")[:2]) + path.suffix for path in there}


def test_a_run_that_was_killed_while_it_collected(tmp_path):
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    one, _ = prepared(tmp_path / "whole", **CLONING)
    result = one.collect(8, 2, keep=True)
    assert names(one, 1) == {f"{g}-{m}.pt" for g in range(8) for m in range(2)}
    run, _ = prepared(tmp_path / "broken", **CLONING)
    broken = Eye(run.collector.environments, 11)
    object.__setattr__(run.collector, "environments", broken)
    with pytest.raises(KeyboardInterrupt):
        run.collect(8, 2, keep=True)
    played = names(run, 1)
    assert 0 < len(played) < 16
    resumed, _ = prepared(tmp_path / "broken", **CLONING)
    eye = Eye(resumed.collector.environments)
    object.__setattr__(resumed.collector, "environments", eye)
    again = resumed.collect(8, 2, keep=True)
    missing = [g for g in range(8) for m in range(2) if f"{g}-{m}.pt" not in played]
    assert sorted(eye.seeds) == sorted(reset_seed(0, 1, g) for g in missing)
    assert torch.equal(again.trajectory.x0, result.trajectory.x0)
    assert torch.equal(again.rewards, result.rewards)
    assert torch.equal(again.decisions.place, result.decisions.place)
    assert (
        resumed.metrics.env_steps == one.metrics.env_steps == float(result.decisions.executed.sum())
    )
    assert resumed.metrics.collected == one.metrics.collected
    resumed.spent.iteration = 2
    assert not torch.equal(resumed.collect(8, 2, keep=True).rewards, result.rewards), (
        "control: another iteration"
    )


@pytest.mark.parametrize("edited", ["weights", "limit", "starts", None])
def test_episodes_of_an_experiment_that_was_edited_are_played_again(tmp_path, edited):
    """Episodes of other weights, of another task or from other starts are not this run's,
    whatever their number.
    """
    run, _ = prepared(tmp_path, **CLONING)
    run.collect(8, 1, keep=True)
    task = {"name": "tests.toy_control:Point", "limit": 3 if edited == "limit" else 6}
    resumed, _ = prepared(tmp_path, **CLONING, **({"task": task} if edited == "limit" else {}))
    eye = Eye(resumed.collector.environments)
    object.__setattr__(resumed.collector, "environments", eye)
    if edited == "weights":
        resumed.trainable[-1].data += 0.1
    starts = [7, *run.starts(8)[1:]] if edited == "starts" else run.starts(8)
    before = [path.name for path in (run.folder / "episodes/1").iterdir()]
    resumed.collect(8, 1, keep=True, starts=starts)
    after = [path.name for path in (run.folder / "episodes/1").iterdir()]
    assert len(eye.seeds) == (8 if edited else 0)
    assert len(after) == 8
    assert (set(before) == set(after)) is (edited is None), (
        "what is not this run's is not learned from either"
    )


def test_who_does_not_ask_keeps_nothing(tmp_path):
    run, _ = prepared(tmp_path, **CLONING)
    kept, plain = run.collect(4, 1, keep=True), run.collect(4, 1)
    assert torch.equal(kept.trajectory.x0, plain.trajectory.x0)
    run.spent.iteration = 2
    run.collect(4, 1)
    assert names(run, 2) == set()


def test_any_number_of_processes_goes_on_from_what_others_wrote(tmp_path):
    """Two processes share a folder and write all episodes;
    one process then finds nothing left to play.
    """
    accelerators = peers(2)
    built = [prepared(tmp_path, accelerator, **CLONING)[0] for accelerator in accelerators]
    two = together([partial(run.collect, 6, 2, keep=True) for run in built], accelerators)
    (tmp_path / "alone").mkdir()
    fresh, _ = prepared(tmp_path / "alone", **CLONING)
    alone = fresh.collect(6, 2)
    one, _ = prepared(tmp_path, **CLONING)
    eye = Eye(one.collector.environments)
    object.__setattr__(one.collector, "environments", eye)
    found = one.collect(6, 2, keep=True)
    assert eye.seeds == []
    assert torch.equal(found.rewards, two[0].rewards)
    assert torch.allclose(found.trajectory.x0, alone.trajectory.x0, atol=1e-4)
    assert torch.equal(found.decisions.executed, alone.decisions.executed)
    assert len(built[0].collector.store.episodes(1)) == 12
