"""DPPO: schedules, the loss and its gradient by hand, the frozen base, one random step,
and that it improves policies.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributions import Normal
from torch.overrides import TorchFunctionMode

import genpolicy
from genpolicy.chain import Gaussian, Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.learning.objective import Scored, clipped_surrogate
from genpolicy.methods import dppo
from genpolicy.methods.dppo import DPPO
from genpolicy.methods.parts.baseline import DecisionValue
from genpolicy.methods.parts.frozen_base import freeze_base
from genpolicy.policy.files import save_policy
from genpolicy.policy.weights import Weights
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.requirements import Needs, require_chain
from tests import toy
from tests.toy_control import Recorded, cloned, experiment, prepared

FLOOR = {"name": "floorstd", "kernel": {"name": "ddim", "eta": 1.0}, "floor": 0.1}
SHORT = {"name": "tests.toy_control:Point", "limit": 4}
SMALL = {"name": "dppo", "episodes": 8, "warm_up": 0, "minibatch": 32, "epochs": 2}


def small_run(folder, pretrained, chain):
    """A run of DPPO with little to do, from a policy's folder."""
    policy = {"name": "mlp", "pretrained": pretrained}
    return prepared(folder, policy=policy, chain=chain, method=SMALL, task=SHORT)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Folders of policies, by family, that walk slowly."""
    return {
        family: cloned(tmp_path_factory.mktemp(family), family=family) for family in ("vp", "flow")
    }


# -- the schedules ---------------------------------------------------------------------------------


def published_clip(index: Tensor, steps: int, first: float, last: float, rate: float) -> Tensor:
    """The clip range of the public code: a step's place is i / (K' - 1), for K' = 1 this is 0/0."""
    place = index.double() / torch.tensor(steps - 1.0).double()
    return first + (last - first) * torch.expm1(rate * place) / math.expm1(rate)


def test_the_discount_of_the_furniture_row():
    method = DPPO(gamma_den=0.9)
    assert torch.allclose(
        method.discount(torch.arange(5), 5), torch.tensor([0.6561, 0.729, 0.81, 0.9, 1.0])
    )
    assert float(method.discount(0, 5)) == pytest.approx(0.6561)
    assert torch.equal(DPPO(gamma_den=1.0).discount(torch.arange(5), 5), torch.ones(5))
    backwards = 0.9 ** torch.arange(
        5.0
    )  # control: the noisiest step is discounted most, not the last
    assert not torch.allclose(method.discount(torch.arange(5), 5), backwards)


def test_the_discount_of_the_gym_row():
    assert torch.allclose(
        DPPO(gamma_den=0.99).discount(torch.arange(10), 10),
        torch.tensor(
            [
                0.913517,
                0.922745,
                0.932065,
                0.941480,
                0.950990,
                0.960596,
                0.970299,
                0.9801,
                0.99,
                1.0,
            ]
        ),
        atol=1e-6,
    )


def test_the_clip_range_of_the_robomimic_row():
    """e1 .01, e0 .001, rate 3, K' = 10: e0 + (e1 - e0) (exp(i/3) - 1) / (e^3 - 1)."""
    method = DPPO(clip=0.01, clip_first=0.001, clip_rate=3.0)
    table = [
        0.001,
        0.0011866,
        0.0014469,
        0.0018103,
        0.0023174,
        0.0030252,
        0.0040129,
        0.0053916,
        0.0073156,
        0.01,
    ]
    expected = [0.001 + 0.009 * (math.exp(i / 3) - 1) / (math.exp(3) - 1) for i in range(10)]
    found = method.clip_range(torch.arange(10), 10)
    assert torch.allclose(found.double(), torch.tensor(expected).double(), atol=1e-8)
    assert torch.allclose(found.double(), torch.tensor(table).double(), atol=2e-6)
    assert torch.allclose(
        found.double(), published_clip(torch.arange(10), 10, 0.001, 0.01, 3.0), atol=1e-8
    )
    assert (found.diff() > 0).all()
    assert [float(method.clip_range(i, 10)) for i in range(10)] == pytest.approx(found.tolist())


