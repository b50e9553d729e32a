"""Values of one decision taught by chunks of several: what they are on a walk, and what a recorded
policy that does one thing or another behind a decision makes of them.
"""

from types import SimpleNamespace

import pytest
import torch

from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.methods.parts.long_chunks import LongChunks
from genpolicy.methods.q_chunking import QChunking
from genpolicy.rollout.replay import ROWS, Replay
from tests.methods.parts.test_chunk_critic import built
from tests.methods.parts.test_iql import GAMMA, LENGTH, walk

LUCK = 2.0
"""The good suffix pays this in half of its episodes and nothing in the others."""


def long(folder, replay, features, chunk=1, *, suffix, length=2, optimism=0.5, updates=400, **own):
    """What several decisions have taught after so many updates: the critic and `LongChunks`."""
    critic = built(folder, chunk, batch=256, lr=2e-3, **own)
    world = SimpleNamespace(
        critic=critic,
        experience=SimpleNamespace(replay=replay, features=features),
        episodes=SimpleNamespace(before=len(replay)),
        updates=updates,
    )
    critic.standardise(features)
    made = LongChunks(
        critic.run, world, length=length, gamma=GAMMA, suffix=suffix, optimism=optimism
    )
    made.learn()
    return critic, made


def branches():
    """Eight episodes of two decisions. The first is always the same; the second is good in half of
    them (the mean reward behind it is 1, one of luck) and bad in the others (it is 0).
    """
    suffix = torch.tensor([0.5, 0.5, 0.5, 0.5, -0.5, -0.5, -0.5, -0.5])
    paid = torch.tensor([LUCK, 0, LUCK, 0, 0, 0, 0, 0]).double()
    count = len(suffix)
    rows = torch.arange(2 * count)
    second = rows % 2 == 1
    event = torch.full((2 * count, 1, 2), 0.1)
    event[second] = suffix[:, None, None]
    rewards = torch.zeros(2 * count, 1).double()
    rewards[second, 0] = paid
    now = rows + torch.div(rows, 2, rounding_mode="floor")  # three views in each episode
    truth = torch.ones(2 * count, dtype=torch.bool)
    values = (
        now,
        now + 1,
        event,
        event,
        rewards,
        torch.ones(2 * count, dtype=torch.long),
        torch.zeros(2 * count, 1, dtype=torch.bool),
        second,
        truth,
        torch.div(rows, 2, rounding_mode="floor"),
        ~second,
    )
    features = torch.eye(3).repeat(count, 1)
    features = torch.cat([features, torch.zeros(len(features), 1)], 1)
    views = Context([""] * (3 * count))
    return Replay(views, **dict(zip(ROWS, values, strict=True))), features


@torch.no_grad()
def at_the_start(critic, replay, features) -> float:
    return float(critic.q(features[:1], replay.event[:1]).mean())


@torch.no_grad()
def joint(made, replay, features, suffix) -> float:
    """Q_L of the first decision with a suffix."""
    together = torch.cat([replay.event[:1].flatten(1), torch.full((1, 2), suffix)], 1)
    return float(made.q(features[:1], together).mean())


# -- what a stochastic suffix does -----------------------------------------------------------------


def test_a_long_critic_is_unbiased_where_the_return_takes_the_suffix_for_the_policys(tmp_path):
    """A policy that does the good thing gets GAMMA; the recorded one got half of it."""
    replay, features = branches()
    critic, made = long(tmp_path / "chunk", replay, features, suffix=0.5)
    assert joint(made, replay, features, 0.5) == pytest.approx(GAMMA, abs=0.08)
    assert joint(made, replay, features, -0.5) == pytest.approx(0.0, abs=0.08)
    with torch.no_grad():
        second = critic.q(features[1:2].expand(2, -1), replay.event[[1, 9]]).mean(0)
    assert second.tolist() == pytest.approx([1.0, 0.0], abs=0.08)
    mean = at_the_start(critic, replay, features)
    assert mean == pytest.approx(GAMMA / 2, abs=0.06), "suffix .5 is the mean over suffixes"
    steps, _ = long(tmp_path / "steps", replay, features, suffix=None)
    biased = at_the_start(steps, replay, features)
    assert biased == pytest.approx(GAMMA / 2, abs=0.06)
    assert abs(biased - GAMMA) > 0.3


@pytest.mark.parametrize("suffix", [0.8, 0.98])
def test_the_expectile_goes_from_the_mean_over_suffixes_to_the_best(tmp_path, suffix):
    """Of two equally frequent suffixes worth GAMMA and 0 the expectile is suffix x GAMMA. The luck
    behind the good one is no suffix: the expectile of the returns themselves would exceed GAMMA.
    """
    replay, features = branches()
    critic, _ = long(tmp_path, replay, features, suffix=suffix)
    assert at_the_start(critic, replay, features) == pytest.approx(suffix * GAMMA, abs=0.08)
    # control: e solves (1 - suffix) 3/4 e = suffix 1/4 (LUCK - e), on the returns
    lucky = LUCK * suffix / (suffix + 3 * (1 - suffix)) * GAMMA
    assert abs(lucky - suffix * GAMMA) > 0.15


# -- what does not depend on it --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [0.8, None])
def test_long_chunks_find_the_values_of_the_walk(tmp_path, suffix):
    """Nothing is drawn there, so that mean, best and return are one; three decisions of two steps
    reach over the end and are cut there.
    """
    replay, features, truth = walk(2)
    own = {"chunk": 2, "length": 3, "optimism": 0.7, "updates": 350}
    critic, made = long(tmp_path, replay, features, suffix=suffix, **own)
    with torch.no_grad():
        q = critic.q(features[:LENGTH], replay.event).double()
        v = made.v(features[:LENGTH]).double()
    assert (q - truth).abs().mean() < 0.04
    assert (v - truth).abs().mean() < 0.04
    wrong = GAMMA ** ((LENGTH - 1 - torch.arange(LENGTH)) / 2).double()
    assert (q - wrong).abs().mean() > 0.1, "control: a discount per decision"


@pytest.mark.parametrize(
    "own", [{"kind": "iql"}, {"kind": "cal_ql"}, {"bins": 31, "low": 0.0, "high": 1.0}]
)
def test_critics_that_long_chunks_cannot_teach_are_refused(tmp_path, own):
    replay, features = branches()
    with pytest.raises(ConfigError, match="kind rlpd and no bins"):
        long(tmp_path, replay, features, suffix=0.5, updates=1, **own)


def test_the_control_of_a_critic_of_one_decision_is_refused():
    with pytest.raises(ConfigError, match="bootstrap steps is for a critic of several decisions"):
        QChunking(bootstrap="steps")
    assert QChunking(bootstrap="steps", length=2).length == 2
