"""Plans of warm starts: an episode's own, from its first decision to its last."""

from dataclasses import replace

import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import ChainConfig
from genpolicy.models.mlp import MLP
from genpolicy.policy.sampler import make_policy, require_trainable
from genpolicy.rollout import episodes
from genpolicy.rollout.episodes import play
from genpolicy.rollout.plans import Plans
from tests.toy_control import Point, Recorded

SEEDS = [100 + 7 * e for e in range(6)]
K, LEVELS = 10, [2, 0]
ROUNDING = 1e-5
"""The change that batched matrix products may make."""
DDPM = {"name": "ddim", "eta": 1.0}
RTI = ChainConfig(K, DDPM, execute=1, warm={"name": "rti", "levels": LEVELS})
SDEDIT = replace(RTI, warm={"name": "sdedit", "steps": 3})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = MLP(chunk=4, hidden=32, blocks=1)
    made.initialise(Recorded(episodes=10))
    parameters = list(made.trainable().values())
    parameters[-1].data += 0.3 * torch.randn_like(parameters[-1])
    return made


def names(count=6):
    return Noise.rows(3, 1, torch.arange(count), 1)


def played(policy, slots, seeds=SEEDS, noise=None, limit=6):
    """(episode, h) -> its plan and its actions."""
    found, task = {}, Point(limit=limit)
    environments = task.environments(slots, 1)
    for d in play(policy, environments, seeds, noise or names(len(seeds)), keep=(0, 0)):
        for row, name in enumerate(zip(d.episode.tolist(), d.h.tolist(), strict=True)):
            found[name] = torch.cat([d.trajectory.x0[row].flatten(), d.actions[row].flatten()])
    return found


def difference(one, other):
    if one.keys() != other.keys():
        return float("inf")
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class BySlot(Plans):
    """The known mistake: a plan that stays in its row, as a policy's own attribute would."""

    def sample(self, episodes, condition, noise, *, keep=None):
        return super().sample(list(range(len(episodes))), condition, noise, keep=keep)


@pytest.mark.parametrize("sampler", [RTI, SDEDIT], ids=["rti", "sdedit"])
def test_an_episode_depends_on_its_seed_and_noise_alone(model, sampler, monkeypatch):
    policy = make_policy(model, sampler)
    together, alone = played(policy, 3), played(policy, 1)
    assert difference(together, alone) < ROUNDING
    last = {(0, h): row for (e, h), row in alone.items() if e == 5}
    assert difference(played(policy, 1, SEEDS[5:], names(6)[torch.tensor([5])]), last) < ROUNDING
    monkeypatch.setattr(episodes, "Plans", BySlot)
    assert difference(played(policy, 3), together) > 0.01, "control"


def test_an_episode_that_begins_leaves_the_plans_of_the_others_alone(model):
    policy = make_policy(model, RTI)
    plans, seen = Plans(policy), Recorded(episodes=3).rows(torch.arange(2), 1, range(1))[0]
    condition = model.encode(seen)
    first = plans.sample([0, 1], condition, names(2)).x0
    before = model.evaluations
    second = plans.sample([7, 1], condition, names(2)).x0  # 0 has ended, 7 begins
    assert model.evaluations - before == K + len(LEVELS)
    fresh = policy.sample(condition[:1], names(2)[:1], keep=(0, 0)).x0
    going = policy.sample(condition[1:], names(2)[1:], previous=first[1:]).x0
    assert torch.allclose(second, torch.cat([fresh, going]), atol=ROUNDING)


def test_the_next_plan_is_a_function_of_the_plan_before_and_what_is_seen(model):
    policy = make_policy(model, RTI)
    seen = Recorded(episodes=3).rows(torch.arange(2), 1, range(1))[0]
    condition, previous = model.encode(seen), torch.randn(2, 4, 2).clamp(-1, 1)
    one, two = (policy.sample(condition, names(2), previous=previous).x0 for _ in range(2))
    assert torch.equal(one, two)
    other = policy.sample(condition, names(2), previous=-previous).x0
    assert not torch.equal(other, one)


