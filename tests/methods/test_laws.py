"""Laws of every method with likelihoods: what must hold whatever the method, parametrised over the files in
methods/."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from genpolicy import config
from genpolicy.config import names
from genpolicy.experiment import prepare, train
from tests.toy import experiment

torch.set_num_threads(1)
KERNELS = {
    "sde": {"name": "sde", "a": 0.7},
    "ddim": {"name": "ddim", "eta": 1.0},
    "cps": {"name": "cps", "a": 0.8},
}
CLIP = {"reduce": "sum", "clip": 0.2}


def prepared(tmp_path, method, **sections):
    raw = experiment(tmp_path, **sections)
    raw["method"] = {"name": method, "groups": 4, "group": 4, **CLIP, **raw["method"].get("extra", {})}
    run, built = prepare(config.parse(raw), tmp_path / "run", Accelerator(cpu=True))
    run.iteration = 1
    return run, built


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shared_prefix", [False, True])
@pytest.mark.parametrize("method", names("methods"))
def test_first_pass_has_ratio_one_and_no_clipping(tmp_path, method, kernel, shared_prefix):
    run, built = prepared(tmp_path, method, chain={"steps": 5, "kernel": KERNELS[kernel], "window": [1, 3]})
    rollout = run.collect(4, 4, shared_prefix=shared_prefix)
    chains, policy = rollout.trajectory, run.policy.with_window((1, 3))
    for k in chains.steps:
        new = policy.transition(chains, k)
        assert built.log_ratio(new, chains.acted(k), chains.after(k)).abs().max() == 0
        scored = run._score(policy, chains, k, rollout.rows(torch.randn(4, 4)), None)
        _, metrics = built.loss(scored)
        assert metrics["clip_fraction"].sum() == 0
        assert (metrics["ratio_mean"] == 1).all()


@pytest.mark.parametrize("method", names("methods"))
def test_zero_advantage_gives_zero_gradient_and_a_real_one_does_not(tmp_path, method):
    run, built = prepared(tmp_path, method)
    rollout = run.collect(4, 4)
    for advantage, moves in ((torch.zeros(4, 4), False), (torch.randn(4, 4), True)):
        run.optimizer.zero_grad()
        step = run._score(run.policy, rollout.trajectory, 1, rollout.rows(advantage), None)
        built.loss(step)[0].sum().backward()
        largest = max(float(p.grad.abs().max()) for p in run.trainable)
        assert (largest > 0) == moves


@pytest.mark.parametrize("method", names("methods"))
def test_kl_to_the_start_is_zero_at_first_and_grows(tmp_path, method):
    run, built = prepared(tmp_path, method, chain={"steps": 5, "kernel": KERNELS["sde"]})
    built.beta = 0.1
    reference, rollout = run.snapshot(), run.collect(4, 4)
    advantage = torch.randn(4, 4)
    before = run._score(run.policy, rollout.trajectory, 1, rollout.rows(advantage), reference)
    assert built.loss(before)[1]["kl"].abs().max() == 0
    run.update(rollout, slice(0, 16), advantage, built.loss, reference)
    after = run._score(run.policy, rollout.trajectory, 1, rollout.rows(advantage), reference)
    assert built.loss(after)[1]["kl"].min() > 0


@pytest.mark.parametrize("method", names("methods"))
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_toy_with_one_right_answer_is_solved(tmp_path, method, kernel):
    """Bright prompts want white, dark prompts black: the mean of the reward must rise from 0 to at least a third of its
    maximum."""
    raw = experiment(
        tmp_path,
        chain={"steps": 4, "kernel": KERNELS[kernel]},
        method={"name": method, "groups": 8, "group": 16, "updates": 2, "advantage": "group", **CLIP},
        optimizer={"lr": 1e-2},
        budget={"iterations": 60},
        eval={"every": 0, "samples": 64},
    )
    result = train(config.parse(raw))
    assert abs(result.before["reward/brightness"]) < 0.05
    assert result.after["reward/brightness"] > 0.15


@pytest.mark.parametrize("method", names("methods"))
def test_wrong_sign_fails_where_the_method_succeeds(tmp_path, method):
    """The negative control of the test above: with the reward's sign turned, the policy learns the opposite."""
    raw = experiment(
        tmp_path,
        method={"name": method, "groups": 8, "group": 16, "advantage": "group", **CLIP},
        reward={"tests.toy:brightness": -1.0},
        optimizer={"lr": 1e-2},
        budget={"iterations": 40},
        eval={"every": 0, "samples": 64},
    )
    assert train(config.parse(raw)).after["reward/brightness"] < -0.1


