"""Trackers: what can't work is said before any work, and evaluations reach them."""

import pytest
from accelerate.tracking import GeneralTracker

from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.training.experiment import train
from tests import toy


class Told(GeneralTracker):
    """A tracker that remembers what it is told."""

    name = "told"
    requires_logging_directory = False

    def __init__(self, run_name="", **_):
        super().__init__()
        self.logged = []
        TOLD.append(self)

    @property
    def tracker(self):
        return None

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.logged.append((step, values))


class Locked(Told):
    """A tracker without a key."""

    name = "locked"

    def __init__(self, run_name="", **_):
        raise RuntimeError("no API key configured")


TOLD: list[Told] = []


@pytest.fixture
def trackers(monkeypatch):
    """accelerate knows the two."""
    from accelerate import tracking

    known = {**tracking.LOGGER_TYPE_TO_CLASS, "told": Told, "locked": Locked}
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", known)
    monkeypatch.setattr("accelerate.accelerator.LOGGER_TYPE_TO_CLASS", known)
    TOLD.clear()


def asked(folder, name):
    return parse.parse(toy.experiment(folder, trackers=[name]))


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match="trackers: wandb can't be imported"):
        train(asked(tmp_path, "wandb"))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_begin_is_refused_before_any_work(tmp_path, trackers):
    with pytest.raises(ConfigError, match="one can't begin: no API key configured"):
        train(asked(tmp_path, "locked"))
    assert not (tmp_path / "run").exists()


def test_iterations_and_evaluations_reach_a_tracker(tmp_path, trackers):
    train(asked(tmp_path, "told"))
    (told,) = TOLD
    names = {name for _, values in told.logged for name in values}
    assert {"reward/total", "loss", "policy/loss"} & names
    assert "eval/reward/brightness" in names
    assert all(isinstance(v, int | float) for _, values in told.logged for v in values.values())
    assert {step for step, values in told.logged if "eval/reward/brightness" in values} == {0, 2, 4}
