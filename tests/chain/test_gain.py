"""gain == autograd's d mean / d network output,
for every kernel x parametrisation x wrapper x step.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from genpolicy.chain import (
    CPS,
    DDIM,
    EDM,
    SDE,
    ClipStd,
    ClipX0,
    Consistency,
    FloorStd,
    Guidance,
    Linear,
    Prediction,
    VariancePreserving,
)
from genpolicy.chain.kernel import Kernel
from genpolicy.chain.schedule import Schedule, Step, step
from genpolicy.chain.values import Denoiser, Parametrisation, output_gain
from tests.chain.exact import Rows, cosine, gain, relative, transition

ROWS, SIZE, K = 2, 16, 8
ANY: list[Kernel] = [
    DDIM(0.0),
    DDIM(0.5),
    DDIM(1.0),
    CPS(0.8),
    Consistency(),
    ClipStd(DDIM(1.0), 0.1, 0.3),
    ClipStd(DDIM(1.0), 0.1, 0.3, consistent=False),
    FloorStd(DDIM(0.5), 0.2),
    FloorStd(DDIM(0.5), 0.2, consistent=False),
]
FLOW: list[Kernel] = [SDE(0.7), SDE(1.0), SDE(0.3, "constant")]
NOISY = VariancePreserving(torch.linspace(0.999, 0.01, 1000))
"""Ends at alpha_bar .01: an epsilon network has no x0 where alpha is 0."""
FAMILIES: list[tuple[Schedule, Parametrisation, list[Kernel]]] = [
    (Linear(), "velocity", [*ANY, *FLOW]),
    (Linear(3.0), "velocity", [*ANY, *FLOW]),
    (Linear(), "sample", [*ANY, *FLOW]),
    (NOISY, "epsilon", ANY),
    (NOISY, "sample", ANY),
    (NOISY, "v_prediction", ANY),
    (cosine(1000), "v_prediction", ANY),
    (cosine(1000), "sample", ANY),
    (EDM(), "epsilon", ANY),
    (EDM(), "sample", ANY),
]
CASES = [
    (s, kind, kernel, k)
    for s, kind, kernels in FAMILIES
    for kernel, k in product(kernels, (0, 1, K - 2, K - 1))
]


def at(schedule: Schedule, k: int) -> Step:
    grid = schedule.grid(K)
    return step(schedule, grid[k].expand(ROWS), grid[k + 1].expand(ROWS))


def case(here: Step, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """x_t and a network output that asks for gradients."""
    x, output = torch.randn(2, ROWS, SIZE, generator=torch.Generator().manual_seed(0)) * scale
    return x * (here.alpha_t**2 + here.sigma_t**2).sqrt().float()[:, None], output.requires_grad_()


def slope(kernel: Kernel, denoiser: Denoiser, x: Tensor, output: Tensor, here: Step) -> Tensor:
    """d mean / d output, [B,*E], by autograd:
    elementwise, so that the sum's gradient is the diagonal.
    """
    mean = transition(kernel, x, denoiser(x, here.t, Rows(x[:, 0])), here).mean
    (gradient,) = torch.autograd.grad(mean.sum(), output)
    return gradient


def network(kind: Parametrisation, output: Tensor, here: Step) -> Denoiser:
    return lambda x, t, condition: Prediction.of(kind, output, x, here.alpha_t, here.sigma_t)


def closed_form(kernel: Kernel, kind: Parametrisation, here: Step) -> Tensor:
    return gain(kernel, here, *output_gain(kind, here.alpha_t, here.sigma_t))


def close(ours: Tensor, theirs: Tensor, kernel: Kernel, kind: Parametrisation, here: Step) -> bool:
    """Equal to 2e-6 of the larger of the two terms:
    x0's and eps's shares cancel where a gain is small.
    """
    c, (d_x0, d_eps) = kernel.coefficients(here), output_gain(kind, here.alpha_t, here.sigma_t)
    scale = torch.maximum((c.x0 * d_x0).abs(), (c.eps * d_eps).abs())
    return bool(
        ((ours - theirs).abs() <= 2e-6 * scale.reshape(ROWS, *(1,) * (ours.ndim - 1))).all()
    )


def name(value: object) -> str:
    return type(value).__name__ if isinstance(value, VariancePreserving) else str(value)


@pytest.mark.parametrize(("schedule", "kind", "kernel", "k"), CASES, ids=name)
def test_gain_is_autograds(
    schedule: Schedule, kind: Parametrisation, kernel: Kernel, k: int
) -> None:
    here = at(schedule, k)
    x, output = case(here)
    theirs = slope(kernel, network(kind, output, here), x, output, here)
    assert close(closed_form(kernel, kind, here)[:, None], theirs.double(), kernel, kind, here)


def test_control_the_wrong_parametrisation_or_kernel() -> None:
    here = at(NOISY, 1)
    x, output = case(here)
    theirs = slope(DDIM(1.0), network("epsilon", output, here), x, output, here).double()
    assert (
        relative(closed_form(DDIM(1.0), "v_prediction", here)[:, None].expand_as(theirs), theirs)
        > 0.1
    )
    assert (
        relative(closed_form(DDIM(0.0), "epsilon", here)[:, None].expand_as(theirs), theirs) > 0.01
    )


def test_velocity_gain_is_minus_t_and_1_minus_t() -> None:
    t = torch.tensor([1.0, 0.25], dtype=torch.float64)
    d_x0, d_eps = output_gain("velocity", 1 - t, t)
    assert torch.equal(d_x0, -t)
    assert torch.equal(d_eps, 1 - t)


@pytest.mark.parametrize("k", [0, 1, 6])
def test_gain_may_be_negative(k: int) -> None:
    assert (closed_form(DDIM(1.0), "velocity", at(Linear(), k)) < 0).all()
    assert (closed_form(DDIM(1.0), "sample", at(Linear(), k)) > 0).all()


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.5])
@pytest.mark.parametrize("kernel", [DDIM(1.0), SDE(0.7)], ids=str)
@pytest.mark.parametrize("k", [0, 3])
def test_guidance_scales_the_gain_of_the_positive_branch(
    kernel: Kernel, scale: float, k: int
) -> None:
    here = at(Linear(), k)
    x, output = case(here)
    _, other = case(here, scale=2.0)

    def branches(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        return network("velocity", other if condition.value[0] == 9 else output, here)(
            x, t, condition
        )

    guided = Guidance(branches, lambda c: Rows(torch.full_like(c.value, 9.0)), scale)
    theirs = slope(kernel, guided, x, output, here)
    ours = scale * closed_form(kernel, "velocity", here)[:, None].expand_as(theirs)
    assert relative(ours, theirs) <= 5e-6


def clipped_case(here: Step, kind: Parametrisation) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, a network output that means x0 = ..., -1.5, -.5, .5, 1.5, ..., and where |x0| > 1."""
    x0, eps = torch.linspace(-3.05, 3.05, ROWS * SIZE).reshape(ROWS, SIZE), case(here)[1].detach()
    alpha, sigma = here.alpha_t.float()[:, None], here.sigma_t.float()[:, None]
    says = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "velocity": eps - x0,
    }
    return alpha * x0 + sigma * eps, says[kind].clone().requires_grad_(), x0.abs() > 1


CLIPPED = [(Linear(), "velocity"), (NOISY, "epsilon"), (NOISY, "v_prediction"), (NOISY, "sample")]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    ("schedule", "kind"), CLIPPED, ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("kernel", [DDIM(0.0), DDIM(0.5), DDIM(1.0), CPS(0.8)], ids=str)
@pytest.mark.parametrize("k", [0, 3, K - 1])
def test_where_the_clip_acts_the_gain_is_0_or_the_eps_part(
    kernel: Kernel, schedule: Schedule, kind: Parametrisation, recompute: bool, k: int
) -> None:
    here = at(schedule, k)
    x, output, acts = clipped_case(here, kind)
    theirs = slope(
        kernel, ClipX0(network(kind, output, here), schedule, 1.0, recompute), x, output, here
    ).double()
    none, d_eps = torch.zeros(ROWS), output_gain(kind, here.alpha_t, here.sigma_t)[1]
    clipped = gain(kernel, here, none, none if recompute else d_eps)[:, None]
    free = closed_form(kernel, kind, here)[:, None]
    assert close(torch.where(acts, clipped, free), theirs, kernel, kind, here)
    if recompute:
        assert (theirs[acts] == 0).all()