def test_the_clip_range_of_the_gym_row_is_constant():
    assert torch.allclose(
        DPPO(clip=0.01, clip_first=0.01).clip_range(torch.arange(10), 10), torch.full((10,), 0.01)
    )
    assert torch.allclose(DPPO(clip=0.2).clip_range(torch.arange(10), 10), torch.full((10,), 0.2))


def test_one_step_is_finite_and_clipped_at_the_last_range():
    method = DPPO(clip=0.01, clip_first=0.001)
    assert torch.isnan(published_clip(torch.tensor([0]), 1, 0.001, 0.01, 3.0)).all()  # control
    assert float(method.clip_range(0, 1)) == pytest.approx(0.01)
    assert method.clip_range(torch.zeros(3, dtype=torch.long), 1).tolist() == pytest.approx(
        [0.01] * 3
    )
    assert float(method.discount(0, 1)) == 1.0


# -- the loss --------------------------------------------------------------------------------------


def scored(rows=12, steps=5, shift=0.05, std=0.3):
    """Pairs at steps of their own, of a policy that has moved a little."""
    old = Gaussian(torch.randn(rows, 2, 3), torch.full((rows, 1, 1), std))
    new = Gaussian((old.mean + shift * torch.randn(rows, 2, 3)).requires_grad_(), old.std)
    x = old.sample(torch.randn(rows, 2, 3))
    index = torch.arange(rows) % steps
    return Scored(
        new,
        old,
        None,
        x,
        torch.randn(rows),
        old.std.flatten(),
        torch.ones(rows),
        torch.ones(rows),
        index,
        steps,
    )


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_loss_by_hand(reduce):
    method = DPPO(
        reduce=reduce, clip=0.2 if reduce == "sum" else 0.02, clip_first=0.002, gamma_den=0.9
    )
    step = scored()
    density = (
        Normal(step.new.mean, step.new.std).log_prob(step.x)
        - Normal(step.old.mean, step.old.std).log_prob(step.x)
    ).flatten(1)
    log_rho = (density.sum(1) if reduce == "sum" else density.mean(1)).detach()
    expected, clipped = [], []
    for row in range(12):
        i, rho = int(step.index[row]), math.exp(float(log_rho[row]))
        advantage = 0.9 ** (4 - i) * float(step.advantage[row])
        first, last = 0.002, method.clip
        eps = first + (last - first) * math.expm1(3 * i / 4) / math.expm1(3)
        expected.append(max(-advantage * rho, -advantage * min(max(rho, 1 - eps), 1 + eps)))
        clipped.append((advantage > 0 and rho > 1 + eps) or (advantage < 0 and rho < 1 - eps))
    loss, metrics = method.loss(step)
    assert torch.allclose(loss.detach().double(), torch.tensor(expected).double(), atol=1e-5)
    assert metrics["clip_fraction"].tolist() == [float(c) for c in clipped]
    assert 0 < sum(clipped) < 12
    wide = log_rho.double()
    assert torch.allclose(metrics["kl"], wide.exp() - 1 - wide, atol=1e-5)
    loss.sum().backward()
    gradient = step.new.mean.grad.flatten(1).abs().sum(1)
    assert ((gradient == 0) == torch.tensor(clipped)).all()


def test_the_published_clamp_of_densities_is_not_there():
    """log N at the mean of a narrow Gaussian exceeds 2; a clamp there would leave no gradient."""
    step = scored(shift=0.001, std=0.02)
    DPPO(clip=10.0).loss(step)[0].sum().backward()
    assert (step.new.mean.grad.flatten(1).abs().sum(1) > 0).all()
    assert Normal(0.0, 0.02).log_prob(torch.tensor(0.0)) > 2


