"""Uni-O4: the Gaussian policy, the joint weights by hand,
what becomes of a member that scores worse, and the whole course.
"""

import json
import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal

from genpolicy.chain import Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.learning.acceptance import Comparison
from genpolicy.methods.uni_o4 import _Pipeline, joint_weight
from genpolicy.policy.files import saved
from genpolicy.policy.weights import Weights
from genpolicy.training.experiment import train
from genpolicy.training.processes import Processes
from tests import toy_control
from tests.invariants.test_control_run import same_state
from tests.invariants.test_same_run import largest_difference, weights
from tests.peers import peers, together

STD = 0.1
ONE_STEP = {
    "steps": 1,
    "kernel": {"name": "floorstd", "floor": STD, "kernel": {"name": "ddim", "eta": 0.0}},
    "window": [0, 1],
}
SMALL = {
    "name": "uni_o4",
    "members": 3,
    "imitation": {
        "iterations": 2,
        "updates": 5,
        "batch": 16,
        "warmup": 5,
        "ema": 0.9,
        "alpha": 0.5,
    },
    "offline": {
        "episodes": 7,
        "critic_updates": 3,
        "model_updates": 3,
        "candidates": 2,
        "updates": 3,
        "states": 12,
        "horizon": 2,
        "starts": 8,
    },
    "online": {
        "episodes": 5,
        "epochs": 1,
        "minibatch": 16,
        "critic_epochs": 1,
        "critic_minibatch": 16,
        "warm_up": 0,
    },
}
"""The run's course: imitate 1 and 2, collect 3 to 5, criticise 6, improve 7 and 8, online from 9.
"""
STAGES = ["imitate", "collect", "criticise", "improve", "online"]
BOUNDARIES = {2: "collect", 5: "criticise", 6: "improve", 8: "online"}
BETTER, WORSE = Comparison(1.0, 0.0, 1.0), Comparison(-1.0, 0.0, 1.0)


def experiment(folder, method=(), **sections):
    folder.mkdir(exist_ok=True)
    own = {
        "policy": {"name": "mlp", "family": "gaussian", "hidden": 16, "blocks": 1, "chunk": 2},
        "chain": ONE_STEP,
        "data": {"name": "tests.rl100_toy:Outcomes", "episodes": 12, "skill": 0.4},
        "optimizer": {"weight_decay": 0.0},
        "budget": {"iterations": 10},
        "eval": {"every": 0, "episodes": 4},
        "environments": 4,
    }
    changed = dict(method)
    merged = {**SMALL, **changed}
    for part in ("imitation", "offline", "online"):
        merged[part] = {**SMALL[part], **changed.get(part, {})}
    return toy_control.experiment(folder, **{**own, **sections, "method": merged})


def built(folder, method=(), **sections):
    """A run that stands at iteration 1, and its pipeline, which has learned nothing yet."""
    raw = experiment(folder, method, **sections)
    raw.pop("output")
    run, settings = toy_control.prepared(folder, **raw)
    return run, _Pipeline(settings, run)


def improving(folder, verdict=None, **offline):
    """A pipeline that is about to improve what the data set shows; the gate says ``verdict``."""
    run, pipeline = built(folder, {"offline": {"lr": 1e-2, **offline}})
    pipeline.members.enter("improve")
    toy_control.enter(run, "improve")
    if verdict is not None:
        pipeline.offline.verdict = lambda in_force: verdict
    return run, pipeline


@pytest.mark.parametrize("agreeing", [True, False])
def test_members_are_judged_as_the_main_process_finds_them(tmp_path, monkeypatch, agreeing):
    accelerators = peers(2)
    pipelines = []
    for index, accelerator in enumerate(accelerators):
        run, pipeline = built(
            tmp_path / str(index),
            {"members": 1, "offline": {"episodes": 8, "lr": 1e-2}, "online": {"episodes": 8}},
            accelerator=accelerator,
        )
        pipeline.members.enter("improve")
        toy_control.enter(run, "improve")
        scores = iter([torch.full((2,), 1.0 - index), torch.full((2,), 0.5)])
        pipeline.offline.evaluation = lambda replay, features, scores=scores: next(scores)
        pipelines.append(pipeline)
    if not agreeing:
        monkeypatch.setattr(Processes, "agreed", lambda self, values: list(values))
    together([pipeline.improve for pipeline in pipelines], accelerators)
    accepted = [pipeline.run.metrics.numbers["gate/accepted"] for pipeline in pipelines]
    assert accepted == ([[1.0], [1.0]] if agreeing else [[1.0], [0.0]])


