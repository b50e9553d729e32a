"""Kernels and solvers against diffusers' own schedulers over whole grids, and against published
formulas.

Every deviation is max |ours - theirs| / max |theirs| of a step.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from genpolicy.chain import (
    CPS,
    DDIM,
    EDM,
    SDE,
    ClipX0,
    Consistency,
    DPMSolver,
    Heun,
    Linear,
    Prediction,
    VariancePreserving,
)
from genpolicy.chain.kernel import Kernel
from genpolicy.chain.schedule import Schedule, Step, dynamic_shift, step
from genpolicy.chain.values import Parametrisation, expand, output_gain
from tests.chain.exact import Rows, gain, relative, transition

SHAPE = (3, 4, 8, 8)
SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
SD |= {"set_alpha_to_one": False, "steps_offset": 1}
ROBOT = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
VP_KINDS: tuple[Parametrisation, ...] = ("epsilon", "sample", "v_prediction")
ALL = Rows(torch.zeros(SHAPE[0]))


def draws(seed: int, count: int = 3) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(SHAPE, generator=generator) for _ in range(count))


def table(
    scheduler: DDIMScheduler | DDPMScheduler | CogVideoXDDIMScheduler, final: float | None = None
) -> VariancePreserving:
    end = float(getattr(scheduler, "final_alpha_cumprod", 1.0)) if final is None else final
    return VariancePreserving(scheduler.alphas_cumprod, end)


def between(schedule: Schedule, t: float, s: float) -> Step:
    rows = torch.ones(SHAPE[0], dtype=torch.float64)
    return step(schedule, t * rows, s * rows)


def predict(
    kind: Parametrisation, output: Tensor, x: Tensor, here: Step, clip: ClipX0 | None = None
) -> Prediction:
    """The prediction of the network at this step, through ``clip`` where the family clips."""
    prediction = Prediction.of(kind, output, x, here.alpha_t, here.sigma_t)
    if clip is None:
        return prediction
    return ClipX0(lambda *_: prediction, clip.schedule, clip.bound, clip.recompute_eps)(
        x, here.t, ALL
    )


def walk(
    scheduler: DDIMScheduler | DDPMScheduler | CogVideoXDDIMScheduler,
) -> Iterator[tuple[int, float, float]]:
    """(level, t, s) of every step of a discrete scheduler; after the last level comes t = 0."""
    levels = [*scheduler.timesteps.tolist(), -1]
    count = len(scheduler.alphas_cumprod)
    for level, following in pairwise(levels):
        yield level, (level + 1) / count, (following + 1) / count


def ddim_deviation(
    settings: dict,
    steps: int,
    kind: Parametrisation,
    kernel: DDIM,
    *,
    eta: float,
    recompute: bool = False,
    final: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> float:
    scheduler = DDIMScheduler(**settings, prediction_type=kind)
    scheduler.set_timesteps(steps)
    schedule = table(scheduler, final)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    clip = ClipX0(lambda *_: None, schedule, 1.0, recompute) if settings["clip_sample"] else None
    worst = 0.0
    for level, t, s in walk(scheduler):
        x, output, noise = draws(level)
        added = noise.to(dtype) if eta else None
        theirs = scheduler.step(
            output.to(dtype), level, x.to(dtype), eta=eta, variance_noise=added
        ).prev_sample
        here = between(schedule, t, s)
        ours = transition(kernel, x, predict(kind, output, x, here, clip), here).sample(noise)
        worst = max(worst, relative(ours, theirs))
    return worst


PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-6)]
"""The precision of diffusers' coefficients, and the tolerance: as shipped, diffusers rounds them to
fp32; in fp64, on the same table, our rounding is left.
"""


@pytest.mark.parametrize(("dtype", "error"), PRECISIONS, ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", VP_KINDS)
@pytest.mark.parametrize(
    ("settings", "steps"), [(SD, 20), (SD, 50), (ROBOT, 10), (ROBOT, 50)], ids=str
)
def test_ddim_is_diffusers(
    settings: dict, steps: int, kind: Parametrisation, eta: float, dtype: torch.dtype, error: float
) -> None:
    assert ddim_deviation(settings, steps, kind, DDIM(eta), eta=eta, dtype=dtype) <= error


def test_ddim_control_wrong_eta() -> None:
    assert ddim_deviation(SD, 20, "epsilon", DDIM(0.9), eta=1.0) > 1e-2


def test_ddim_control_wrong_end() -> None:
    """SD ends at alpha_bar[0], not at 1."""
    assert ddim_deviation(SD, 20, "epsilon", DDIM(0.0), eta=0.0, final=1.0) > 1e-2


def test_ddim_control_recomputing_eps_from_the_clipped_x0() -> None:
    assert ddim_deviation(ROBOT, 10, "epsilon", DDIM(0.0), eta=0.0, recompute=True) > 0.5


def ddpm_deviation(
    kind: Parametrisation,
    steps: int,
    *,
    clip_sample: bool,
    recompute: bool = True,
    dtype: torch.dtype = torch.float64,
) -> float:
    settings = ROBOT | {
        "clip_sample": clip_sample,
        "variance_type": "fixed_small",
        "prediction_type": kind,
    }
    scheduler = DDPMScheduler(**settings)
    scheduler.set_timesteps(steps)
    schedule = table(scheduler)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    clip = ClipX0(lambda *_: None, schedule, 1.0, recompute) if clip_sample else None
    worst = 0.0
    for level, t, s in walk(scheduler):
        x, output = draws(level, 2)
        generators = (torch.Generator().manual_seed(7) for _ in range(2))
        theirs = scheduler.step(
            output.to(dtype), level, x.to(dtype), generator=next(generators)
        ).prev_sample
        noise = torch.randn(SHAPE, generator=next(generators), dtype=dtype)
        here = between(schedule, t, s)
        ours = transition(DDIM(1.0), x, predict(kind, output, x, here, clip), here).sample(
            noise.float()
        )
        worst = max(worst, relative(ours, theirs))
    return worst


@pytest.mark.parametrize(("dtype", "error"), PRECISIONS, ids=str)
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("kind", VP_KINDS)
@pytest.mark.parametrize("steps", [10, 100])
def test_ddpm_is_diffusers(
    kind: Parametrisation, steps: int, clip_sample: bool, dtype: torch.dtype, error: float
) -> None:
    assert ddpm_deviation(kind, steps, clip_sample=clip_sample, dtype=dtype) <= error


def test_ddpm_control_keeping_eps_of_the_unclipped_x0() -> None:
    assert ddpm_deviation("epsilon", 10, clip_sample=True, recompute=False) > 0.5


def flow_euler(shift: str) -> tuple[FlowMatchEulerDiscreteScheduler, Tensor]:
    """The scheduler on 10 real steps, and our own grid for it."""
    if shift == "dynamic":
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10), mu=math.log(dynamic_shift(1024)))
        return scheduler, Linear(dynamic_shift(1024)).grid(10)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=float(shift))
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    return scheduler, Linear(float(shift)).grid(10)


@pytest.mark.parametrize("shift", ["1", "3", "dynamic"])
def test_flow_euler_is_diffusers(shift: str) -> None:
    scheduler, grid = flow_euler(shift)
    for k, timestep in enumerate(scheduler.timesteps):
        x, output = draws(k, 2)
        theirs = scheduler.step(output, timestep, x).prev_sample
        here = between(Linear(), float(grid[k]), float(grid[k + 1]))
        ours = transition(DDIM(0.0), x, predict("velocity", output, x, here), here).mean
        assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize("shift", ["1", "3", "dynamic"])
def test_consistency_is_diffusers_stochastic_flow_sampling(shift: str) -> None:
    scheduler, grid = flow_euler(shift)
    scheduler.register_to_config(stochastic_sampling=True)
    for k, timestep in enumerate(scheduler.timesteps):
        x, output = draws(k, 2)
        theirs = scheduler.step(
            output, timestep, x, generator=torch.Generator().manual_seed(k)
        ).prev_sample
        here = between(Linear(), float(grid[k]), float(grid[k + 1]))
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(k))
        ours = transition(Consistency(), x, predict("velocity", output, x, here), here).sample(
            noise
        )
        assert relative(ours, theirs) <= 1e-5


@pytest.mark.parametrize("steps", [10, 50])
def test_cogvideox_zero_snr_is_diffusers(steps: int) -> None:
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=1.0,
    )
    scheduler.set_timesteps(steps)
    schedule = table(scheduler)
    assert float(schedule.alpha(torch.ones(1))) == 0  # zero SNR: the first step divides by no alpha
    for (level, t, s), (ours_t, ours_s) in zip(
        walk(scheduler), schedule.grid(steps).unfold(0, 2, 1).tolist(), strict=True
    ):
        assert (t, s) == (ours_t, ours_s)
        x, output = draws(level, 2)
        theirs = scheduler.step(output, level, x).prev_sample
        here = between(schedule, t, s)
        ours = transition(DDIM(0.0), x, predict("v_prediction", output, x, here), here).mean
        assert relative(ours, theirs) <= 1e-5


def test_edm_euler_is_diffusers() -> None:
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(18)
    grid = EDM().grid(18)
    for k, timestep in enumerate(scheduler.timesteps):
        x, output = draws(k, 2)
        x = x * float(grid[k])
        x0 = scheduler.precondition_outputs(x, output, scheduler.sigmas[k])
        scheduler.scale_model_input(x, timestep)
        theirs = scheduler.step(output, timestep, x).prev_sample
        here = between(EDM(), float(grid[k]), float(grid[k + 1]))
        assert (
            relative(transition(DDIM(0.0), x, predict("sample", x0, x, here), here).mean, theirs)
            <= 1e-5
        )


# ---- solvers, over a whole chain with a network that is not linear


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(2 * x + 1) * (1 + expand(t, x)) - 0.3 * x


def flow_predict(x: Tensor, t: Tensor) -> Prediction:
    return Prediction.of("velocity", velocity(x, t), x, 1 - t, t)


def run(
    scheduler: FlowMatchHeunDiscreteScheduler | DPMSolverMultistepScheduler,
    x: Tensor,
    output: Callable,
) -> Tensor:
    """The scheduler's own loop, the network asked at the scheduler's own time."""
    for timestep in scheduler.timesteps:
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        x = scheduler.step(output(x, scheduler.step_index), timestep, x).prev_sample
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_is_diffusers_flow_heun(shift: float) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    grid = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    x = next(draws(0))
    theirs = run(scheduler, x, lambda x, i: velocity(x, scheduler.sigmas[i].expand(len(x))))
    ours = Heun().integrate(flow_predict, x, Linear(), grid)
    assert relative(ours, theirs) <= 1e-5
    assert relative(DPMSolver().integrate(flow_predict, x, Linear(), grid), theirs) > 1e-3


@pytest.mark.parametrize("steps", [6, 10, 20])
def test_dpm_solver_is_diffusers_on_flows(steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    x = next(draws(0))
    theirs = run(scheduler, x, lambda x, i: velocity(x, scheduler.sigmas[i].expand(len(x))))
    ours = DPMSolver().integrate(flow_predict, x, Linear(), scheduler.sigmas.double())
    assert relative(ours, theirs) <= 1e-5
    assert (
        relative(Heun().integrate(flow_predict, x, Linear(), scheduler.sigmas.double()), theirs)
        > 1e-3
    )


@pytest.mark.parametrize("steps", [10, 20])
def test_dpm_solver_is_diffusers_on_sd(steps: int) -> None:
    betas = {k: SD[k] for k in ("beta_schedule", "beta_start", "beta_end", "steps_offset")}
    scheduler = DPMSolverMultistepScheduler(**betas, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    schedule = VariancePreserving(scheduler.alphas_cumprod)
    grid = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)]).double()

    def predict_eps(x: Tensor, t: Tensor) -> Prediction:
        return Prediction.of("epsilon", velocity(x, t), x, schedule.alpha(t), schedule.sigma(t))

    x = next(draws(0))
    theirs = run(scheduler, x, lambda x, i: velocity(x, grid[i].expand(len(x))))
    assert relative(DPMSolver().integrate(predict_eps, x, schedule, grid), theirs) <= 1e-5


# ---- DDPO (papers/image_policy_gradients.md, 1)


@pytest.mark.parametrize(("offset", "std"), [(1, 0.0206), (0, 0.0)])
def test_ddpos_last_step(offset: int, std: float) -> None:
    scheduler = DDIMScheduler(**(SD | {"steps_offset": offset}))
    scheduler.set_timesteps(50)
    *_, (level, t, s) = walk(scheduler)
    assert level == offset
    here = between(table(scheduler), t, s)
    assert float(DDIM(1.0).std(here)[0]) == pytest.approx(
        std, abs=5e-5
    )  # .0206 is finite; 0 would be log 0
    x, output, _ = draws(0)
    gaussian = transition(DDIM(1.0), x, predict("epsilon", output, x, here), here)
    if offset == 0:
        with pytest.raises(ValueError, match="std 0"):
            gaussian.log_prob(x, reduce="mean")


# ---- Flow-GRPO, CPS and DanceGRPO, over the SD3 table of 2.3

SD3 = torch.tensor(
    [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0],
    dtype=torch.float64,
)


def sd3_sigmas() -> Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler.sigmas.double()


def test_sd3_table_is_diffusers_and_the_shift_map_and_not_our_grid() -> None:
    assert (sd3_sigmas() - SD3).abs().max() < 5e-5
    low = 0.003 / 1.002  # diffusers ends at the shifted .001, and shifts it again
    u = torch.linspace(1, low, 10, dtype=torch.float64)
    mapped = torch.stack([Linear(3.0).grid(1, start=float(3 * v / (1 + 2 * v)))[0] for v in u])
    assert (mapped - sd3_sigmas()[:-1]).abs().max() < 1e-6
    assert float(Linear(3.0).grid(10)[-2]) == pytest.approx(
        0.25
    )  # ours: .25 -> 0 is a real last step, not .0089 -> 0


Formula = Callable[[Tensor, Tensor, float, float], tuple[Tensor, float, float]]
"""(x, v, sigma, next sigma) -> (mu, total std, kappa = d mu / d v), in fp64."""


def flow_grpo(a: float) -> Formula:
    def formula(
        x: Tensor, v: Tensor, sigma: float, following: float
    ) -> tuple[Tensor, float, float]:
        delta = sigma - following
        g = a * math.sqrt(sigma / (1 - (following if sigma == 1 else sigma)))
        mu = (
            x * (1 - g**2 * delta / (2 * sigma))
            - v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * delta
        )
        kappa = delta if sigma == 1 else delta * (1 + a**2 / 2)
        return mu, g * math.sqrt(delta), -kappa

    return formula


def cps(a: float) -> Formula:
    def formula(
        x: Tensor, v: Tensor, sigma: float, following: float
    ) -> tuple[Tensor, float, float]:
        s = following * math.sin(a * math.pi / 2)
        root = math.sqrt(following**2 - s**2)
        mu = (1 - following) * (x - sigma * v) + root * (x + (1 - sigma) * v)
        return mu, s, root * (1 - sigma) - (1 - following) * sigma

    return formula


def dance(eta: float) -> Formula:
    def formula(
        x: Tensor, v: Tensor, sigma: float, following: float
    ) -> tuple[Tensor, float, float]:
        delta = sigma - following
        x0 = x - sigma * v
        score = -(x - (1 - sigma) * x0) / sigma**2
        mu = x - delta * v + eta**2 / 2 * score * delta
        return mu, eta * math.sqrt(delta), -delta * (1 + eta**2 * (1 - sigma) / (2 * sigma))

    return formula


PUBLISHED: list[tuple[Kernel, Formula]] = [
    (SDE(0.7), flow_grpo(0.7)),
    (SDE(1.0), flow_grpo(1.0)),
    (CPS(0.8), cps(0.8)),
    (SDE(0.3, "constant"), dance(0.3)),
]


@pytest.mark.parametrize(
    ("kernel", "formula"), PUBLISHED, ids=lambda v: str(v) if isinstance(v, CPS | SDE) else ""
)
@pytest.mark.parametrize("k", range(10))
def test_published_kernels(kernel: Kernel, formula: Formula, k: int) -> None:
    sigma, following = SD3[k : k + 2].tolist()
    x, v, _ = draws(k)
    here = between(Linear(), sigma, following)
    ours = transition(kernel, x, predict("velocity", v, x, here), here)
    mu, std, kappa = formula(x.double(), v.double(), sigma, following)
    assert relative(ours.mean, mu) <= 1e-6
    assert ours.std.flatten().tolist() == pytest.approx([std] * SHAPE[0], rel=1e-6)
    slope = gain(kernel, here, *output_gain("velocity", here.alpha_t, here.sigma_t))
    assert slope.tolist() == pytest.approx([kappa] * SHAPE[0], rel=1e-12)


@pytest.mark.parametrize("k", range(10))
def test_published_kernels_control(k: int) -> None:
    """g is not the std (s = g sqrt(delta)), and flow_grpo's g is not Dance's."""
    sigma, following = SD3[k : k + 2].tolist()
    here = between(Linear(), sigma, following)
    std = float(SDE(0.7).coefficients(here).std[0])
    g = 0.7 * math.sqrt(sigma / (1 - (following if sigma == 1 else sigma)))
    assert std != pytest.approx(g, rel=0.1)
    assert std != pytest.approx(float(SDE(0.7, "constant").coefficients(here).std[0]), rel=0.01)


def test_near_degenerate_step_of_the_sd3_table() -> None:
    """Table 2.3: the step .0089 -> 0 has std .0063 / .7 * a; it is why nobody trains it."""
    here = between(Linear(), float(SD3[9]), 0.0)
    assert float(SDE(0.7).coefficients(here).std[0]) == pytest.approx(0.0063, abs=1e-4)


@pytest.mark.parametrize("kernel", [SDE(0.0), SDE(0.0, "constant"), CPS(0.0), DDIM(0.0)], ids=str)
@pytest.mark.parametrize("k", range(10))
def test_without_noise_every_kernel_is_the_euler_ode(kernel: Kernel, k: int) -> None:
    sigma, following = SD3[k : k + 2].tolist()
    x, v, _ = draws(k)
    here = between(Linear(), sigma, following)
    ours = transition(kernel, x, predict("velocity", v, x, here), here)
    assert relative(ours.mean, x.double() + (following - sigma) * v.double()) <= 1e-6
    assert (ours.std == 0).all()


@pytest.mark.parametrize(
    "schedule",
    [EDM(), table(DDIMScheduler(**SD)), VariancePreserving(torch.linspace(0.99, 0, 100))],
    ids=["edm", "vp", "zero-snr"],
)
def test_sde_refuses_what_is_not_linear(schedule: Schedule) -> None:
    t, s = schedule.grid(10)[:2].tolist()
    with pytest.raises(ValueError, match="linear"):
        SDE(0.7).coefficients(between(schedule, t, s))