class OneDevice(TorchFunctionMode):
    """A mode that asks of operations what CUDA asks: nothing but single numbers may come from the
    CPU, and to `clamp` not even those.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
        checked = tensors if name.startswith("clamp") else [t for t in tensors if t.ndim]
        if name not in ("__get__", "to") and len({t.device for t in checked}) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 12])
def test_the_loss_stays_on_the_device_of_its_step(monkeypatch, rows):
    """The device is "meta" here; steps and their places are on the CPU, as a run's are."""
    monkeypatch.setattr("genpolicy.learning.objective._equal_std", lambda new, old: old.std)
    step = scored(rows)
    away = {
        name: getattr(step, name).to("meta") for name in ("x", "advantage", "std", "dt", "gain")
    }
    new, old = (Gaussian(g.mean.to("meta"), g.std.to("meta")) for g in (step.new, step.old))
    with OneDevice():
        loss, _ = DPPO(clip_first=0.01).loss(replace(step, new=new, old=old, **away))
    assert loss.device.type == "meta"


def test_a_scalar_clip_stays_on_the_device_of_the_ratio():
    with OneDevice():
        found = clipped_surrogate(torch.zeros(4, device="meta"), torch.zeros(4, device="meta"), 0.2)
    assert found.loss.device.type == "meta"
    with (
        OneDevice(),
        pytest.raises(RuntimeError, match="same device"),
    ):  # control: the mode sees what CUDA refuses
        torch.zeros(4, device="meta").clamp(torch.tensor(0.1), torch.tensor(0.2))


def test_wrong_settings_are_told():
    for wrong, said in (
        ({"clip": 0.0}, "clip is 0.0; it must be above 0"),
        ({"clip_first": -1.0}, "clip_first is -1.0"),
        ({"episodes": 0}, "episodes is 0"),
        ({"gamma": 1.5}, r"gamma is 1.5; it must lie in \[0, 1\]"),
        ({"gamma_den": -0.1}, "gamma_den is -0.1"),
        ({"lam": 2.0}, "lam is 2.0"),
        ({"warm_up": -1}, "warm_up is -1"),
    ):
        with pytest.raises(ConfigError, match=said):
            DPPO(**wrong)


# -- the update ------------------------------------------------------------------------------------


def first_rollout(folder, **sections):
    run, method = prepared(
        folder, **{"method": SMALL, "optimizer": {"lr": 1e-3, "max_grad_norm": 1e9}, **sections}
    )
    return run, method, run.collect(8, 1)


@pytest.mark.parametrize("micro_batch", ["auto", 7, 1])
def test_the_gradient_of_pairs_is_the_mean_over_all_pairs(tmp_path, micro_batch):
    run, method, rollout = first_rollout(tmp_path, micro_batch=micro_batch)
    chains, advantage = rollout.trajectory, torch.randn(len(rollout.trajectory))
    losses = []
    for row in range(len(chains)):
        for k in chains.steps:
            part = chains[row : row + 1]
            step = run.policy.score(part, k, advantage[row : row + 1], None)
            losses.append(method.loss(step)[0])
    expected = torch.autograd.grad(torch.cat(losses).mean(), run.trainable)
    (batch,) = run.pairs(rollout, 1, 0)
    run.update(rollout, batch, advantage, method.loss)
    for parameter, gradient in zip(run.trainable, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    shuffled = advantage.roll(1)  # control: whose advantage it is matters
    run, method, rollout = first_rollout(tmp_path, output=str(tmp_path / "other"))
    run.update(rollout, batch, shuffled, method.loss)
    assert any(
        not torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5)
        for p, g in zip(run.trainable, expected, strict=True)
    )


