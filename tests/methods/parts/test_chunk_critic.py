"""Values of chunks by temporal differences, on a walk whose values are known: from chunks of any
length, of every kind, and what a chunk that was cut is worth.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from genpolicy.methods.parts.chunk_critic import ChunkCritic, Valuing
from genpolicy.rollout.replay import Replay
from tests.methods.parts.test_iql import GAMMA, LENGTH, walk
from tests.rollout.test_replay import model
from tests.toy_control import prepared

SMALL = {"members": 2, "subset": 2, "hidden": 48, "batch": 20, "lr": 4e-3, "polyak": 0.1}


def built(folder, chunk, gamma=GAMMA, **settings):
    """A critic of chunks of so many actions, in a run that logs nothing."""
    run, _ = prepared(
        folder,
        policy={"name": "mlp", "hidden": 16, "blocks": 1, "chunk": chunk},
        method={"name": "bc"},
    )
    run.log = lambda *_: None
    return ChunkCritic(run, Valuing(**{**SMALL, **settings}), gamma)


def taught(critic, replay, features, following, samples=None, updates=350):
    """The critic after so many updates, everything counting as offline."""
    critic.standardise(features)
    critic.learn(replay, features, len(replay), updates, following, samples or (lambda views: None))
    return critic


def onward(replay: Replay):
    """The policy that does what was recorded, everywhere the same."""
    return lambda views, _: replay.event[:1].expand(len(views), -1, -1)


def random_chunks(chunk: int, count: int = 3):
    """Samples of a policy that does anything, the same at each asking."""
    drawn = torch.rand(LENGTH + 1, count, chunk, 2, generator=torch.Generator().manual_seed(7))
    return lambda views: 2 * drawn[views] - 1


def found(critic, replay, features) -> Tensor:
    with torch.no_grad():
        return critic.q(features[replay.now], replay.event.float()).double()


def test_every_network_has_the_units_that_are_asked_for(tmp_path):
    critic = built(tmp_path, 1, kind="iql", hidden=24)
    assert critic.v.network[0].out_features == 24
    assert critic.q.weights[0].shape[-1] == critic.target.weights[0].shape[-1] == 24


# -- the walk --------------------------------------------------------------------------------------


def test_the_walks_values_are_those_of_the_notes():
    truth = walk(1)[2]
    noted = [0.3874, 0.4305, 0.4783, 0.5314, 0.5905, 0.6561, 0.729, 0.81, 0.9, 1.0]
    assert truth.tolist() == pytest.approx(noted, abs=5e-5)


@pytest.mark.parametrize("kind", ["rlpd", "iql"])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_of_any_length_find_the_values_of_the_walk(tmp_path, kind, chunk):
    replay, features, truth = walk(chunk)
    critic = taught(built(tmp_path, chunk, kind=kind), replay, features, onward(replay))
    assert (found(critic, replay, features) - truth).abs().mean() < 0.03
    if critic.v is not None:
        with torch.no_grad():
            assert (critic.v(features[:LENGTH]) - truth).abs().mean() < 0.03
    wrong = GAMMA ** ((LENGTH - 1 - torch.arange(LENGTH)) / chunk).double()
    if chunk > 1:  # control: a discount per decision in the place of one per step
        assert (found(critic, replay, features) - wrong).abs().mean() > 0.1


def test_cal_ql_with_a_small_weight_finds_them_too(tmp_path):
    replay, features, truth = walk(2)
    critic = built(tmp_path, 2, kind="cal_ql", conservative=0.005)
    taught(critic, replay, features, onward(replay), random_chunks(2))
    assert (found(critic, replay, features) - truth).abs().mean() < 0.04


@pytest.mark.parametrize("kind", ["rlpd", "iql"])
def test_without_the_done_factor_values_exceed_what_can_be_got(tmp_path, kind):
    """Where nothing comes after a decision any view may stand there, here its own."""
    replay, features, truth = walk(1)
    replay = replace(replay, after=replay.after.clamp_max(LENGTH - 1))
    right = taught(built(tmp_path / "a", 1, kind=kind), replay, features, onward(replay))
    endless = replace(replay, terminated=torch.zeros_like(replay.terminated))
    wrong = taught(built(tmp_path / "b", 1, kind=kind), endless, features, onward(replay))
    assert (found(right, replay, features) - truth).abs().mean() < 0.03
    assert found(wrong, replay, features).mean(0)[-1] > 1.5


def test_histograms_find_the_values_within_a_bin(tmp_path):
    replay, features, truth = walk(2)
    critic = built(tmp_path, 2, bins=31, low=0.0, high=1.0)
    support = critic.settings.support()
    taught(critic, replay, features, onward(replay))
    error = (found(critic, replay, features).mean(0) - truth).abs()
    assert error.mean() < support.width
    low = built(tmp_path / "low", 2, bins=31, low=0.0, high=0.5)
    taught(low, replay, features, onward(replay))
    cut = found(low, replay, features).mean(0)
    assert cut.max() < 0.5 + 0.01, "control: values above the support are its upper end"


@pytest.mark.parametrize("high", [0.5, None])
def test_targets_stay_within_the_returns_that_are_possible(tmp_path, high):
    """An episode that never ends is worth more than any return: what is known keeps it down."""
    replay, features, _ = walk(2)
    endless = replace(replay, terminated=torch.zeros_like(replay.terminated))
    critic = built(tmp_path, 2, high=high)
    taught(critic, endless, features, onward(replay))
    largest = float(found(critic, endless, features).mean(0).max())
    assert largest < 0.55 if high else largest > 1.0


# -- chunks that were cut --------------------------------------------------------------------------

T = 5


def recording(executed, human, rewards, *, truncated=False):
    """A replay of one episode of decisions of up to five steps, as it is recorded."""
    H, count = len(executed), torch.tensor(executed)
    taken = torch.arange(T) < count[:, None]
    person, paid = torch.zeros(H, T, dtype=torch.bool), torch.zeros(H, T)
    person[taken], paid[taken] = torch.tensor(human).bool(), torch.tensor(rewards)
    begin, steps = count.cumsum(0) - count, int(count.sum())
    last = torch.arange(H) == H - 1
    every = torch.arange(float(steps))[:, None]
    episode = {
        "x0": torch.rand(H, T, 2),
        "start": torch.rand(H, T, 2),
        "rewards": paid,
        "executed": count,
        "terminated": last & (not truncated),
        "truncated": last & truncated,
        "success": last & (not truncated),
        "actions": torch.rand(H, T, 2),
        "observation": {"observation.state": every[begin][:, None]},
        "prompts": ["walk"] * H,
        "final": {"observation.state": torch.full((1, 1, 1), float(steps))},
        "human": person,
        "frames": {"observation.state": every},
    }
    return lambda **options: Replay.of_episodes([episode], model=model(T), **options)


def targets(folder, replay, kind="rlpd"):
    """What a fresh critic's update regresses on in each row, [R], and the value of what is seen
    next, [F], as the target has it.
    """
    critic = built(folder, T, kind=kind, batch=200)
    features = torch.randn(len(replay.views), 4, generator=torch.Generator().manual_seed(3))
    for p in [*critic.target.parameters(), *(critic.v.parameters() if critic.v else ())]:
        p.data += 0.1 * torch.randn_like(p)  # away from the networks that learn, and from 0
    following = torch.rand(len(features), T, 2, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        value = critic.v(features) if critic.v else critic.target(features, following).amin(0)
    seen, honest = {}, critic.q.loss
    rows = {tuple(features[v].tolist()): i for i, v in enumerate(replay.now.tolist())}

    def loss(now, event, y):
        seen.update({rows[tuple(f.tolist())]: float(t) for f, t in zip(now, y, strict=True)})
        return honest(now, event, y)

    critic.q.loss = loss
    critic.learn(
        replay, features, len(replay), 1, lambda views, _: following[views], lambda views: None
    )
    assert len(seen) == len(replay), "every row was drawn"
    return torch.tensor([seen[row] for row in range(len(replay))]), value


PAID = [0.3, -1.0, 2.0, 0.5, 0.7, 1.1, -0.4, 0.9]


@pytest.mark.parametrize("kind", ["rlpd", "iql"])
def test_a_take_over_at_the_third_step_of_five_is_three_steps_and_what_is_seen_there(
    tmp_path, kind
):
    """y = sum_{k<3} gamma^k r_k + gamma^3 V(s_{t+3}), whether the environment ended the decision
    there or it was recorded as one decision of both.
    """
    human = [0, 0, 0, 1, 1, 1, 1, 1]
    by_hand = sum(GAMMA**k * PAID[k] for k in range(3))
    for name, executed in (("ended", [3, 5]), ("both", [5, 3])):
        replay = recording(executed, human, PAID)()
        y, value = targets(tmp_path / name, replay, kind)
        there = replay.views.observation["observation.state"][replay.after[0], -1, 0]
        assert int(there) == 3
        expected = by_hand + GAMMA**3 * float(value[replay.after[0]])
        assert float(y[0]) == pytest.approx(expected, abs=1e-5)
        whole = by_hand + GAMMA**5 * float(value[replay.after[0]])
        assert float(y[0]) != pytest.approx(whole, abs=1e-3), "control: gamma^5 is another"


def test_a_cut_episode_bootstraps_and_one_that_ended_does_not(tmp_path):
    own = sum(GAMMA**k * r for k, r in enumerate(PAID[5:]))
    cut = recording([5, 3], [0] * 8, PAID, truncated=True)
    y, value = targets(tmp_path / "cut", cut())
    assert float(y[1]) == pytest.approx(own + GAMMA**3 * float(value[2]), abs=1e-5)
    assert abs(float(value[2])) > 1e-2
    for name, replay in (
        ("ended", recording([5, 3], [0] * 8, PAID)()),
        ("fails", cut(cut_fails=True)),
    ):
        y, _ = targets(tmp_path / name, replay)
        assert float(y[1]) == pytest.approx(own, abs=1e-5)


# -- Cal-QL's term ---------------------------------------------------------------------------------


def test_cal_qls_term_pushes_down_samples_above_the_return_and_no_others(tmp_path):
    """Its derivative by each member's value of each sample, at values given by hand."""
    critic = built(tmp_path, 2, kind="cal_ql")
    others = torch.tensor([2.0, 0.5, -1.0])  # the policy's samples
    values = torch.cat([torch.tensor([0.7]), others]).requires_grad_()
    events = torch.arange(4.0)  # an event's first number says whose value is asked for

    def q(features, event):
        return values[event.flatten(1)[:, 0].long()].expand(2, -1)

    def derivative(got):
        critic.q.forward = q
        critic.run.policy.model.scored = lambda event: event
        made = events[1:, None, None].expand(3, 2, 2)[None]
        done = torch.zeros(1, 2, 2)
        term = critic._overestimates(torch.zeros(1, 4), done, made, torch.tensor([got]))
        return torch.autograd.grad(term.sum(), values)[0]

    above, below, far, unknown = (derivative(g) for g in (1.0, 1e3, -1e3, torch.nan))
    assert above[1] > 0
    assert (above[2:] == 0).all(), "what is valued below the return is left alone"
    assert (below[1:] == 0).all()
    assert (far[1:] > 0).all(), "control: without calibration all are pushed down"
    assert torch.equal(far, unknown), "where the return is not known it is CQL's own term"
    for found_ in (above, below, far):
        assert found_[0] < 0, "the value of what was done is held up"
