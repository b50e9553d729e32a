"""Log-ratios, GRPO-Guard's identities, the clipped surrogate and the KL,
each beside the variant that is known to be wrong.
"""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from genpolicy.chain import CPS, DDIM, SDE, Gaussian, Linear, Prediction
from genpolicy.chain.schedule import step
from genpolicy.chain.values import expand, output_gain
from genpolicy.learning.objective import (
    clipped_surrogate,
    guard_log_ratio,
    log_ratio,
    log_ratio_unequal,
    mean_kl,
)
from tests.chain.exact import gain, transition

F64 = torch.float64
SD3 = torch.tensor(
    [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0], dtype=F64
)


def pair(rows=6, dims=64, s=0.3, shift=0.02, seed=0):
    """old, new and a sample of old, in fp64;
    every row has its own shift, so that a batch mean is not a row's own.
    """
    g = torch.Generator().manual_seed(seed)
    old = Gaussian(
        torch.randn(rows, dims, dtype=F64, generator=g), torch.full((rows, 1), s, dtype=F64)
    )
    size = torch.linspace(0.2, 2, rows, dtype=F64)[:, None] * shift
    new = Gaussian(old.mean + size * torch.randn(rows, dims, dtype=F64, generator=g), old.std)
    return new, old, old.sample(torch.randn(rows, dims, dtype=F64, generator=g))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_log_ratio_is_the_difference_of_log_probs(reduce):
    new, old, x = pair()
    plain = new.log_prob(x, reduce=reduce) - old.log_prob(x, reduce=reduce)
    assert torch.allclose(log_ratio(new, old, x, reduce=reduce), plain, atol=1e-12)


def test_log_ratio_keeps_its_digits_in_fp32():
    new, old, x = pair(dims=16384, s=0.01, shift=1e-6)
    single = [Gaussian(g.mean.float(), g.std.float()) for g in (new, old)]
    # the shift must survive the rounding of the means: give both fp32 means that are exactly the
    # fp64 ones
    exact = [Gaussian(g.mean.double(), g.std.double()) for g in single]
    truth = log_ratio(*exact, x.float().double(), reduce="mean")
    ours = log_ratio(*single, x.float(), reduce="mean")
    subtracted = single[0].log_prob(x.float(), reduce="mean") - single[1].log_prob(
        x.float(), reduce="mean"
    )
    assert (ours - truth).abs().max() < 0.01 * (subtracted - truth).abs().max()


def test_guard_identity():
    """s (log rho + mean D^2/(2 s^2)) == mean(noise D), to 1e-10 in fp64."""
    new, old, x = pair()
    s = old.std[:, 0]
    bias = ((new.mean - old.mean) ** 2).mean(1) / (2 * s**2)
    plain = new.log_prob(x, reduce="mean") - old.log_prob(x, reduce="mean")
    assert (guard_log_ratio(new, old, x, reduce="mean") - s * (plain + bias)).abs().max() < 1e-10


def test_guard_bias_is_each_rows_own():
    """The published form averages the bias over the batch (flow_grpo#244):
    it must fail the identity.
    """
    new, old, x = pair()
    s = old.std[:, 0]
    plain = new.log_prob(x, reduce="mean") - old.log_prob(x, reduce="mean")
    published = s * (plain + ((new.mean - old.mean) ** 2).mean() / (2 * s**2))
    assert (guard_log_ratio(new, old, x, reduce="mean") - published).abs().max() > 1e-5


def test_guard_is_centred_where_the_plain_ratio_is_not():
    draws, dims, s, r = 20_000, 64, 0.3, 0.5
    g = torch.Generator().manual_seed(1)
    direction = torch.randn(1, dims, dtype=F64, generator=g)
    direction *= r * s / direction.square().mean().sqrt()
    old = Gaussian(torch.zeros(draws, dims, dtype=F64), torch.full((draws, 1), s, dtype=F64))
    new = Gaussian(direction.expand(draws, dims), old.std)
    x = old.sample(torch.randn(draws, dims, dtype=F64, generator=g))
    guard, plain = (
        guard_log_ratio(new, old, x, reduce="mean"),
        log_ratio(new, old, x, reduce="mean"),
    )

    def error(v):
        return float(v.std() / math.sqrt(draws))

    assert abs(float(guard.mean())) < 4 * error(guard)
    assert float(plain.mean()) == pytest.approx(-(r**2) / 2, abs=4 * error(plain))
    assert abs(float(plain.mean())) > 20 * error(plain)


