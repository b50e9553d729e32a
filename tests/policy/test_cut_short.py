"""Saves that are killed between any two moves: there is always a whole policy, and a checkpoint."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator

from genpolicy.config import parse
from genpolicy.policy.files import load, save_policy
from genpolicy.training import checkpoint
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from tests import toy
from tests.policy.toy_parts import same

MOVES = [(os, "rename"), (os, "replace"), (shutil, "rmtree"), (Path, "unlink")]


class Killed(BaseException):
    """The end of a process that nobody asked for."""


def killed_before(move, monkeypatch, work):
    """Do ``work``, killed before so many moves and removals of files; True where it was."""
    made = 0

    def counting(honest):
        def moved(*arguments, **options):
            nonlocal made
            made += 1
            if made > move:
                raise Killed
            return honest(*arguments, **options)

        return moved

    with monkeypatch.context() as patch:
        for owner, name in MOVES:
            patch.setattr(owner, name, counting(getattr(owner, name)))
        try:
            work()
        except Killed:
            return True
    return False


def prepared(folder):
    """A run before it begins."""
    folder.mkdir(exist_ok=True)
    raw = toy.experiment(folder)
    run, _ = prepare(parse.parse(raw), folder / "run", Processes(Accelerator(cpu=True)))
    return run


def moved(run):
    for parameter in run.trainable:
        parameter.data += 0.3


def written(run, folder):
    save_policy(run.deployed, run.experiment.policy, run.deployment.sampler, folder)


@pytest.mark.parametrize("name", ["policy", "policy_best", "stages/first"])
def test_a_policy_that_is_replaced_is_there_whenever_its_process_is_killed(
    tmp_path, monkeypatch, name
):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.yaml").touch()
    run, folder = prepared(tmp_path / "made"), tmp_path / "home" / name
    folder.parent.mkdir(exist_ok=True)
    written(run, folder)
    before = load(folder, trust=True)
    moved(run)
    for move in range(20):
        for left in folder.parent.glob(f"{folder.name}*"):
            shutil.rmtree(left)
        save_policy(before, run.experiment.policy, run.deployment.sampler, folder)
        was_killed = killed_before(move, monkeypatch, lambda: written(run, folder))
        found = load(folder, trust=True)
        assert same(found, before) or same(found, run.deployed), f"after {move} moves"
        if name == "policy":
            assert same(load(tmp_path / "home", trust=True), found)
        written(run, folder)
        assert same(load(folder, trust=True), run.deployed)
        assert not [path for path in folder.parent.iterdir() if path.suffix in (".old", ".staged")]
        if not was_killed:
            break
    assert move > 2, "control: it was killed at every move"
    assert not was_killed


def test_a_run_goes_on_from_a_policy_whose_replacement_was_cut_short(tmp_path):
    run, folder = prepared(tmp_path), tmp_path / "saved" / "policy"
    folder.parent.mkdir()
    moved(run)
    written(run, folder)
    os.rename(folder, folder.with_name("policy.old"))
    raw = toy.experiment(tmp_path, policy={"name": "toy", "pretrained": str(folder)})
    again, _ = prepare(parse.parse(raw), tmp_path / "again", Processes(Accelerator(cpu=True)))
    assert same(again.deployed, run.deployed)
    assert not same(prepared(tmp_path / "other").deployed, run.deployed), "control"


def test_a_checkpoint_is_there_whenever_its_process_is_killed(tmp_path, monkeypatch):
    for move in range(20):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        checkpoint.write(tmp_path, 0, torch.tensor(0))
        checkpoint.write(tmp_path, 2, torch.tensor(2))
        later = torch.tensor(3)
        # the last iteration of a run is saved twice
        was_killed = killed_before(
            move, monkeypatch, lambda later=later: checkpoint.write(tmp_path, 2, later, keep=1)
        )
        assert int(checkpoint.latest(tmp_path)) in (2, 3), f"after {move} moves"
        checkpoint.write(tmp_path, 4, torch.tensor(4))
        assert int(checkpoint.latest(tmp_path)) == 4
        if not was_killed:
            break
    assert move > 0
    assert not was_killed


def test_an_experiment_is_in_its_folder_whenever_its_process_is_killed(tmp_path, monkeypatch):
    raw = toy.experiment(tmp_path, eval={"every": 0, "samples": 4}, budget={"iterations": 1})
    folder = train(parse.parse(raw)).folder
    file = folder / "config.yaml"
    honest, before = Path.write_text, file.read_text()

    def dying(self, text, **options):
        if "config.yaml" in self.name:
            honest(self, text[:20], **options)
            raise Killed
        return honest(self, text, **options)

    monkeypatch.setattr(Path, "write_text", dying)
    with pytest.raises(Killed):
        train(file)
    assert yaml.safe_load(file.read_text()) == yaml.safe_load(before)