def test_the_minibatches_of_an_epoch_add_up_to_the_whole(tmp_path, monkeypatch):
    run, method, rollout = first_rollout(tmp_path)
    # look at gradients of unchanged weights
    monkeypatch.setattr("genpolicy.training.updates.step_together", lambda optimizers, pace: 0.0)
    advantage, total, sums = torch.randn(len(rollout.trajectory)), 0, None
    for batch in run.pairs(rollout, 5, 0):
        run.update(rollout, batch, advantage, method.loss)
        part = [p.grad * len(batch.rows) for p in run.trainable]
        sums = part if sums is None else [a + b for a, b in zip(sums, part, strict=True)]
        total += len(batch.rows)
    (whole,) = run.pairs(rollout, 1, 1)
    run.update(rollout, whole, advantage, method.loss)
    for parameter, added in zip(run.trainable, sums, strict=True):
        assert torch.allclose(parameter.grad, added / total, rtol=1e-3, atol=1e-6)


def test_on_the_first_pass_nothing_is_clipped_and_the_ratio_is_one(tmp_path):
    run, method, rollout = first_rollout(tmp_path)
    (batch,) = run.pairs(rollout, 1, 0)
    found = run.update(rollout, batch, torch.randn(len(rollout.trajectory)), method.loss)
    assert found["clip_fraction"] == 0
    assert found["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert found["kl"] < 1e-6
    again = run.update(rollout, batch, torch.randn(len(rollout.trajectory)), method.loss)
    assert again["kl"] > 1e-6  # control: after an update it is not


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        line["iteration"]: line
        for line in found
        if "reward/return" in line or "reward/total" in line
    }


def test_the_policy_waits_while_the_value_warms_up(tmp_path):
    raw = experiment(
        tmp_path, method={**SMALL, "warm_up": 2}, budget={"iterations": 3}, checkpoint_every=1
    )
    folder = train(parse.parse(raw)).folder
    metrics = lines(folder)
    assert ["policy/kl" in metrics[i] for i in (1, 2, 3)] == [False, False, True]
    assert all("critic/loss" in metrics[i] for i in (1, 2, 3))
    two, three = (
        torch.load(folder / f"checkpoints/{i}/state.pt", weights_only=True) for i in (2, 3)
    )
    assert two["optimizer"]["updates"] == 0
    assert three["optimizer"]["updates"] > 0
    assert any(
        not torch.equal(a, b) for a, b in zip(two["parameters"], three["parameters"], strict=True)
    )
    assert not all(
        torch.equal(two["kept"]["value"][n], v) for n, v in three["kept"]["value"].items()
    )


def test_an_epoch_that_moves_too_far_is_the_last(tmp_path):
    updates = []
    for name, target in (("free", None), ("tight", 1e-9), ("wide", 1e9)):
        folder = tmp_path / name
        folder.mkdir()
        raw = experiment(
            folder, method={**SMALL, "epochs": 4, "target_kl": target}, budget={"iterations": 1}
        )
        state = torch.load(
            train(parse.parse(raw)).folder / "checkpoints/1/state.pt", weights_only=True
        )
        updates.append(state["optimizer"]["updates"])
    free, tight, wide = updates
    assert free == wide == 4 * tight


def test_the_replay_of_a_robot_policy_is_verified(tmp_path):
    result = train(parse.parse(experiment(tmp_path, method=SMALL, budget={"iterations": 1})))
    assert result.summary["replay_gap"] is not None
    assert result.summary["replay_gap"] < 0.02
    run, method, rollout = first_rollout(tmp_path, output=str(tmp_path / "other"))
    assert run.verified(rollout, method.log_ratio, 0.02) is rollout
    wrong = replace(
        rollout, trajectory=replace(rollout.trajectory, mean=rollout.trajectory.mean + 0.05)
    )
    run.replay_check.again = None
    rescored = run.verified(
        wrong, method.log_ratio, 0.02
    )  # control: other means are noticed, and scored again
    assert run.replay_check.again
    assert torch.allclose(rescored.trajectory.mean, rollout.trajectory.mean, atol=1e-4)


# -- the frozen base -------------------------------------------------------------------------------

TEN = {"steps": 10, "kernel": FLOOR, "window": [5, 10]}


