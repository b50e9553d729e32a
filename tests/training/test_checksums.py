"""Files that are damaged one by one: which sentence, and what is left."""

import shutil

import pytest
import torch

from genpolicy.config.errors import ConfigError
from genpolicy.config.seal import changed, digests, edited, marked, sealed, unsealed
from genpolicy.evaluation import metrics_file
from genpolicy.policy.files import load
from genpolicy.rollout import tensor_file
from genpolicy.rollout.store import EpisodeStore
from genpolicy.training import checkpoint
from genpolicy.training.experiment import train
from tests.toy_control import prepared
from tests.training.test_earned import prompts


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


def flip(file, place):
    contents = bytearray(file.read_bytes())
    contents[place] ^= 1
    file.write_bytes(contents)


# The seals


@pytest.mark.parametrize("indent", [None, 1])
def test_a_sealed_object_tells_of_every_bit_that_changes_what_it_says(indent):
    data = {"iteration": 12, "reward/total": 0.25, "name": "ä", "list": [1.5, None]}
    text = sealed(data, indent)
    assert unsealed(text) == data
    told = 0
    for place in range(len(text)):
        for bit in range(7):
            other = text[:place] + chr(ord(text[place]) ^ 1 << bit) + text[place + 1 :]
            try:
                found = unsealed(other)
            except ValueError:
                told += 1
                continue
            assert {key: found.get(key) for key in data} == data, other
    assert told > 5 * len(text)


def test_a_yaml_that_was_edited_is_told_from_one_that_was_not():
    text = marked("seed: 0\noutput: run\n")
    assert not edited(text)
    assert edited(text.replace("seed: 0", "seed: 1"))
    assert edited("seed: 0\n"), "a file that was cut has lost its last line"


def test_digests_tell_what_has_changed_and_what_is_missing(tmp_path):
    for name in ("a", "deep/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    known = digests(tmp_path)
    assert list(known) == ["a", "deep/b"]
    assert changed(tmp_path, known) == ""
    flip(tmp_path / "deep/b", 0)
    assert changed(tmp_path, known).endswith("deep/b is not as it was written")
    (tmp_path / "deep/b").unlink()
    assert changed(tmp_path, known).endswith("deep/b is missing")


def test_no_flipped_bit_of_a_file_of_tensors_is_read_as_another_number(tmp_path):
    file = tmp_path / "state.pt"
    tensor_file.write(file, {"w": torch.arange(6.0), "n": 3})
    size, quiet = len(file.read_bytes()), 0
    for place in range(0, size, 3):
        flip(file, place)
        try:
            found = tensor_file.read(file)
        except ValueError:
            found = None
        if found is not None:
            quiet += 1
            assert torch.equal(found["w"], torch.arange(6.0))
            assert found["n"] == 3
        flip(file, place)
    assert quiet < size / 3, "control: most are told"


# metrics.jsonl


@pytest.mark.parametrize("byte", [b"\xff", b"7", b"\n", b"{"])
def test_one_bad_byte_costs_its_own_line_and_no_later_one(tmp_path, byte):
    for iteration in range(6):
        metrics_file.append(tmp_path, {"iteration": iteration, "loss": 0.125 * iteration})
    file = tmp_path / metrics_file.METRICS
    lines = file.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b"0.25", b"0." + byte + b"5")
    file.write_bytes(b"\n".join(lines))
    assert [m["iteration"] for m in metrics_file.read(tmp_path)] == [0, 1, 3, 4, 5]
    assert metrics_file.damaged(tmp_path)[0] == 3
    metrics_file.truncate(tmp_path, 4)
    assert [m["iteration"] for m in metrics_file.read(tmp_path)] == [0, 1, 3, 4]
    assert lines[2] in file.read_bytes(), "what is left of it stays"


def test_a_run_with_a_bad_line_resumes_says_so_and_loses_no_other(tmp_path, capsys):
    folder = train(prompts(tmp_path, "brightness", budget={"iterations": 2})).folder
    flip(folder / "metrics.jsonl", 30)
    before = metrics_file.read(folder)
    train(folder / "config.yaml", ["--budget.iterations=3"])
    assert "metrics.jsonl: line 1 is damaged and left out" in capsys.readouterr().err
    after = metrics_file.read(folder)
    assert after[: len(before)] == before
    assert after[-1]["iteration"] == 3


# Checkpoints, episodes, policies


def test_a_flipped_bit_in_the_newest_checkpoint_takes_the_older_one_and_says_so(tmp_path, capsys):
    whole = train(prompts(tmp_path, "brightness", checkpoint_every=1)).folder
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    file = copy / "checkpoints" / "4" / "state.pt"
    flip(file, len(file.read_bytes()) // 2)
    capsys.readouterr()
    train(copy / "config.yaml")
    told = capsys.readouterr().err
    assert f"{file} is damaged" in told
    assert "resumed at iteration 3" in told
    left, right = (checkpoint.latest(folder) for folder in (whole, copy))
    assert all(map(torch.equal, left["parameters"], right["parameters"]))
    assert checkpoint.iterations(copy) == [3, 4]


def test_a_lost_episode_of_a_collection_is_told_and_not_left_out(tmp_path):
    run, _ = prepared(tmp_path, method={"name": "bc"}, environments=4)
    run.collect(3, 2, keep=True)
    assert len(run.kept(1)) == 6
    (lost,) = (run.folder / "episodes/1").glob("1-0-*.pt")
    whole = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ConfigError, match=r"episodes/1 has lost the episode 1-0 .*from a copy"):
        run.kept(1)
    lost.write_bytes(whole)
    flip(lost, whole.index(b"walk"))
    with pytest.raises(ConfigError, match=r"1-0-.* is damaged: .*can't be played again"):
        run.kept(1)
    lost.write_bytes(whole)
    assert len(run.kept(1)) == 6, "control"


def test_a_damaged_episode_of_the_collection_that_is_going_on_is_played_again(tmp_path):
    run, _ = prepared(tmp_path, method={"name": "bc"}, environments=4)
    first = run.collect(3, 2, keep=True)
    (file,) = (run.folder / "episodes/1").glob("2-1-*.pt")
    flip(file, file.read_bytes().index(b"walk"))
    said = []
    object.__setattr__(run.collector, "store", EpisodeStore(run.folder, said.append))
    again = run.collect(3, 2, keep=True)
    assert torch.equal(again.trajectory.x0, first.trajectory.x0)
    damaged, found = said
    assert f"{file} is damaged" in damaged
    assert "it is played again" in damaged
    assert "5 of 6 episodes were on disk already" in found
    said.clear()
    run.collect(3, 2, keep=True)
    assert "6 of 6 episodes" in said.pop(), "control: it is whole again"
    assert not said
    assert len(run.kept(1)) == 6


@pytest.mark.parametrize("file", ["toy.safetensors", "genpolicy.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_policy_is_told(tmp_path, file, damage):
    folder = train(prompts(tmp_path, "brightness", budget={"iterations": 1})).folder
    load(folder, trust=True)  # control
    path = folder / "policy" / file
    if damage == "missing":
        path.unlink()
    else:
        text = path.read_bytes()
        flip(path, text.index(b'"steps": 4') + 9 if file == "genpolicy.json" else len(text) - 3)
    for where in (folder, folder / "policy"):
        with pytest.raises(ConfigError, match=f"{file} is (missing|damaged|not as it)") as raised:
            load(where, trust=True)
        assert "\n" not in str(raised.value)