@pytest.mark.parametrize(("method", "weight"), [("flow_grpo", "std/dt"), ("grpo_guard", "1/dt")])
def test_step_weights_reach_the_loss(tmp_path, method, weight):
    run, plain = prepared(tmp_path, method)
    weighted = config.make("methods", {"name": method, "weight": weight, **CLIP})
    rollout, advantage = run.collect(4, 4), torch.randn(4, 4)
    step = run._score(run.policy, rollout.trajectory, 1, rollout.rows(advantage), None)
    ratio = {"std/dt": step.std / step.dt, "1/dt": abs(step.gain) / step.dt}[weight]
    assert torch.allclose(weighted.loss(step)[0], plain.loss(step)[0] * ratio, rtol=1e-5)
    assert abs(ratio - 1) > 0.01


@pytest.mark.parametrize(("updates", "epochs"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_minibatches_partition_the_rollout(tmp_path, updates, epochs):
    run, _ = prepared(tmp_path, "flow_grpo")
    rollout = run.collect(4, 4, updates=updates)
    rows = [r for s in run.minibatches(rollout, updates, epochs) for r in range(s.start, s.stop)]
    assert rows == list(range(16)) * epochs


def test_micro_batches_do_not_change_the_update(tmp_path):
    runs = []
    for micro_batch in ("auto", 4, 1):
        folder = tmp_path / str(micro_batch)
        folder.mkdir()
        run, built = prepared(folder, "flow_grpo", micro_batch=micro_batch)
        rollout = run.collect(4, 4, shared_prefix=False)
        run.update(rollout, slice(0, 16), torch.arange(16.0).view(4, 4) - 7.5, built.loss)
        runs.append([p.detach().clone() for p in run.trainable])
    for other in runs[1:]:
        assert max(float((a - b).abs().max()) for a, b in zip(runs[0], other, strict=True)) < 1e-6


def test_gradient_is_the_mean_over_rows_and_steps(tmp_path):
    """By hand: the gradient that `update` applies is that of the mean loss over every row and every kept step."""
    run, built = prepared(tmp_path, "flow_grpo")
    rollout, advantage = run.collect(4, 4), torch.arange(16.0).view(4, 4) - 7.5
    chains = rollout.trajectory
    losses = [built.loss(run._score(run.policy, chains, k, rollout.rows(advantage), None))[0] for k in chains.steps]
    expected = torch.autograd.grad(torch.stack(losses).mean(), run.trainable)
    norm = torch.stack([g.norm() for g in expected]).norm()
    expected = [g / max(1.0, float(norm)) for g in expected]
    run.update(rollout, slice(0, 16), advantage, built.loss)
    for parameter, gradient in zip(run.trainable, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_published_kl_is_dt_times_the_true_one(tmp_path):
    run, built = prepared(tmp_path, "flow_grpo")
    built.beta = 1.0
    published = replace(built, kl_form="published")
    reference, rollout, advantage = run.snapshot(), run.collect(4, 4), torch.zeros(4, 4)
    for p in run.trainable:
        p.data += 0.01
    step = run._score(run.policy, rollout.trajectory, 1, rollout.rows(advantage), reference)
    assert torch.allclose(built.loss(step)[0] * step.dt, published.loss(step)[0], rtol=1e-5)


def test_replay_check_rescoring_and_refusal(tmp_path):
    """A network that does not repeat itself is rescored if its forwards agree, and refused, with the step named, if
    not."""
    run, built = prepared(tmp_path, "flow_grpo")
    rollout = run.collect(4, 4)
    shifted = replace(rollout, trajectory=replace(rollout.trajectory, mean=rollout.trajectory.mean + 0.05))
    rescored = run.verified(shifted, built.log_ratio, built.clip / 10)
    assert run._rescore
    assert torch.allclose(rescored.trajectory.mean, rollout.trajectory.mean, atol=1e-6)
    run._rescore = None
    honest = run.policy.model.denoise

    def noisy(x, t, condition):
        prediction = honest(x, t, condition)
        return replace(prediction, x0=prediction.x0 + 0.1 * torch.randn_like(x))

    run.policy.model.denoise = noisy
    with pytest.raises(config.ConfigError, match=r"replay is not exact: at step \d"):
        run.verified(run.collect(4, 4), built.log_ratio, built.clip / 10)


def test_window_draws_stay_inside_and_repeat(tmp_path):
    run, _ = prepared(tmp_path, "flow_grpo", chain={"steps": 8, "window": [1, 6], "window_size": 2})
    drawn = []
    for iteration in range(1, 200):
        run.iteration = iteration
        low, high = run._draw_window()
        assert 1 <= low < high <= 6
        assert high - low == 2
        drawn.append(low)
    assert set(drawn) == {1, 2, 3, 4}
    run.iteration = 7
    assert run._draw_window()[0] == drawn[6]