def test_steps_before_the_window_stay_the_old_policys(tmp_path, slow):
    """Window [5, 10) of 10: the states up to step 5 of any noise are those before training,
    the ones after are not.
    """
    raw = experiment(
        tmp_path,
        policy={"name": "mlp", "pretrained": slow["vp"]},
        chain=TEN,
        method={**SMALL, "warm_up": 0, "minibatch": 64},
        optimizer={"lr": 3e-3},
        budget={"iterations": 3},
        task=SHORT,
    )
    folder = train(parse.parse(raw)).folder
    trained = genpolicy.load(folder)
    assert trained.base is not None
    assert trained.parts["base"].above == float(trained.chain.grid[5])
    old = genpolicy.load(
        slow["vp"], steps=10, kernel={"name": "mean", "kernel": FLOOR}, window=[5, 10]
    )
    context, _, _ = Recorded(episodes=4).rows(torch.arange(6), 1, range(2))
    noise = Noise.rows(3, 0, torch.arange(6), 1)
    states = [p.sample(p.model.encode(context), noise, keep=(0, 10)).x for p in (old, trained)]
    assert torch.equal(states[0][:, :6], states[1][:, :6])
    assert not torch.allclose(states[0][:, 6:], states[1][:, 6:], atol=1e-3)
    unfrozen = replace(trained, base=None)  # control: the learning network alone moves all steps
    assert not torch.allclose(
        unfrozen.sample(unfrozen.model.encode(context), noise, keep=(0, 10)).x[:, 1:6],
        states[0][:, 1:6],
        atol=1e-3,
    )


def test_a_saved_policy_with_a_base_acts_as_the_one_that_was_saved(tmp_path, slow):
    run, method = small_run(tmp_path, slow["vp"], TEN)
    require_chain("dppo", Needs(likelihoods=True), run.policy)
    freeze_base(run)
    base = run.policy.parts["base"]
    before = [w.clone() for w in base.weights.values()]
    rollout = run.collect(8, 1)
    for epoch in range(3):
        for batch in run.pairs(rollout, 2, epoch):
            run.update(rollout, batch, torch.randn(len(rollout.trajectory)), method.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, base.weights.values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, run.trainable, strict=True))
    save_policy(run.deployed, run.experiment.policy, run.deployment.sampler, tmp_path / "saved")
    loaded = genpolicy.load(tmp_path / "saved")
    noise = Noise.rows(0, 5, torch.arange(8), 1)
    context = rollout.context[torch.arange(8)]
    actions = [
        p.model.decode(p.sample(p.model.encode(context), noise).x0) for p in (run.deployed, loaded)
    ]
    assert torch.equal(*actions)
    alone = replace(loaded, base=None)  # control: the learning network in all steps
    other = alone.model.decode(alone.sample(alone.model.encode(context), noise).x0)
    assert not torch.allclose(other, actions[0], atol=1e-4)


def test_the_base_acts_in_the_rollout_and_its_steps_are_not_trained(tmp_path, slow):
    run, method = small_run(tmp_path, slow["vp"], TEN)
    freeze_base(run)
    for parameter in run.trainable:
        parameter.data += 0.1 * torch.randn_like(parameter)
    rollout = run.collect(8, 1)
    assert list(rollout.trajectory.steps) == [5, 6, 7, 8, 9]
    first = (rollout.decisions.episode.diff(prepend=torch.tensor([-1])) > 0).nonzero().flatten()
    noise, condition = Noise.rows(0, 1, torch.arange(8), 1), rollout.trajectory.condition[first]
    start = run.policy.sample(condition, noise)
    assert torch.allclose(start.x, rollout.trajectory.x[first], atol=1e-4)
    with Weights(run.trainable, list(run.policy.parts["base"].weights.values())).using():
        frozen = run.policy.sample(condition, noise)
    assert torch.allclose(frozen.x[:, 0], rollout.trajectory.x[first, 0], atol=1e-4)
    assert not torch.allclose(frozen.x[:, 1], rollout.trajectory.x[first, 1], atol=1e-3)
    verified = run.verified(rollout, method.log_ratio, method.clip / 10)
    assert run.replay_check.gap < 0.02
    assert verified is rollout


