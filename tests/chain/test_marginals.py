"""Marginals on x_0 ~ N(1, .5^2) with the exact denoiser,
propagated through the kernels' coefficients.
"""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from genpolicy.chain import CPS, DDIM, SDE, ClipStd, DPMSolver, FloorStd, Heun, Linear
from genpolicy.chain.kernel import Kernel
from genpolicy.chain.schedule import Schedule, Step, step
from genpolicy.chain.solver import Solver
from genpolicy.chain.values import Coefficients
from tests.chain.exact import DATA, SCHEDULES, Data, moments, solved


def sd3(steps: int, shift: float = 3.0) -> Tensor:
    """diffusers' own flow sigmas."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.double()


def final_std(kernel: Kernel, schedule: Schedule, steps: int) -> float:
    return moments(kernel, schedule, schedule.grid(steps))[-1][1]


def inflation(kernel: Kernel, grid: Tensor, data: Data = DATA) -> list[float]:
    """std of x_s over its true std, after every step but the last."""
    path = moments(kernel, Linear(), grid, data)
    return [
        std / data.marginal(Linear(), t)[1]
        for (_, std), t in zip(path[1:-1], grid[1:-1], strict=True)
    ]


def order(error: Callable[[int], float], steps: int) -> float:
    """The order of convergence between K and 2 K steps."""
    return math.log2(abs(error(steps)) / abs(error(2 * steps)))


# ---- measured once: final std, truth .5, T = 10, 40, 200, 1000

MEASURED = {
    DDIM(0.0): (0.359, 0.465, 0.493, 0.4985),
    SDE(0.7): (0.421, 0.479, 0.497, 0.4997),
    SDE(0.3, "constant"): (0.377, 0.469, 0.494, 0.4986),
    CPS(0.8): (0.308, 0.371, 0.394, 0.401),
}


@pytest.mark.parametrize("kernel", MEASURED, ids=str)
@pytest.mark.parametrize("column", range(4))
def test_final_std_over_the_sd3_table(kernel: Kernel, column: int) -> None:
    mean, std = moments(kernel, Linear(), sd3((10, 40, 200, 1000)[column]))[-1]
    assert std == pytest.approx(MEASURED[kernel][column], abs=6e-4)
    assert mean == pytest.approx(1.0, abs=1e-6)


def test_control_forgetting_the_noise_of_the_direction_term() -> None:
    """DDIM(1) with DDIM(0)'s direction keeps too much noise: it must not look like DDIM(1)."""

    class Wrong:
        def coefficients(self, step: Step) -> Coefficients:
            right, ode = DDIM(1.0).coefficients(step), DDIM(0.0).coefficients(step)
            return Coefficients(right.x, right.x0, ode.eps, right.std)

    assert abs(final_std(Wrong(), Linear(), 256) - 0.5) > 0.1


# ---- convergence

FIRST_ORDER = [(DDIM(0.0), 0.05), (DDIM(0.5), 0.06), (DDIM(1.0), 0.15)]


@pytest.mark.parametrize(("kernel", "slack"), FIRST_ORDER, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_converges_at_first_order(kernel: Kernel, slack: float, name: str) -> None:
    """The error halves when K doubles, on every schedule."""
    schedule = SCHEDULES[name]
    assert order(lambda K: final_std(kernel, schedule, K) - 0.5, 256) == pytest.approx(1, abs=slack)
    assert abs(final_std(kernel, schedule, 512) - 0.5) < 0.01


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sde_of_constant_noise_converges_at_first_order(shift: float) -> None:
    schedule = Linear(shift)
    assert order(
        lambda K: final_std(SDE(0.3, "constant"), schedule, K) - 0.5, 256
    ) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("steps", "error"), [(200, 0.0025), (3200, 0.0015)])
def test_flow_grpos_sde_converges_slowly(steps: int, error: float) -> None:
    """7.8: +.2 % of std at T = 200 and still +.12 % at 3200, uniform grid:
    the first step keeps injecting.
    """
    relative = final_std(SDE(0.7), Linear(), steps) / 0.5 - 1
    assert 0 < relative < error
    assert abs(final_std(SDE(0.7), Linear(), 200) / 0.5 - 1) <= 0.005


@pytest.mark.parametrize("name", SCHEDULES)
def test_heun_converges_at_second_order(name: str) -> None:
    schedule = SCHEDULES[name]
    assert order(lambda K: solved(Heun(), schedule, schedule.grid(K))[1] - 0.5, 64) > 1.8
    assert (
        order(lambda K: final_std(DDIM(0.0), schedule, K) - 0.5, 64) < 1.2
    )  # control: the ODE's Euler step


