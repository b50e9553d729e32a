"""Gaussian: log_prob and kl against torch.distributions, masks, and points."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from genpolicy.chain import Gaussian
from genpolicy.chain.values import Reduce
from tests.chain.exact import relative

B, T, D = 3, 5, 4
STDS = {"row": (B, 1, 1), "token": (B, T, 1), "element": (B, T, D)}
MASKS = {"token": (B, T, 1), "shared": (T, D), "element": (B, T, D)}


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def gaussian(std: str, seed: int = 0) -> Gaussian:
    return Gaussian(draw(seed, B, T, D), draw(seed + 1, *STDS[std]).abs() + 0.1)


def mask(kind: str) -> Tensor:
    """About half of the dims, at least one in every row."""
    kept = draw(5, *MASKS[kind]) > 0
    kept[..., 0, :] = True
    return kept


def reduced(value: Tensor, reduce: str, kept: Tensor | None = None) -> Tensor:
    """The definition: the chosen reduction over the kept dims of each row."""
    if kept is None:
        kept = torch.ones(B, T, D, dtype=torch.bool)
    kept = kept.expand(B, T, D)
    if reduce == "none":
        return torch.where(kept, value, 0.0)
    rows = [row[chosen] for row, chosen in zip(value, kept, strict=True)]
    return torch.stack([row.sum() if reduce == "sum" else row.mean() for row in rows])


@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("kept", [None, *MASKS])
def test_log_prob_is_torchs(std: str, kept: str | None, reduce: Reduce) -> None:
    ours, x = gaussian(std), draw(9, B, T, D)
    chosen = None if kept is None else mask(kept)
    theirs = reduced(
        Normal(ours.mean.double(), ours.std.double()).log_prob(x.double()), reduce, chosen
    )
    assert relative(ours.log_prob(x, reduce=reduce, mask=chosen), theirs) <= 1e-6


@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("other", STDS)
@pytest.mark.parametrize("kept", [None, *MASKS])
def test_kl_is_torchs(std: str, other: str, kept: str | None, reduce: Reduce) -> None:
    p, q = gaussian(std), gaussian(other, seed=20)
    chosen = None if kept is None else mask(kept)
    normals = [Normal(g.mean.double(), g.std.double().expand(B, T, D)) for g in (p, q)]
    theirs = reduced(kl_divergence(*normals), reduce, chosen)
    assert relative(p.kl(q, reduce=reduce, mask=chosen), theirs) <= 1e-6


def test_kl_control_the_other_direction() -> None:
    p, q = gaussian("row"), gaussian("row", seed=20)
    assert relative(q.kl(p, reduce="sum"), p.kl(q, reduce="sum")) > 0.1


def test_kl_of_equal_std_is_half_the_squared_distance_in_std() -> None:
    p = gaussian("row")
    q = Gaussian(p.mean + 0.1, p.std)
    assert relative(p.kl(q, reduce="mean"), (0.1 / p.std.flatten()) ** 2 / 2) <= 1e-5
    assert (p.kl(p, reduce="sum") == 0).all()


def test_mean_of_log_prob_over_its_own_samples() -> None:
    """E[log p] = -1/2 - log std - log(2 pi)/2."""
    wide = Gaussian(torch.zeros(1, 200_000), torch.full((1, 1), 0.3))
    value = wide.log_prob(wide.sample(draw(1, 1, 200_000)), reduce="mean")
    assert float(value) == pytest.approx(
        float(-wide.std.log() - 0.5 - torch.tensor(2 * torch.pi).log() / 2), abs=0.01
    )


@pytest.mark.parametrize("reduce", ["sum", "mean", "none"])
@pytest.mark.parametrize("std", ["token", "element"])
def test_points_may_be_masked_out(std: str, reduce: Reduce) -> None:
    """std 0 (and a mean of inf) in the masked-out dims:
    value and gradient are the kept dims' alone.
    """
    kept = mask("token")
    full = gaussian(std)
    holes = torch.where(kept, full.std, 0.0).requires_grad_()
    mean = torch.where(kept, full.mean, torch.inf).requires_grad_()
    x = draw(9, B, T, D)
    value = Gaussian(mean, holes).log_prob(x, reduce=reduce, mask=kept)
    assert torch.equal(value, full.log_prob(x, reduce=reduce, mask=kept))
    for gradient in torch.autograd.grad(value.sum(), (mean, holes)):
        assert gradient.isfinite().all()
        assert (gradient[~kept.expand_as(gradient)] == 0).all()
        assert (gradient[kept.expand_as(gradient)] != 0).all()


def test_points_may_be_masked_out_of_kl() -> None:
    kept = mask("token")
    p, q = gaussian("token"), gaussian("token", seed=20)
    mean = p.mean.clone().requires_grad_()
    holes = [torch.where(kept, g.std, 0.0) for g in (p, q)]
    value = Gaussian(mean, holes[0]).kl(Gaussian(q.mean, holes[1]), reduce="sum", mask=kept)
    assert torch.equal(value, p.kl(q, reduce="sum", mask=kept))
    (gradient,) = torch.autograd.grad(value.sum(), mean)
    assert gradient.isfinite().all()
    assert (gradient[~kept.expand_as(gradient)] == 0).all()


def test_control_choosing_after_the_division_gives_nan() -> None:
    kept = mask("token")
    full = gaussian("token")
    mean, std = full.mean.clone().requires_grad_(), torch.where(kept, full.std, 0.0)
    density = -0.5 * ((draw(9, B, T, D) - mean) / std) ** 2 - std.log()
    value = torch.where(kept, density, 0.0).sum()
    (gradient,) = torch.autograd.grad(value, mean)
    assert value.isfinite()
    assert gradient.isnan().any()


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan")])
@pytest.mark.parametrize("kept", [None, "token"])
def test_points_have_no_density(bad: float, kept: str | None) -> None:
    fine = gaussian("token")
    std = fine.std.clone()
    std[1, 0] = bad  # the first token is never masked out
    point = Gaussian(fine.mean, std)
    chosen = None if kept is None else mask(kept)
    for score in (
        lambda: point.log_prob(fine.mean, reduce="sum", mask=chosen),
        lambda: point.kl(fine, reduce="sum", mask=chosen),
        lambda: fine.kl(point, reduce="sum", mask=chosen),
    ):
        with pytest.raises(ValueError, match="std 0 is a point"):
            score()


def test_a_point_can_be_sampled() -> None:
    mean = draw(0, B, T, D)
    assert torch.equal(Gaussian(mean, torch.zeros(B, 1, 1)).sample(draw(1, B, T, D)), mean)


@pytest.mark.parametrize("score", ["log_prob", "kl"])
def test_reduce_has_no_default(score: str) -> None:
    p = gaussian("row")
    argument = p.mean if score == "log_prob" else p
    with pytest.raises(TypeError, match="reduce"):
        getattr(p, score)(argument)
    with pytest.raises(ValueError, match="valid are 'sum', 'mean', 'none'"):
        getattr(p, score)(argument, reduce="average")