def test_without_a_window_there_is_no_base(tmp_path):
    run, _ = prepared(tmp_path, method=SMALL)
    freeze_base(run)
    assert run.policy.base is None
    assert run.deployed.base is None


def test_only_the_steps_of_the_window_have_gradients(tmp_path, slow):
    """The base is outside the graph: at its steps the learning network gets nothing."""
    run, _ = small_run(tmp_path, slow["vp"], TEN)
    freeze_base(run)
    rollout = run.collect(8, 1)
    chains, grid = rollout.trajectory, run.policy.chain.grid
    below = run.policy.denoiser(chains.before(5), grid[5].expand(len(chains)), chains.condition)
    above = run.policy.denoiser(chains.before(5), grid[4].expand(len(chains)), chains.condition)
    assert below.eps.requires_grad
    assert not above.eps.requires_grad


# -- one random step -------------------------------------------------------------------------------

ONE = {"steps": 6, "kernel": {"name": "sde", "a": 0.7}, "window": [0, 5], "window_size": 1}


def test_one_random_step_of_a_flow_is_drawn_scored_and_replayed(tmp_path, slow):
    run, method = small_run(tmp_path, slow["flow"], ONE)
    require_chain("dppo", Needs(likelihoods=True), run.policy)
    drawn = []
    for iteration in range(1, 25):
        run.spent.iteration = iteration
        rollout = run.collect(2, 1)
        (k,) = rollout.trajectory.steps
        drawn.append(k)
        policy, chains = run._acting(rollout), rollout.trajectory
        gap = method.log_ratio(policy.transition(chains, k), chains.acted(k), chains.after(k))
        assert gap.abs().max() < 1e-3
        step = policy.score(
            chains[: len(chains)],
            torch.full((len(chains),), k),
            torch.zeros(len(chains)),
            None,
        )
        assert step.steps == 1
        assert (step.index == 0).all()
        assert torch.isfinite(method.loss(step)[0]).all()
        with pytest.raises(ValueError, match="no density"):
            policy.transition(replace(chains, first=(k + 1) % 5), (k + 1) % 5)
    assert set(drawn) == set(range(5))
    run.spent.iteration = 3
    assert run.collect(2, 1).trajectory.first == drawn[2]


def test_only_the_drawn_step_is_noisy(tmp_path, slow):
    """Every other step is the ODE:
    from the state after it the rest of the chain is a function of that state.
    """
    run, _ = small_run(tmp_path, slow["flow"], ONE)
    policy = run.policy.with_window((2, 3))
    context, _, _ = Recorded(episodes=4).rows(torch.arange(5), 1, range(2))
    condition = policy.model.encode(context)
    trajectory = policy.sample(condition, Noise.rows(0, 1, torch.arange(5), 1), keep=(0, 6))
    other = Noise.rows(9, 9, torch.arange(5), 1)
    start = trajectory.x[:, 3]
    again = policy.chain.sample(
        policy.denoiser, condition, other, policy.model.event_shape, start=(3, start)
    )
    assert torch.equal(again.x0, trajectory.x0)
    from_before = policy.chain.sample(
        policy.denoiser, condition, other, policy.model.event_shape, start=(2, trajectory.x[:, 2])
    )
    assert not torch.allclose(from_before.x0, trajectory.x0, atol=1e-3)


def test_a_run_of_one_random_step_improves_a_flow_policy(tmp_path, slow):
    result = improved(
        tmp_path,
        slow["flow"],
        chain={**ONE, "window": [1, 5]},
        optimizer={"lr": 3e-3},
        budget={"iterations": 14},
    )
    assert result.after["return"] > result.before["return"] + 0.1