def model_step(kernel, t, s, velocity, x):
    """The transition of one linear-schedule step for a given network output."""
    row = step(Linear(), t.expand(len(x)), s.expand(len(x)))
    prediction = Prediction(
        x - expand(row.sigma_t, x) * velocity, x + expand(row.alpha_t, x) * velocity
    )
    mean, std = transition(kernel, x, prediction, row), kernel.coefficients(row).std
    return Gaussian(_double(kernel, x, prediction, row), expand(std, x)), row, mean


def _double(kernel, x, prediction, row):
    c = kernel.coefficients(row)
    return expand(c.x, x) * x + expand(c.x0, x) * prediction.x0 + expand(c.eps, x) * prediction.eps


def gradient(objective, kernel, k, advantage=1.0):
    """d loss / d velocity at the acting policy for one step of the SD3 table: [B,*E] in fp64."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(3, 50, dtype=F64, generator=g)
    velocity = torch.randn(3, 50, dtype=F64, generator=g)
    old, _, _ = model_step(kernel, SD3[k], SD3[k + 1], velocity, x)
    sample = old.sample(torch.randn(3, 50, dtype=F64, generator=g))
    live = velocity.clone().requires_grad_(True)
    new, row, _ = model_step(kernel, SD3[k], SD3[k + 1], live, x)
    loss = clipped_surrogate(
        objective(new, old, sample, reduce="mean"), torch.full((3,), advantage, dtype=F64), 0.2
    ).loss.sum()
    return torch.autograd.grad(loss, live)[0], float(old.std[0, 0]), row


def kappa(kernel, row):
    return abs(float(gain(kernel, row, *output_gain("velocity", row.alpha_t, row.sigma_t))[0]))


@pytest.mark.parametrize("kernel", [SDE(0.7), SDE(0.3, "constant"), DDIM(1.0), CPS(0.8)], ids=repr)
@pytest.mark.parametrize("k", range(9))
def test_first_update_of_guard_is_the_plain_gradient_times_s_over_kappa(kernel, k):
    guard, s, row = gradient(guard_log_ratio, kernel, k)
    plain, _, _ = gradient(log_ratio, kernel, k)
    weight = kappa(kernel, row)
    assert torch.allclose(guard / weight, plain * s / weight, rtol=1e-12, atol=1e-16)
    dt = float(SD3[k] - SD3[k + 1])
    assert torch.allclose(guard / dt, plain * s / dt, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("kernel", [SDE(0.7), SDE(0.3, "constant"), DDIM(1.0), CPS(0.8)], ids=repr)
def test_gradients_are_flat_over_the_steps(kernel):
    """|d rho_hat / d output| / |kappa| = rms(noise)/sqrt(D) at every step;
    the plain ratio's spread is wide.
    """
    flat, wide = [], []
    for k in range(9):
        guard, _, row = gradient(guard_log_ratio, kernel, k)
        plain, _, _ = gradient(log_ratio, kernel, k)
        flat.append(float(guard.norm()) / kappa(kernel, row))
        wide.append(float(plain.norm()))
    assert max(flat) / min(flat) < 1 + 1e-9
    assert max(wide) / min(wide) > 2


def test_plain_spread_on_the_sd3_table_is_the_published_problem():
    norms = [float(gradient(log_ratio, SDE(0.7), k)[0].norm()) for k in range(9)]
    assert max(norms) / min(norms) == pytest.approx(26, rel=0.05)
    by_dt = [
        float(gradient(guard_log_ratio, SDE(0.7), k)[0].norm()) / float(SD3[k] - SD3[k + 1])
        for k in range(9)
    ]
    assert max(by_dt) / min(by_dt) == pytest.approx(
        1.245, rel=0.01
    )  # the first step's kappa is dt, the others' dt (1 + a^2/2)


def test_guard_is_right_under_cps_where_the_published_form_is_not():
    """The published form multiplies by std/sqrt(dt) * sqrt(dt) for the flow SDE;
    CPS's log-prob drops 1/(2 s^2) there.
    """
    s, dt, dims, draws = 0.4, 0.1, 4096, 2000
    g = torch.Generator().manual_seed(3)
    shift = torch.randn(1, dims, dtype=F64, generator=g)
    shift *= 0.01 / shift.square().mean().sqrt()
    old = Gaussian(torch.zeros(draws, dims, dtype=F64), torch.full((draws, 1), s, dtype=F64))
    new = Gaussian(shift.expand(draws, dims), old.std)
    x = old.sample(torch.randn(draws, dims, dtype=F64, generator=g))
    ours = guard_log_ratio(new, old, x, reduce="mean")
    difference = (x**2).mean(1) - ((x - new.mean) ** 2).mean(1)  # the public CPS "log-prob" ratio
    public = math.sqrt(dt) * s * (difference + (shift**2).mean() / (2 * dt * s**2))
    assert abs(float(ours.mean())) < 4 * float(ours.std()) / math.sqrt(draws)
    assert float(public.mean()) == pytest.approx(3.8e-4, rel=0.1)


def test_clipped_surrogate_by_hand():
    log_rho = torch.tensor([0.0, 0.3, -0.3, 0.3, -0.3])
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    result = clipped_surrogate(log_rho, advantage, 0.2)
    expected = [-1.0, -1.2, -math.exp(-0.3), math.exp(0.3), 0.8]
    assert result.loss.tolist() == pytest.approx(expected)
    assert result.clipped.tolist() == [False, True, False, False, True]


def test_clipped_rows_have_no_gradient_and_positive_advantages_raise_the_likelihood():
    _, old, x = pair()
    mean = old.mean.clone().requires_grad_(True)
    live = Gaussian(mean, old.std)
    loss = clipped_surrogate(
        log_ratio(live, old, x, reduce="mean"), torch.ones(6, dtype=F64), 0.2
    ).loss.sum()
    loss.backward()
    moved = Gaussian(old.mean - 1e-3 * mean.grad, old.std)
    assert (log_ratio(moved, old, x, reduce="mean") > 0).all()
    far = (old.mean + (x - old.mean)).requires_grad_(True)  # rho far above 1 + clip
    clipped_surrogate(
        log_ratio(Gaussian(far, old.std), old, x, reduce="mean"), torch.ones(6, dtype=F64), 1e-3
    ).loss.sum().backward()
    assert far.grad.abs().max() == 0


def test_mean_kl_is_the_true_kl():
    new, old, _ = pair()
    truth = kl_divergence(Normal(new.mean, new.std), Normal(old.mean, old.std)).mean(1)
    assert torch.allclose(mean_kl(new, old, reduce="mean"), truth, atol=1e-12)
    dt = 0.05
    g = old.std / math.sqrt(dt)
    public = ((new.mean - old.mean) ** 2 / (2 * g**2)).mean(1)
    assert torch.allclose(mean_kl(new, old, reduce="mean") * dt, public, atol=1e-12)


def test_points_and_changed_std_are_refused():
    new, old, x = pair()
    with pytest.raises(ValueError, match="std 0"):
        log_ratio(
            Gaussian(new.mean, new.std * 0), Gaussian(old.mean, old.std * 0), x, reduce="mean"
        )
    for objective in (log_ratio, guard_log_ratio):
        with pytest.raises(ValueError, match="std has not changed"):
            objective(Gaussian(new.mean, new.std * 1.1), old, x, reduce="mean")


def changed(by, shift=0.02, dims=64, single=False):
    """new, old and a sample of old;
    every event dim's std changes by a factor of its own, up to 1 + ``by``.
    """
    new, old, x = pair(dims=dims, shift=shift)
    g = torch.Generator().manual_seed(5)
    factor = 1 + by * (2 * torch.rand(new.mean.shape, dtype=F64, generator=g) - 1)
    values = [new.mean, old.std * factor, old.mean, old.std.expand_as(old.mean), x]
    if single:  # what fp32 holds, so that the truth is about the same numbers
        values = [v.float() for v in values]
    new_mean, new_std, old_mean, old_std, x = values
    return Gaussian(new_mean, new_std), Gaussian(old_mean, old_std), x


def exactly(gaussian):
    return Normal(gaussian.mean.double(), gaussian.std.double())


@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
@pytest.mark.parametrize("by", [1e-3, 0.3, 0.9])
def test_log_ratio_of_a_changed_std_is_the_difference_of_log_probs(reduce, by):
    new, old, x = changed(by)
    truth = exactly(new).log_prob(x) - exactly(old).log_prob(x)
    wanted = truth if reduce == "none" else getattr(truth, reduce)(1)
    assert torch.allclose(log_ratio_unequal(new, old, x, reduce=reduce), wanted, atol=1e-11)
    alone = Gaussian(new.mean, old.std)  # control: the change of the std counts
    assert not torch.allclose(log_ratio(alone, old, x, reduce=reduce), wanted, atol=1e-4)


def test_log_ratio_of_one_changed_std_per_row():
    new, old, x = pair()
    new = Gaussian(new.mean, old.std * torch.linspace(0.5, 2, 6, dtype=F64)[:, None])
    truth = (exactly(new).log_prob(x) - exactly(old).log_prob(x)).sum(1)
    assert torch.allclose(log_ratio_unequal(new, old, x, reduce="sum"), truth, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
def test_at_equal_std_it_is_the_log_ratio_to_the_bit(reduce, dtype):
    new, old, x = pair()
    new, old = (Gaussian(g.mean.to(dtype), g.std.to(dtype)) for g in (new, old))
    plain = log_ratio(new, old, x.to(dtype), reduce=reduce)
    assert torch.equal(log_ratio_unequal(new, old, x.to(dtype), reduce=reduce), plain)
    still = log_ratio_unequal(old, old, x.to(dtype), reduce=reduce)
    assert (still == 0).all()


@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
@pytest.mark.parametrize(("by", "shift"), [(1e-5, 1e-6), (1e-5, 0.0), (1e-3, 1e-4)])
def test_a_tiny_change_of_the_std_keeps_its_digits_in_fp32(reduce, by, shift):
    """Control: the difference of two log-densities is over 10 times as far from the truth."""
    new, old, x = changed(by, shift, dims=4096, single=True)
    truth = log_ratio_unequal(
        *(Gaussian(g.mean.double(), g.std.double()) for g in (new, old)), x.double(), reduce=reduce
    )
    ours = log_ratio_unequal(new, old, x, reduce=reduce)
    subtracted = new.log_prob(x, reduce=reduce) - old.log_prob(x, reduce=reduce)
    error, naive = ((value - truth).abs().max() for value in (ours, subtracted))
    assert 10 * error < naive
    assert error < 1e-5 * truth.abs().max()


@pytest.mark.parametrize("by", [0.0, 0.3])
def test_the_gradient_of_a_changed_std_is_right(by):
    """d log rho / d std = (z_new^2 - 1) / s_new, d log rho / d mean = z_new / s_new."""
    new, old, x = changed(by)
    mean, std = new.mean.clone().requires_grad_(), new.std.clone().requires_grad_()
    log_ratio_unequal(Gaussian(mean, std), old, x, reduce="sum").sum().backward()
    z = (x - new.mean) / new.std
    assert torch.allclose(std.grad, (z**2 - 1) / new.std, atol=1e-10)
    assert torch.allclose(mean.grad, z / new.std, atol=1e-10)
    assert not torch.allclose(std.grad, z**2 / new.std, atol=0.1)  # control: without log std


def test_the_mean_of_the_ratio_under_what_acted_is_1_and_of_its_logarithm_the_kl():
    g = torch.Generator().manual_seed(3)
    shape = (200_000, 1)
    old = Gaussian(torch.zeros(shape, dtype=F64), torch.ones(1, 1, dtype=F64))
    new = Gaussian(torch.full(shape, 0.1, dtype=F64), torch.full((1, 1), 0.9, dtype=F64))
    x = old.sample(torch.randn(shape, dtype=F64, generator=g))
    log = log_ratio_unequal(new, old, x, reduce="sum")
    assert float(log.exp().mean()) == pytest.approx(1, abs=0.003)
    assert float(-log.mean()) == pytest.approx(float(old.kl(new, reduce="sum")[0]), abs=0.002)


def test_points_have_no_log_ratio_whichever_std_is_0():
    new, old, x = changed(0.1)
    for at in (0, 1):
        gaussians = [new, old]
        gaussians[at] = Gaussian(gaussians[at].mean, gaussians[at].std * 0)
        with pytest.raises(ValueError, match="std 0"):
            log_ratio_unequal(*gaussians, x, reduce="mean")
