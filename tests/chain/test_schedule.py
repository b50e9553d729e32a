"""Schedules: grids, time maps and tables, against diffusers' own and against their definitions."""

import ast
import math
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from genpolicy.chain import EDM, Linear, VariancePreserving
from genpolicy.chain.schedule import Schedule, dynamic_shift, step
from tests.chain.exact import SCHEDULES

SD = DDIMScheduler(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    set_alpha_to_one=False,
    steps_offset=1,
)
SD_TABLE = VariancePreserving(SD.alphas_cumprod, float(SD.final_alpha_cumprod))


def library_function(path: str, name: str) -> Callable:
    """A plain function of diffusers, from its source:
    its pipeline would import transformers (30 s).
    """
    tree = ast.parse((Path(diffusers.__file__).parent / path).read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    space: dict = {}
    exec(compile(ast.Module(found, []), path, "exec"), space)
    return space[name]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 8, 50])
@pytest.mark.parametrize("start", [None, 0.5])
def test_grid_has_k_real_steps(name: str, steps: int, start: float | None) -> None:
    schedule = SCHEDULES[name]
    grid = schedule.grid(steps, start)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float64
    assert (grid.diff() < 0).all()
    assert grid[-1] == 0
    top = start if start is not None else (80.0 if name == "edm" else 1.0)
    assert float(grid[0]) == pytest.approx(top, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_grid_needs_a_step(name: str) -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        SCHEDULES[name].grid(0)


def test_our_flow_grid_has_one_more_real_step_than_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    assert float(scheduler.sigmas[-2]) == pytest.approx(
        0.001
    )  # its last evaluation moves x by a thousandth
    assert float(Linear().grid(8)[-2]) == 1 / 8


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.25])
@pytest.mark.parametrize("steps", [1, 10, 28])
def test_flow_grid_is_diffusers_when_given_real_steps(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    assert torch.allclose(Linear(shift).grid(steps), scheduler.sigmas.double(), atol=2e-7, rtol=0)


def test_shift_map_and_its_direction() -> None:
    middle = Linear(3.0).grid(2)[1]
    assert float(middle) == pytest.approx(0.75)  # 3 * .5 / (1 + 2 * .5)
    assert float(middle) != pytest.approx(1 / 4)  # the inverse map, .5 / (3 - 2 * .5)


@pytest.mark.parametrize("shift", [0.3, 0.5, 1.0, 1.65, 3.0, 7.7])
def test_flow_grid_starts_at_exactly_1(shift: float) -> None:
    assert float(Linear(shift).grid(8)[0]) == 1.0  # else SDE's special case at t = 1 is missed


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6889])
@pytest.mark.parametrize("steps", [4, 28])
def test_dynamic_shift_is_flux(tokens: int, steps: int) -> None:
    mu = library_function("pipelines/flux/pipeline_flux.py", "calculate_shift")(tokens)
    assert dynamic_shift(tokens) == pytest.approx(math.exp(mu), rel=1e-12)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    assert torch.allclose(
        Linear(dynamic_shift(tokens)).grid(steps), scheduler.sigmas.double(), atol=3e-7, rtol=0
    )


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_dynamic_shift_passes_ltx_settings_on(tokens: int) -> None:
    settings = {"base_seq_len": 1024, "max_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
    mu = library_function("pipelines/flux/pipeline_flux.py", "calculate_shift")(tokens, **settings)
    assert dynamic_shift(tokens, 1024, 4096, 0.95, 2.05) == pytest.approx(math.exp(mu), rel=1e-12)


@pytest.mark.parametrize("level", [0, 1, 499, 998, 999])
def test_vp_level_i_stands_at_i_plus_1(level: int) -> None:
    t = torch.tensor([(level + 1) / 1000], dtype=torch.float64)
    alpha_bar = SD.alphas_cumprod[level].double()
    assert SD_TABLE.alpha(t) == alpha_bar.sqrt()
    assert SD_TABLE.sigma(t) == (1 - alpha_bar).sqrt()


@pytest.mark.parametrize("final", [1.0, float(SD.alphas_cumprod[0])])
def test_vp_t_0_is_the_familys_own_end(final: float) -> None:
    table = VariancePreserving(SD.alphas_cumprod, final)
    zero = torch.zeros(2, dtype=torch.float64)
    assert (table.alpha(zero) == final**0.5).all()
    assert (table.sigma(zero) == (1 - final) ** 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [100, 1000])
def test_vp_reads_the_nearest_level(count: int, dtype: torch.dtype) -> None:
    alpha_bar = torch.linspace(0.99, 0.01, count, dtype=torch.float64)
    t = (torch.arange(count).to(dtype) + 1) / count
    assert torch.equal(VariancePreserving(alpha_bar).alpha(t), alpha_bar.sqrt())


def test_vp_control_truncating_reads_a_wrong_level() -> None:
    levels = torch.arange(100)
    t = (levels.double() + 1) / 100
    assert not torch.equal((t * 100).long() - 1, levels)  # .29 * 100 is 28.999...


def test_vp_per_token_times() -> None:
    t = torch.tensor([[0.001, 0.5], [1.0, 0.0]], dtype=torch.float64)
    assert SD_TABLE.alpha(t).shape == (2, 2)
    assert SD_TABLE.alpha(t)[1, 0] == SD.alphas_cumprod[-1].double().sqrt()


@pytest.mark.parametrize("steps", [1, 4, 10, 20, 25, 28, 30, 40, 50, 100, 250, 1000])
def test_vp_grid_is_diffusers_trailing(steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    levels = (SD_TABLE.grid(steps)[:-1] * 1000).round().long() - 1
    assert torch.equal(levels, scheduler.timesteps)


def test_vp_grid_refuses_more_steps_than_levels() -> None:
    with pytest.raises(ValueError, match="levels"):
        VariancePreserving(torch.linspace(0.99, 0.01, 100)).grid(150)


@pytest.mark.parametrize("steps", [2, 18, 40])
@pytest.mark.parametrize("ends", [(0.002, 80.0, 7.0), (0.01, 5.0, 3.0)])
def test_edm_grid_is_karras(steps: int, ends: tuple[float, float, float]) -> None:
    low, high, rho = ends
    scheduler = EDMEulerScheduler(sigma_min=low, sigma_max=high, rho=rho)
    scheduler.set_timesteps(steps)
    assert torch.allclose(
        EDM(low, high, rho).grid(steps), scheduler.sigmas.double(), rtol=3e-7, atol=0
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_and_sigma_belong_together(name: str) -> None:
    schedule = SCHEDULES[name]
    t = schedule.grid(64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    one = {"vp": alpha**2 + sigma**2, "edm": alpha}.get(name, alpha + sigma)
    assert (one - 1).abs().max() < 1e-15
    assert (sigma.diff() < 0).all()
    assert (alpha.diff() >= 0).all()
    assert sigma[-1] == 0


def test_step_looks_up_both_ends() -> None:
    t, s = torch.tensor([0.75], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    here = step(Linear(), t, s)
    assert (here.t, here.s, here.alpha_t, here.sigma_t, here.alpha_s, here.sigma_s) == (
        t,
        s,
        0.25,
        0.75,
        0.75,
        0.25,
    )


@pytest.mark.parametrize("schedule", [Linear(), Linear(3.0), EDM()])
@pytest.mark.parametrize("start", [0.0, -0.5, 1000.0, float("nan")])
def test_a_start_outside_of_the_schedule_is_refused(schedule: Schedule, start: float) -> None:
    with pytest.raises(ValueError, match="noisiest time"):
        schedule.grid(4, start)
    assert len(schedule.grid(4, 0.5)) == 5, "control"