def test_a_deterministic_kernel_is_refused(tmp_path):
    raw = experiment(
        tmp_path, chain={"steps": 4, "kernel": {"name": "ddim", "eta": 0.0}}, method=SMALL
    )
    with pytest.raises(ConfigError, match="deterministic"):
        train(parse.parse(raw))


# -- it improves policies --------------------------------------------------------------------------

LEARNING = {
    "name": "dppo",
    "episodes": 64,
    "gamma": 0.8,
    "gamma_den": 0.99,
    "warm_up": 1,
    "epochs": 4,
    "minibatch": 128,
    "critic_lr": 3e-3,
    "critic_epochs": 5,
}


def improved(folder, pretrained, method=LEARNING, **sections):
    raw = experiment(
        folder,
        policy={"name": "mlp", "pretrained": pretrained},
        task=SHORT,
        method=method,
        **{
            "optimizer": {"lr": 1e-3},
            "budget": {"iterations": 10},
            "eval": {"every": 0, "episodes": 60},
            "environments": 64,
            **sections,
        },
    )
    return train(parse.parse(raw))


@pytest.mark.parametrize("family", ["vp", "flow"])
def test_it_improves_a_robot_policy_in_seconds(tmp_path, slow, family):
    result = improved(tmp_path, slow[family])
    assert result.after["return"] > result.before["return"] + 0.1
    assert result.summary["env_decisions"] == lines(result.folder)[10]["env_decisions"] >= 10 * 64


@pytest.mark.parametrize("mistake", ["the wrong sign", "no advantage"])
def test_control_a_turned_or_missing_advantage_does_not(tmp_path, slow, monkeypatch, mistake):
    honest, sign = dppo.clipped_surrogate, -1.0 if mistake == "the wrong sign" else 0.0
    monkeypatch.setattr(
        dppo,
        "clipped_surrogate",
        lambda log_rho, advantage, clip: honest(log_rho, sign * advantage, clip),
    )
    result = improved(tmp_path, slow["vp"])
    assert result.after["return"] < result.before["return"] + 0.05
    if mistake == "no advantage":  # but for the decay of weights nothing moves
        assert result.after["return"] == pytest.approx(result.before["return"], abs=0.05)


def test_it_improves_pictures_of_prompts(tmp_path):
    """An episode of one decision: PPO with a value of the prompt. Here the network says epsilon;
    the laws try a flow.
    """
    raw = toy.experiment(
        tmp_path,
        policy={"name": "toy", "family": "vp"},
        method={
            "name": "dppo",
            "episodes": 128,
            "warm_up": 1,
            "epochs": 2,
            "minibatch": 192,
            "critic_lr": 1e-2,
        },
        optimizer={"lr": 1e-2},
        budget={"iterations": 20},
        eval={"every": 0, "samples": 64},
    )
    result = train(parse.parse(raw))
    assert abs(result.before["reward/brightness"]) < 0.05
    assert result.after["reward/brightness"] > 0.12
    assert result.summary["env_steps"] == 0


def test_the_value_of_a_prompt_is_learned(tmp_path):
    """Rewards of bright prompts at their start differ from those of dark ones by nothing but
    chance; with an offset by the prompt the value finds it, and the advantage is free of it.
    """
    raw = toy.experiment(
        tmp_path,
        reward={"tests.methods.offset:offset": 1.0},
        method={**SMALL, "episodes": 16},
        eval={},
    )
    run, _ = prepare(parse.parse(raw), tmp_path / "run", Processes(Accelerator(cpu=True)))
    value = DecisionValue(run, 0.99, 0.95, 1e-2, 60, 16)
    run.spent.iteration = 1
    rollout = run.collect(16, 1)
    before, returns = value.advantage(rollout)
    assert torch.allclose(returns.double(), rollout.rewards.flatten(), atol=1e-5)
    value.learn(rollout, returns)
    after, _ = value.advantage(rollout)
    assert after.abs().mean() < 0.3 * before.abs().mean()