def tensors(each):
    return each.values if isinstance(each, Weights) else each


def copied(members):
    return [[value.clone() for value in tensors(each)] for each in members]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def seen(run, count):
    """Conditions and events of recorded frames."""
    model = run.policy.model
    context, actions, _ = run.data.rows(torch.arange(count), model.history, model.horizon)
    return model.encode(context), model.event(actions)


def mean(run, condition):
    """mu, straight from the network."""
    model = run.policy.model
    nothing = torch.zeros(len(condition), *model.event_shape)
    return model._network(nothing, model._time(torch.ones(len(condition)).double()), condition)


# -- the Gaussian policy ---------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["residual", "unet"])
def test_a_chain_of_one_step_is_a_normal(tmp_path, network):
    policy = {
        "name": "mlp",
        "family": "gaussian",
        "network": network,
        "hidden": 32,
        "blocks": 1,
        "chunk": 2,
    }
    run, _ = toy_control.prepared(tmp_path, policy=policy, chain=ONE_STEP)
    condition, _ = seen(run, 100)
    with torch.no_grad():
        mu = mean(run, condition)
        chains = run.policy.sample(condition, Noise.rows(0, 1, torch.arange(100), 1))
        now = run.policy.transition(chains, 0)
    expected = Normal(mu, STD).log_prob(chains.x0).flatten(1).sum(1)
    for gaussian in (now, chains.acted(0)):
        assert torch.allclose(gaussian.log_prob(chains.x0, reduce="sum"), expected, atol=1e-3)
    residual = (chains.x0 - mu) / STD
    assert abs(float(residual.mean())) < 0.15
    assert float(residual.std()) == pytest.approx(1, abs=0.1)
    wrong = Normal(mu, 2 * STD).log_prob(chains.x0).flatten(1).sum(1)  # control
    assert (wrong - expected).abs().mean() > 0.5


@pytest.mark.parametrize(("family", "same_action"), [("gaussian", True), ("flow", False)])
def test_the_chains_first_draw_does_not_matter(tmp_path, family, same_action):
    run, _ = toy_control.prepared(
        tmp_path, policy={"name": "mlp", "family": family, "hidden": 16}, chain=ONE_STEP
    )
    condition, _ = seen(run, 5)
    noise = Noise.rows(0, 1, torch.arange(5), 1)
    x = [scale * torch.randn(5, *run.policy.model.event_shape) for scale in (1.0, 1.0, 50.0)]
    drawn = [run.policy.sample(condition, noise, start=(0, each)).x0 for each in x]
    assert same(drawn[:2], drawn[1:]) == same_action
    other = run.policy.sample(condition, Noise.rows(1, 1, torch.arange(5), 1)).x0
    assert not torch.equal(other, drawn[0]), "its own noise does"


def test_the_deployed_mean_is_deterministic(tmp_path):
    run, _ = toy_control.prepared(
        tmp_path, policy={"name": "mlp", "family": "gaussian", "hidden": 16}, chain=ONE_STEP
    )
    condition, _ = seen(run, 5)
    for policy, fixed in ((run.deployed, True), (run.policy, False)):
        with torch.no_grad():
            a, b = (
                policy.sample(condition, Noise.rows(seed, 1, torch.arange(5), 1)).x0
                for seed in (0, 1)
            )
            assert torch.equal(a, b) == fixed
            assert torch.allclose(a, mean(run, condition), atol=1e-6) == fixed


@pytest.mark.parametrize(("family", "is_likelihood"), [("gaussian", True), ("flow", False)])
def test_cloning_is_maximum_likelihood(tmp_path, family, is_likelihood):
    """The imitation loss is 2 s^2 / |E| times -log pi, up to a constant, whatever t and noise."""
    run, _ = toy_control.prepared(
        tmp_path, policy={"name": "mlp", "family": family, "hidden": 16}, chain=ONE_STEP
    )
    condition, event = seen(run, 20)
    t = run.policy.model.times(torch.rand(20, generator=torch.Generator().manual_seed(0)).double())
    loss = run.policy.supervised_loss(condition, event, t, torch.randn_like(event)).mean()
    found = torch.autograd.grad(loss, run.trainable)
    likelihood = Normal(mean(run, condition), STD).log_prob(event).flatten(1).sum(1).mean()
    expected = torch.autograd.grad(-2 * STD**2 / event[0].numel() * likelihood, run.trainable)
    agree = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    assert agree == is_likelihood