def test_evaluations_are_a_whole_chain_once_and_the_levels_after_that(model):
    policy, before = make_policy(model, RTI), model.evaluations
    decisions = played(policy, 3)
    begun = sum(h == 0 for _, h in decisions)
    expected = K * begun + len(LEVELS) * (len(decisions) - begun)
    assert model.evaluations - before == expected


def test_one_action_is_carried_out_per_decision_unless_more_are_asked_for(model):
    for execute, length in ((1, 1), (3, 3), (None, 4)):
        policy = make_policy(model, replace(RTI, execute=execute))
        environments = Point(limit=6).environments(1, 1)
        first = next(iter(play(policy, environments, SEEDS[:1], names(1))))
        assert first.actions.shape[1] == length


def test_a_discrete_dim_is_carried_out_as_the_ends_of_the_datas_range(model):
    warm = {**RTI.warm, "discrete_dims": [1]}
    policy = make_policy(model, replace(RTI, warm=warm))
    plan = torch.tensor([[[0.2, 0.1], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    ends = model.decode(torch.tensor([[[0.2, 1.0]] * 4]))[:, :1]
    assert torch.equal(policy.actions(plan), ends)
    assert not torch.equal(make_policy(model, RTI).actions(plan), ends), "control"


class Judge:
    """Prefers plans that point right."""

    kind, version = "best_of", 1

    def attach(self, policy):
        return replace(policy, judge=lambda features, event: event[:, 0, 0])


def test_sdedit_draws_noise_for_each_of_several_candidates_and_rti_refuses(model):
    parts = {"judge": Judge()}
    policy = make_policy(model, replace(SDEDIT, best_of=8), parts)
    seen = Recorded(episodes=3).rows(torch.arange(2), 1, range(1))[0]
    condition, previous = model.encode(seen), torch.zeros(2, 4, 2)
    best = policy.sample(condition, names(2), previous=previous).x0
    one = make_policy(model, SDEDIT).sample(condition, names(2), previous=previous).x0
    assert bool((best[:, 0, 0] >= one[:, 0, 0]).all())
    assert not torch.equal(best, one)
    with pytest.raises(ConfigError, match="all candidates would begin as the same guess"):
        make_policy(model, replace(RTI, best_of=8), parts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"execute": 5}, "the policy says 4 actions at a time"),
        ({"warm": {"name": "rti"}}, "needs the key 'levels'"),
        ({"warm": {"name": "rti", "levels": [1, 2]}}, "must fall from at most 9"),
        ({"warm": {"name": "mypkg.mod:Mine"}}, "valid are rti, sdedit"),
        ({"warm": {"name": "sdedit", "steps": 2, "level": 3}}, "has no key 'level'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(model, change, said):
    with pytest.raises(ConfigError, match=said):
        make_policy(model, replace(RTI, **change))


def test_what_is_trained_begins_from_noise():
    for sampler, key in ((RTI, "warm"), (ChainConfig(execute=1), "execute")):
        with pytest.raises(ConfigError, match=f"{key} is of a policy that is deployed"):
            require_trainable(sampler, PERSON)
    require_trainable(ChainConfig(), PERSON)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_next_plan_is_one_graph_of_the_plan_before_and_what_is_seen(model):
    """All that an export needs: inputs condition and previous, outputs plan and actions."""
    mean = {"name": "mean", "kernel": DDPM}
    policy = make_policy(model, replace(RTI, kernel=mean, warm={**RTI.warm, "discrete_dims": [1]}))

    def decide(condition, previous):
        plan = policy.sample(condition, names(2), previous=previous).x0
        return plan, policy.actions(plan)

    seen = Recorded(episodes=3).rows(torch.arange(4), 1, range(1))[0]
    condition, previous = model.encode(seen), torch.linspace(-1, 1, 32).view(4, 4, 2)
    weights = model.trainable().values()
    for weight in weights:
        weight.requires_grad_(False)  # constants of the graph
    graph = torch.jit.trace(decide, (condition[:2], previous[:2]), check_trace=False)
    for weight in weights:
        weight.requires_grad_(True)
    for found, wanted in zip(
        graph(condition[2:], previous[2:]), decide(condition[2:], previous[2:]), strict=True
    ):
        assert torch.allclose(found, wanted, atol=1e-6)