def inner(schedule: Schedule, steps: int) -> Tensor:
    """``steps`` steps between two times where log(alpha/sigma) is finite."""
    return schedule.grid(2 * steps)[steps // 4 : -steps // 4]


@pytest.mark.parametrize("solver", [Heun(), DPMSolver()], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_solvers_between_two_finite_times_are_of_second_order(solver: Solver, name: str) -> None:
    schedule = SCHEDULES[name]

    def error(steps: int) -> float:
        grid = inner(schedule, steps)
        return solved(solver, schedule, grid)[1] - DATA.marginal(schedule, grid[-1])[1]

    assert order(error, 128) > 1.8


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", [Heun(), DPMSolver()], ids=str)
def test_solvers_converge_over_the_whole_grid(solver: Solver, name: str) -> None:
    """DPM-Solver++ takes first-order steps at both infinite ends (as diffusers does),
    yet beats Euler's.
    """
    schedule = SCHEDULES[name]
    mean, std = solved(solver, schedule, schedule.grid(128))
    assert mean == pytest.approx(1, abs=1e-9)
    assert abs(std - 0.5) < 0.3 * abs(final_std(DDIM(0.0), schedule, 128) - 0.5)
    assert order(lambda K: solved(solver, schedule, schedule.grid(K))[1] - 0.5, 128) > 1.4


ANYWHERE = [(name, kernel) for name in SCHEDULES for kernel in (DDIM(0.0), DDIM(1.0), CPS(0.8))]
ON_FLOWS = [
    (name, kernel) for name in ("linear", "shifted") for kernel in (SDE(0.7), SDE(0.3, "constant"))
]


@pytest.mark.parametrize(("name", "kernel"), [*ANYWHERE, *ON_FLOWS], ids=str)
def test_means_are_exact(name: str, kernel: Kernel) -> None:
    """Whatever noise a kernel adds, the mean is the true one at every time."""
    schedule = SCHEDULES[name]
    grid = schedule.grid(16)
    for (mean, _), t in zip(moments(kernel, schedule, grid), grid, strict=True):
        assert mean == pytest.approx(DATA.marginal(schedule, t)[0], abs=1e-9)


# ---- CPS: preserves coefficients, not marginals


def test_cps_does_not_converge_to_the_datas_spread() -> None:
    stds = [moments(CPS(0.8), Linear(), Linear(3.0).grid(T))[-1][1] for T in (200, 1600)]
    assert stds[0] == pytest.approx(0.39, abs=0.01)
    assert max(stds) < 0.41  # truth .5, however many steps


@pytest.mark.parametrize(
    "kernel", [DDIM(0.0), DDIM(0.5), DDIM(1.0), CPS(0.3), CPS(0.8), CPS(1.0)], ids=str
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_coefficients_are_preserved(kernel: Kernel, name: str) -> None:
    """x_s = alpha_s x0 + (noise of total std sigma_s), at every step."""
    schedule = SCHEDULES[name]
    for here, c in along(kernel, schedule):
        assert float(c.x) == 0
        assert float(c.x0) == float(here.alpha_s)
        assert float(c.eps**2 + c.std**2) == pytest.approx(
            float(here.sigma_s**2), rel=1e-12, abs=1e-30
        )


def test_control_sdes_do_not_preserve_coefficients() -> None:
    here, c = along(SDE(0.7), Linear())[1]
    eps = c.eps + c.x * here.sigma_t  # x_t = alpha_t x0 + sigma_t eps
    assert abs(float(eps**2 + c.std**2) / float(here.sigma_s**2) - 1) > 0.02


def along(kernel: Kernel, schedule: Schedule, steps: int = 10) -> list[tuple[Step, Coefficients]]:
    grid = schedule.grid(steps)
    here = [step(schedule, grid[k : k + 1], grid[k + 1 : k + 2]) for k in range(steps)]
    return [(h, kernel.coefficients(h)) for h in here]


# ---- the first step from pure noise (diffusers' 8 uniform sigmas)


def test_the_patched_first_step_inflates() -> None:
    """Measured there on a network: 1.22, 1.29, 1.17; here exactly, for data of unit variance."""
    assert inflation(SDE(1.0), sd3(8, 1.0), Data(0.0, 1.0))[:3] == pytest.approx(
        [1.22, 1.27, 1.17], abs=0.01
    )
    assert inflation(SDE(0.7), sd3(8, 1.0), Data(0.0, 1.0))[:3] == pytest.approx(
        [1.06, 1.12, 1.09], abs=0.03
    )


@pytest.mark.parametrize("grid", [sd3(8, 1.0), Linear().grid(8)], ids=["diffusers", "ours"])
@pytest.mark.parametrize("data", [DATA, Data(0.0, 1.0)], ids=str)
def test_inflation_and_ddim_free_of_it(grid: Tensor, data: Data) -> None:
    assert 1.2 < inflation(SDE(1.0), grid, data)[0] < 1.3
    for eta in (0.0, 0.5, 0.7, 1.0):
        assert max(inflation(DDIM(eta), grid, data)) <= 1.0


def test_more_steps_do_not_cure_the_first_one() -> None:
    """7.5: the patch injects a variance a^2 whatever the number of steps;
    4.6 % of std at a = .7.
    """
    for steps in (100, 1000):
        assert max(inflation(SDE(0.7), Linear(3.0).grid(steps))) > 1.04
        assert max(abs(r - 1) for r in inflation(DDIM(1.0), Linear().grid(steps))) < 4 / steps**0.5
    assert max(inflation(SDE(0.3, "constant"), Linear().grid(1000))) < 1.001


# ---- wrappers of the std

WRAPPED = [
    ClipStd(DDIM(1.0), 0.05, 0.2),
    ClipStd(DDIM(1.0), low=0.3),
    ClipStd(CPS(0.8), high=0.2),
    FloorStd(DDIM(0.5), 0.1),
    FloorStd(DDIM(0.0), 0.3),
]


@pytest.mark.parametrize("kernel", WRAPPED, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_wrapped_std_keeps_the_coefficients(kernel: ClipStd | FloorStd, name: str) -> None:
    """eps^2 + std^2 = sigma_s^2;
    a floor over sigma_s is exploration noise on top (and eps is 0 then).
    """
    for here, c in along(kernel, SCHEDULES[name]):
        inside = torch.minimum(c.std, here.sigma_s)
        assert float(c.x0) == float(here.alpha_s)
        assert float(c.eps**2 + inside**2) == pytest.approx(
            float(here.sigma_s**2), rel=1e-12, abs=1e-30
        )
        if isinstance(kernel, FloorStd):
            assert float(c.std) >= kernel.floor
        else:
            assert float(c.std) <= float(here.sigma_s)


@pytest.mark.parametrize("kernel", WRAPPED, ids=str)
def test_published_forms_do_not(kernel: ClipStd | FloorStd) -> None:
    options = {"consistent": False}
    published = (
        FloorStd(kernel.kernel, kernel.floor, **options)
        if isinstance(kernel, FloorStd)
        else ClipStd(kernel.kernel, kernel.low, kernel.high, **options)
    )
    total = [
        float((c.eps**2 + c.std**2) / h.sigma_s**2) for h, c in along(published, Linear())[:-1]
    ]
    assert max(abs(v - 1) for v in total) > 0.01
    for (_, ours), (_, inner_kernel) in zip(
        along(published, Linear()), along(kernel.kernel, Linear()), strict=True
    ):
        assert float(ours.eps) == float(inner_kernel.eps)  # the direction term of the unchanged std


def test_the_wrapped_std_is_the_clipped_or_floored_one() -> None:
    for (here, c), (_, plain) in zip(
        along(ClipStd(DDIM(1.0), 0.05, 0.2), Linear()), along(DDIM(1.0), Linear()), strict=True
    ):
        assert float(c.std) == pytest.approx(
            min(max(float(plain.std), 0.05), 0.2, float(here.sigma_s)), abs=1e-15
        )
    for (_, c), (_, plain) in zip(
        along(FloorStd(DDIM(0.5), 0.1), Linear()), along(DDIM(0.5), Linear()), strict=True
    ):
        assert float(c.std) == max(float(plain.std), 0.1)


@pytest.mark.parametrize("high", [0.1, 0.2])
def test_a_consistent_clip_keeps_the_marginals(high: float) -> None:
    """Any std below DDIM(1)'s with its own direction converges;
    the published form is off for every K.
    """
    right, wrong = (ClipStd(DDIM(1.0), 0.0, high, consistent=c) for c in (True, False))
    assert order(lambda K: final_std(right, Linear(), K) - 0.5, 128) > 0.8
    assert abs(final_std(right, Linear(), 256) - 0.5) < 0.01
    coarse = moments(wrong, Linear(), Linear().grid(8))
    assert abs(coarse[4][1] / DATA.marginal(Linear(), Linear().grid(8)[4])[1] - 1) > 0.02