def test_a_saved_gaussian_is_restored(tmp_path):
    result = train(parse.parse(experiment(tmp_path, budget={"iterations": 2})))
    policy = saved(str(result.folder / "policy")).load()
    assert policy.model.family == "gaussian"
    condition = torch.randn(4, 4)
    drawn = [
        policy.sample(condition, Noise.rows(seed, 1, torch.arange(4), 1)).x0 for seed in (0, 1)
    ]
    assert torch.equal(*drawn)


# -- joint cloning ---------------------------------------------------------------------------------


def joint_loss(log_pi, member, alpha, detached=False):
    """L_i as it is written: log_pi [n,b]."""
    most = log_pi.amax(0)
    return -log_pi[member] - alpha * (log_pi[member] - (most.detach() if detached else most))


def test_joint_weights_by_hand():
    """A row counts by d L_i / d(-log pi_i).
    With the maximum detached, as in the public code, all rows count alike.
    """
    mu = torch.randn(4, 50, 3, dtype=torch.float64)
    log_pi = Normal(mu, STD).log_prob(torch.zeros_like(mu)).sum(-1).requires_grad_(True)
    errors = (mu**2).mean(-1)
    most = log_pi.argmax(0)
    for member in range(4):
        others = [errors[j] for j in range(4) if j != member]
        (expected,) = torch.autograd.grad(-joint_loss(log_pi, member, 0.1).sum(), log_pi)
        found = joint_weight(errors[member], others, 0.1).double()
        assert torch.allclose(found, expected[member])
        assert torch.equal(found == 1, most == member)
        assert {round(float(w), 3) for w in found} == {1.0, 1.1}
        (detached,) = torch.autograd.grad(
            -joint_loss(log_pi, member, 0.1, detached=True).sum(), log_pi
        )
        assert torch.allclose(detached[member], torch.full_like(found, 1.1))
    assert torch.equal(joint_weight(errors[0], [], 0.1), torch.ones(50)), (
        "alone it is plain cloning"
    )


def test_an_update_descends_the_joint_loss(tmp_path):
    """The gradient that member 1's optimiser was given, against autograd through L_1 in nats."""
    run, pipeline = built(tmp_path)
    key = [0, 1, 0, 1]
    rows = pipeline.imitation.draw(key)[0]
    context, event, _ = pipeline.imitation.source(rows)
    condition = run.policy.model.encode(context)
    members, wanted = pipeline.members, {}
    others = []
    for j in (0, 2):
        with members.weights[j].using(), torch.no_grad():
            others.append(Normal(mean(run, condition), STD).log_prob(event).flatten(1).sum(1))
    with members.weights[1].using():
        own = Normal(mean(run, condition), STD).log_prob(event).flatten(1).sum(1)
        log_pi = torch.stack([others[0], own, others[1]])
        assert 0 < int((log_pi.argmax(0) == 1).sum()) < len(rows), "some rows of either kind"
        for alpha in (0.5, 0.0):
            loss = 2 * STD**2 / event[0].numel() * joint_loss(log_pi, 1, alpha).mean()
            wanted[alpha] = torch.autograd.grad(loss, run.trainable, retain_graph=True)
    before = copied(members.weights)
    pipeline._imitate(1, key)
    for alpha, gradients in wanted.items():
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        pairs = zip(run.trainable, gradients, strict=True)
        agree = all(
            torch.allclose(p.grad, g / max(1.0, norm), rtol=1e-3, atol=1e-5) for p, g in pairs
        )
        assert agree == (alpha == 0.5), "control: plain cloning is another gradient"
    assert [same(a, b) for a, b in zip(before, members.weights, strict=True)] == [True, False, True]
    assert [o.updates for o in members.optimizers] == [0, 1, 0]


