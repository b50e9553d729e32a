"""The noise times that a chain visits: from the top, from below it, and as the libraries do."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from genpolicy.models.mlp import MLP
from genpolicy.models.toy import Toy
from tests import lerobot_tiny, lerobot_tiny_vla
from tests.models import test_diffusers_pipeline as pipelines

STEPS = 10
FAMILIES = pipelines.FAMILIES


def of_own_library(family: str) -> torch.Tensor:
    """The times that a plain pipeline of the family visits, seen from outside: what its scheduler
    is left with after a call, as noise times with the end.
    """
    pipeline = pipelines.plain(pipelines.saved(family))
    call = {**pipelines.tiny.CALL[family], "num_inference_steps": STEPS}
    pipeline(pipelines.PROMPTS[0], output_type="latent", **call)
    if family in pipelines.FLOWS:
        return pipeline.scheduler.sigmas.double()
    levels = pipeline.scheduler.timesteps.double() + 1
    return torch.cat([levels, levels.new_zeros(1)]) / 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_grid_is_what_the_pipelines_own_call_visits(family: str) -> None:
    grid = pipelines.learner(family).native_grid(STEPS)
    assert grid.dtype == torch.float64
    assert torch.equal(grid, of_own_library(family))
    assert float(grid[-1]) == 0
    assert bool((grid.diff() < 0).all())


def test_sd3s_native_grid_is_shifted_twice_and_ours_is_not() -> None:
    model = pipelines.learner("sd3")
    native, ours = model.native_grid(STEPS), model.grid(STEPS)
    u = np.linspace(1, 3 * 0.001 / (1 + 2 * 0.001), STEPS)
    expected = torch.tensor([*(3 * u / (1 + 2 * u)), 0.0])
    torch.testing.assert_close(native, expected, rtol=0, atol=1e-6)
    assert native[-2] == pytest.approx(0.0089, abs=1e-4)
    assert ours[-2] == pytest.approx(0.25)
    assert (native - ours).abs().max() > 0.05


def test_fluxs_native_grid_has_the_shift_of_its_resolution() -> None:
    """A scheduler that is asked without the pipeline's mu is another grid."""
    model = pipelines.learner("flux")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        model.pipeline.scheduler.config
    )
    grids = []
    for tokens in (model.event_shape[0], 16 * model.event_shape[0]):
        mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=mu)
        grids.append(scheduler.sigmas.double())
    assert torch.equal(model.native_grid(STEPS), grids[0])
    assert not torch.allclose(model.native_grid(STEPS), grids[1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipelines_grid_may_start_below_the_top(family: str) -> None:
    model = pipelines.learner(family)
    for start in (0.6, 0.05):
        grid = model.grid(4, start)
        assert grid[0] == pytest.approx(start)
        assert grid[-1] == 0
        assert bool((grid.diff() < 0).all())
    if family == "ltx":
        assert model.grid(4, 0.6)[-2] == pytest.approx(0.1)  # its shift_terminal
    torch.testing.assert_close(model.grid(4, 1.0)[0], torch.tensor(1.0, dtype=torch.float64))
    if family in pipelines.FLOWS:
        torch.testing.assert_close(model.grid(4, 1.0), model.grid(4))


@pytest.mark.parametrize("model", [MLP(family="vp"), MLP(family="flow"), Toy(), Toy(family="vp")])
def test_our_own_networks_have_one_grid(model: Any) -> None:
    assert torch.equal(model.native_grid(5), model.grid(5))
    assert torch.equal(model.grid(5, 0.5), model.schedule.grid(5, 0.5))
    assert model.grid(5, 0.5)[0] == pytest.approx(0.5)
    assert model.grid(5)[0] == 1


def test_lerobots_diffusion_grids() -> None:
    for spacing in ("trailing", "lerobot"):
        model = lerobot_tiny.diffusion(lerobot_tiny.STATE, lerobot_tiny.WORLD, spacing=spacing)
        model._scheduler.set_timesteps(4)
        visited = [*(model._scheduler.timesteps.double() + 1) / 100, 0]
        assert torch.equal(model.native_grid(4), torch.tensor(visited, dtype=torch.float64))
        assert (model.grid(4, 0.4) * 100).tolist() == pytest.approx([40, 30, 20, 10, 0])
        assert torch.equal(model.grid(4), model.native_grid(4)) == (spacing == "lerobot")


def test_lerobots_flows_take_uniform_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from genpolicy.models.lerobot_flow import LeRobotFlow

    model = LeRobotFlow(str(lerobot_tiny_vla.saved("smolvla")), device="cpu")
    seen: list[float] = []
    own = model.policy.model.denoise_step

    def spied(*args: Any, **named: Any) -> torch.Tensor:
        seen.append(float(named["timestep"][0]))
        return own(*args, **named)

    monkeypatch.setattr(model.policy.model, "denoise_step", spied)
    batch = {n: v[:, -1] for n, v in lerobot_tiny_vla.observation(1).items()}
    with torch.no_grad():
        made = model.processors.pre({**batch, "task": [lerobot_tiny_vla.PROMPTS[0]]})
        model.policy.predict_action_chunk(made)
    assert seen == pytest.approx(model.native_grid(lerobot_tiny_vla.STEPS)[:-1].tolist())
    assert model.grid(3, 0.6).tolist() == pytest.approx([0.6, 0.4, 0.2, 0.0])
