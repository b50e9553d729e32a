"""A student that follows RL-100's policy through its online stage, and reinforcement learning of a
student of one step.
"""

import shutil

import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.methods.parts.distillation import distance
from genpolicy.policy.files import load
from genpolicy.training import checkpoint
from genpolicy.training.experiment import train
from tests import rl100_toy
from tests.methods.test_dppo import LEARNING
from tests.toy_control import Recorded, cloned, experiment

ONLINE = {"stage": "online", "student": {"updates": 40, "minibatch": 64, "lr": 3e-3}}


def followed(folder, pretrained, iterations=4, **method):
    """A run of RL-100's online stage with a student beside it."""
    sections = {
        "policy": {"name": "mlp", "pretrained": pretrained},
        "method": {**ONLINE, **method},
        "budget": {"iterations": iterations},
        "checkpoint_every": 2,
    }
    return train(parse.parse(rl100_toy.experiment(folder, **sections)))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """The folder of a policy that walks slowly, its head epsilon."""
    return cloned(tmp_path_factory.mktemp("slow"), family="vp")


def test_the_student_that_followed_does_in_one_step_what_the_policy_does(tmp_path, slow):
    result = followed(tmp_path, slow)
    policy, student = load(result.folder), load(result.folder / "stages" / "student")
    assert (student.chain.K, student.model.parametrisation) == (1, "sample")
    data = Recorded()
    context, _, _ = data.rows(torch.arange(100), policy.model.history, policy.model.horizon)
    place = torch.arange(100)
    noise = Noise(5, 0, place, torch.zeros_like(place))

    def drawn(who):
        return who.sample(who.model.encode(context), noise, keep=(0, 0)).x0

    naive = load(result.folder, steps=1, kernel={"name": "ddim", "eta": 0.0}, window=None)
    own = float(distance(drawn(student), drawn(policy), 0.0).mean())
    assert own < 0.05
    assert own < 0.3 * float(distance(drawn(naive), drawn(policy), 0.0).mean())


def test_a_resumed_student_is_the_uninterrupted_one(tmp_path, slow):
    result = followed(tmp_path, slow)
    whole = checkpoint.latest(result.folder)["kept"]["student"]["weights"]
    shutil.rmtree(result.folder / "checkpoints" / "4")
    train(result.folder / "config.yaml")
    again = checkpoint.latest(result.folder)["kept"]["student"]["weights"]
    assert whole
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_a_student_that_could_not_follow_is_refused(tmp_path, slow):
    with pytest.raises(ConfigError, match="method: student: the student's head says epsilon"):
        followed(tmp_path, slow, student={"updates": 1, "head": None})
    with pytest.raises(ConfigError, match="stage offline has no online iterations"):
        followed(tmp_path / "b", slow, stage="offline")


def test_a_student_of_one_step_goes_on_learning_by_its_own_noise(tmp_path):
    """Its kernel is N(f(z), s^2): one step, trained, whose mean is deployed."""
    teacher = cloned(tmp_path / "teacher", family="flow")
    student = train(
        parse.parse(
            experiment(
                tmp_path / "student",
                policy={"name": "mlp", "teacher": teacher},
                chain={"steps": 1, "kernel": {"name": "consistency"}},
                method={"name": "consistency", "batch": 256, "updates": 40, "minibatch": 128},
                budget={"iterations": 2},
            )
        )
    )
    one = {"name": "floorstd", "floor": 0.1, "kernel": {"name": "ddim", "eta": 0.0}}
    result = train(
        parse.parse(
            experiment(
                tmp_path / "rl",
                policy={"name": "mlp", "pretrained": str(student.folder / "policy")},
                chain={"steps": 1, "kernel": one, "window": [0, 1]},
                method=LEARNING,
                data=None,
                optimizer={"lr": 1e-3},
                budget={"iterations": 10},
                eval={"every": 0, "episodes": 100},
                environments=16,
            )
        )
    )
    assert result.after["return"] > result.before["return"] + 0.1
    deployed = load(result.folder)
    assert deployed.chain.K == 1
    assert not deployed.chain.noisy