def test_members_begin_and_draw_apart(tmp_path):
    run, pipeline = built(tmp_path)
    first = pipeline.members.weights
    assert same(first[0], run.weights())
    assert not any(same(first[i], first[j]) for i in range(3) for j in range(i))
    drawn = []
    honest = pipeline.imitation.source
    object.__setattr__(
        pipeline.imitation, "source", lambda rows: drawn.append(rows) or honest(rows)
    )
    pipeline.imitate()
    assert len({tuple(rows.tolist()) for rows in drawn}) == 15
    assert same(run.weights(), pipeline.members.optimizers[0].ema), (
        "the first member is what is evaluated"
    )
    averages = copied(o.ema for o in pipeline.members.optimizers)
    pipeline.members.enter("improve")
    assert all(same(a, b) for a, b in zip(averages, pipeline.members.weights, strict=True))


# -- the gate --------------------------------------------------------------------------------------


def test_a_worse_target_does_not_replace_and_is_not_undone(tmp_path):
    run, pipeline = improving(tmp_path, WORSE)
    members = pipeline.members
    old = copied(members.old)
    pipeline.improve()
    assert all(same(a, b) for a, b in zip(old, members.old, strict=True))
    target = copied(members.weights)
    assert not any(same(a, b) for a, b in zip(old, target, strict=True)), (
        "the target had moved, and stays there"
    )
    assert same(run.weights(), old[0]), "in force is an old policy"
    begun = []
    honest = run.update
    run.update = lambda *args: begun.append(run.weights()) or honest(*args)
    pipeline.offline.verdict, run.spent.iteration = lambda in_force: BETTER, 2
    pipeline.improve()
    assert same(begun[0], target[0]), "it learns on from where it was"
    assert all(same(a, b) for a, b in zip(members.weights, members.old, strict=True)), (
        "control: a better one replaces"
    )
    assert [o.updates for o in members.optimizers] == [6, 6, 6]
    assert run.metrics.numbers["gate/accepted"] == [0.0] * 3 + [1.0] * 3


def test_the_old_policy_acts_and_the_target_learns(tmp_path):
    """Ratios are of the target to the old policy: after a refusal they begin away from 1."""
    run, pipeline = improving(tmp_path, WORSE, updates=1)
    for iteration, one in ((1, True), (2, False)):
        run.spent.iteration, ratios = iteration, []
        honest = run.update
        run.update = lambda *args, honest=honest, into=ratios: into.append(
            honest(*args)["log_ratio_square"]
        )
        pipeline.improve()
        run.update = honest
        assert len(ratios) == 3
        assert all((r < 1e-8) == one for r in ratios)


def test_the_gate_keeps_the_best(tmp_path):
    """The gate decides by the scores of two networks whose order is known, in both directions."""
    run, pipeline = improving(tmp_path)
    pipeline.offline.evaluation = lambda replay, features: run.trainable[0].sum().detach().expand(8)
    members = pipeline.members
    for weights_, shift in zip(members.weights, (1.0, -1.0, 0.0), strict=True):
        weights_.values[0] += shift
    before = copied(members.old)
    found = []
    for i in range(3):
        with members.weights[i].using():
            verdict = pipeline.offline.verdict(members.old[i])
        found.append(members.judge(i, verdict))
    assert found == [True, False, False], "better; worse; the same"
    assert same(members.old[0], members.weights[0])
    assert same(members.old[1], before[1])
    sums = [float(old.values[0].sum()) for old in members.old]
    assert members.score == pytest.approx(sums, abs=1e-3)
    assert members.best is members.old[sums.index(max(sums))]


def test_without_advantage_nothing_changes(tmp_path):
    for name, scale in (("none", 0.0), ("some", 1.0)):
        _, pipeline = improving(tmp_path / name)
        honest = pipeline.offline.value.advantage
        pipeline.offline.value.advantage = lambda f, e, honest=honest, scale=scale: (
            scale * honest(f, e)
        )
        before = copied(pipeline.members.weights)
        pipeline.improve()
        still = [same(a, b) for a, b in zip(before, pipeline.members.weights, strict=True)]
        assert still == [scale == 0] * 3
        assert all(o.updates == 3 for o in pipeline.members.optimizers)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_members_follow_the_advantage(tmp_path, sign):
    """Means rise where an action's first number is worth what it is,
    and fall where it costs that.
    """
    run, pipeline = improving(tmp_path, BETTER, updates=10, states=64)
    pipeline.offline.value.advantage = lambda features, event: sign * event[:, 0, 0]
    condition, _ = seen(run, 30)

    def first(each):
        with torch.no_grad(), each.using():
            return float(mean(run, condition)[:, 0, 0].mean())

    before = [first(each) for each in pipeline.members.weights]
    pipeline.improve()
    for then, each in zip(before, pipeline.members.weights, strict=True):
        assert sign * (first(each) - then) > 0.02


# -- the course ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All stages in one piece, from one YAML mapping."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)
        return train(parse.parse(experiment(tmp_path_factory.mktemp("whole") / "it")))


def test_all_stages_from_one_experiment(whole):
    rows = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    of = {i: {key for row in rows if row["iteration"] == i for key in row} for i in range(1, 11)}
    assert [i for i in of if "bc/loss" in of[i]] == [1, 2]
    assert [i for i in of if "reward/return" in of[i]] == [3, 4, 5, 9, 10]
    assert [i for i in of if "world/held_out" in of[i]] == [6]
    assert [i for i in of if "gate/gain" in of[i]] == [7, 8]
    assert [i for i in of if "policy/ratio_mean" in of[i]] == [7, 8, 9, 10]
    assert [i for i in of if "critic/explained" in of[i]] == [9, 10]
    assert all(
        math.isfinite(value)
        for row in rows
        for key, value in row.items()
        if key.startswith("gate/")
    )
    assert whole.summary["replay_gap"] < 0.01
    assert not whole.summary["over"]
    kept = [len(list((whole.folder / "episodes" / str(i)).glob("*.pt"))) for i in (3, 4, 5)]
    assert kept == [3, 2, 2], "seven episodes of three members"


def test_the_stages_policies_load_again(whole):
    assert {path.name for path in (whole.folder / "stages").iterdir()} == {"imitation", "offline"}
    drawn = []
    for name in ("imitation", "offline"):
        policy = saved(str(whole.folder / "stages" / name)).load()
        drawn.append(policy.sample(torch.ones(3, 4), Noise.rows(0, 1, torch.arange(3), 1)).x0)
    assert not torch.equal(*drawn)


def test_stopped_at_every_boundary_equals_uninterrupted_bit_for_bit(tmp_path, whole):
    made = train(parse.parse(experiment(tmp_path / "it", budget={"iterations": 2}))).folder
    stops = [*BOUNDARIES, 10]
    for here, following in pairwise(stops):
        state = weights(made, here)
        assert STAGES[state["stages"]["at"]] == BOUNDARIES[here]
        assert state["stages"]["done"] == 0
        assert state["kept"]["experience"]["iterations"] == ([] if here < 5 else [3, 4, 5])
        again = made / "config.yaml"
        again.write_text(
            again.read_text().replace(
                f"iterations: {here}\n  nfe", f"iterations: {following}\n  nfe"
            )
        )
        train(again)
    a, b = weights(whole.folder, 10), weights(made, 10)
    a["kept"].pop("deployment"), b["kept"].pop("deployment")  # every stop was examined
    verdicts = same_state(a, b)
    assert all(verdicts.values()), verdicts


@pytest.mark.parametrize("part", ["weights", "old"])
def test_control_members_that_are_not_resumed_make_another_run(tmp_path, whole, part):
    made = train(parse.parse(experiment(tmp_path / "it", budget={"iterations": 7}))).folder
    file = made / "checkpoints/7/state.pt"
    state = torch.load(file, weights_only=True)
    state["kept"]["members"][part] = [[v + 0.1 for v in m] for m in state["kept"]["members"][part]]
    torch.save(state, file)
    again = made / "config.yaml"
    again.write_text(again.read_text().replace("iterations: 7\n  nfe", "iterations: 10\n  nfe"))
    train(again)
    found = [weights(folder, 10)["kept"]["members"] for folder in (whole.folder, made)]
    assert largest_difference(*(m["weights"][0] for m in found)) > 1e-6


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"policy": {"name": "mlp", "family": "flow", "hidden": 16}}, "family: gaussian"),
        ({"chain": {**ONE_STEP, "steps": 2, "window": [0, 2]}}, "steps: 1"),
        ({"chain": {**ONE_STEP, "window": None}}, "no stochastic step"),
        ({"chain": {**ONE_STEP, "kernel": {"name": "ddim", "eta": 0.0}}}, "std 0"),
        ({"method": {"members": 0}}, "members is 0"),
        ({"method": {"offline": {"episodes": 2}}}, "episodes is 2"),
        ({"method": {"imitation": {"alpha": -1.0}}}, "alpha is -1"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, sections, said):
    with pytest.raises(ConfigError, match=said):
        train(parse.parse(experiment(tmp_path / "it", **sections)))
