"""Warm starts against closed forms: contraction, lag, flips, and what relabelling is and isn't."""

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDPMScheduler

from genpolicy.chain import (
    DDIM,
    EDM,
    RTI,
    Chain,
    Heun,
    Linear,
    Mean,
    Noise,
    Prediction,
    SDEdit,
    VariancePreserving,
)
from genpolicy.chain.contraction import choose_levels, contraction, contractions
from genpolicy.chain.warm_start import shifted
from tests.chain.exact import Data, Rows, cosine

SCHEDULER = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=False)
VP = VariancePreserving(SCHEDULER.alphas_cumprod.double())
DDPM, MEAN = (Chain(VP, VP.grid(100), kernel) for kernel in (DDIM(1.0), Mean(DDIM(1.0))))
CAN = [40, 35, 30, 25, 20, 17, 15, 12, 10, 8, 5, 3, 2, 1, 0]
LISTS = [[2, 1, 0], [5, 3, 2, 1, 0], list(range(15, -1, -1)), CAN, list(range(99, -1, -1))]
TABLE = {
    0.02: [0.107, 0.050, 0.006, 0.016, 0.0],
    0.05: [0.427, 0.244, 0.035, 0.083, 0.0],
    0.10: [0.750, 0.554, 0.127, 0.215, 0.0],
    0.30: [0.966, 0.918, 0.576, 0.570, 0.0],
    1.00: [0.998, 0.996, 0.966, 0.939, 0.0005],
}
"""J of every list for data of std s, from an evaluation of the formulas that is not this code's."""


def names(rows=1):
    return Noise.rows(0, 0, torch.arange(rows), 1)


def replanned(warm, chain, guess, denoiser, noise=None):
    """The next plan from a guess [B,T,D]."""
    rows = Rows(torch.zeros(len(guess)))
    return warm.replan(chain, denoiser, rows, noise or names(len(guess)), guess).x0


def constant(value, rows=1):
    return torch.full((rows, 1, 1), float(value), dtype=torch.float64)


# -- contraction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("s", TABLE)
def test_the_contraction_is_the_tables(s):
    assert [contraction(DDPM, levels, s) for levels in LISTS] == pytest.approx(TABLE[s], abs=1e-3)


@pytest.mark.parametrize("levels", LISTS[:4])
def test_the_plan_moves_by_J_times_the_guess(levels):
    data = Data(0.3, 0.1)
    high, low = (
        replanned(RTI(levels), MEAN, constant(at), data.denoiser(VP)) for at in (0.5, -0.5)
    )
    assert float(high - low) == pytest.approx(contraction(MEAN, levels, 0.1), abs=1e-6)


@pytest.mark.parametrize("schedule", [VP, Linear(), EDM()], ids=["vp", "flow", "edm"])
def test_sdedit_moves_by_its_own_contraction(schedule):
    chain, data = Chain(schedule, schedule.grid(20), DDIM(0.0)), Data(0.3, 0.1)
    warm = SDEdit(6)
    high, low = (
        replanned(warm, chain, constant(at), data.denoiser(schedule)) for at in (0.5, -0.5)
    )
    assert float(high - low) == pytest.approx(warm.contraction(chain, 0.1), abs=1e-5)


@pytest.mark.parametrize(
    ("s", "levels"), [(0.02, [2, 1, 0]), (0.05, [2, 1, 0]), (0.05, [5, 4, 3, 2, 1, 0])]
)
def test_behind_a_target_that_moves_by_v_it_stays_J_through_1_minus_J(s, levels):
    v, J = 0.001, contraction(MEAN, levels, s)
    plan = constant(-0.2)
    for tick in range(-200, 1):  # the target passes 0 at the end, where alpha * 0 is 0
        plan = replanned(RTI(levels), MEAN, plan, Data(v * tick, s).denoiser(VP))
    assert float(-plan) / v == pytest.approx(J / (1 - J), rel=1e-2)


def test_the_levels_are_the_shortest_list_that_contracts_enough():
    for s in (0.02, 0.05, 0.1, 0.3):
        levels = choose_levels(DDPM, s, 0.3)
        assert levels == list(range(len(levels)))[::-1]
        assert contraction(DDPM, levels, s) <= 0.3 < contraction(DDPM, levels[1:], s)
    assert choose_levels(DDPM, 0.02, 0.9) == [0]


def test_a_sampler_that_never_contracts_enough_is_said():
    ode = Chain(VP, VP.grid(100), DDIM(0.0))
    with pytest.raises(ValueError, match="all 100 levels together contract"):
        choose_levels(ode, 1.0, 0.3)


def test_the_levels_of_a_chain_of_ten_steps_are_its_own():
    """A level of ten contracts more than one of a hundred: the list of the table is another one."""
    ten = Chain(VP, VP.grid(10), DDIM(1.0))
    assert contractions(ten, 0.1)[-1] < contractions(DDPM, 0.1)[-1]
    assert len(choose_levels(ten, 0.1)) < len(choose_levels(DDPM, 0.1))


# -- relabelling -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn(Noise):
    """The numbers that diffusers' scheduler draws from a generator, in its order."""

    generator: torch.Generator | None = None

    def __call__(self, k, shape, device="cpu"):
        return torch.randn((len(self), *shape), generator=self.generator)


def test_rti_is_the_ddpm_schedulers_step_at_every_listed_level_noise_included():
    levels, guess, data = [40, 25, 10, 3, 1, 0], torch.linspace(-1, 1, 8).view(2, 2, 2), Data()
    SCHEDULER.set_timesteps(100)
    x, generator = guess, torch.Generator().manual_seed(1)
    for level in levels:
        t = torch.full((2,), (level + 1) / 100, dtype=torch.float64)
        eps = data.denoiser(VP)(x, t, Rows(t)).eps
        x = SCHEDULER.step(eps, level, x, generator=generator).prev_sample
    noise = Drawn(0, 0, torch.arange(2), torch.zeros(2), None, torch.Generator().manual_seed(1))
    found = replanned(RTI(levels), DDPM, guess, data.denoiser(VP), noise)
    assert float((found - x).abs().max()) < 1e-5
    still = replanned(RTI(levels), MEAN, guess, data.denoiser(VP), noise)
    assert float((still - x).abs().max()) > 1e-2, "control: without its noise it is another number"


def test_ddim_on_the_same_list_is_another_algorithm():
    """DDIM stretches a step from each entry to the next one; RTI takes one level's step and calls
    the result a plan at the next entry."""
    levels, data = [40, 20, 10, 0], Data(0.5, 0.1)
    times = torch.tensor([*[(level + 1) / 100 for level in levels], 0.0], dtype=torch.float64)
    ddim = Chain(VP, times, DDIM(0.0))
    guess, ends = constant(-0.5), []
    for chain, steps in ((MEAN, [99 - level for level in levels]), (ddim, range(4))):
        rows = Rows(torch.zeros(1))
        ends.append(chain.relabelled(data.denoiser(VP), rows, names(), guess, list(steps)).x0)
    assert float(ends[1] - ends[0]) > 0.3
    consecutive = RTI([3, 2, 1, 0])
    same = Chain(VP, VP.grid(100)[96:], Mean(DDIM(1.0)))
    walked = same.relabelled(data.denoiser(VP), Rows(torch.zeros(1)), names(), guess, range(4)).x0
    again = replanned(consecutive, MEAN, guess, data.denoiser(VP))
    assert torch.equal(walked, again), "control: on consecutive levels the two are one chain"


def test_the_plan_is_shifted_by_what_was_carried_out_and_its_last_action_repeated():
    plan = torch.arange(8.0).view(1, 4, 2)
    assert shifted(plan, 1)[0].tolist() == [[2, 3], [4, 5], [6, 7], [6, 7]]
    assert shifted(plan, 4)[0].tolist() == [[6, 7]] * 4


# -- discrete dims ---------------------------------------------------------------------------------


def gripper(size, s=0.02, rare=1e-3):
    """The denoiser of a dim that is +size almost surely, and -size with probability ``rare``."""

    def predict(x, t, condition):
        alpha, sigma = (part(t).view(-1, 1, 1) for part in (VP.alpha, VP.sigma))
        variance = alpha**2 * s**2 + sigma**2
        modes = torch.tensor([size, -size], dtype=torch.float64)
        log = torch.tensor([1 - rare, rare], dtype=torch.float64).log()
        away = x[..., None] - alpha[..., None] * modes
        weight = (log - away**2 / (2 * variance[..., None])).softmax(-1)
        x0 = (weight * (modes + (alpha * s**2 / variance)[..., None] * away)).sum(-1)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return predict


def ticks(size, levels, most=20):
    """Decisions until a plan at -size has come to +size; None if it does not."""
    warm, plan = RTI(levels, discrete_dims=[0], factor=1 / size), constant(-size)
    for tick in range(most):
        plan = replanned(warm, MEAN, plan, gripper(size))
        if float(warm.carried_out(plan)) > 0:
            return tick + 1
    return None


def test_a_gripper_of_1_flips_from_a_high_level_only_and_one_of_a_tenth_from_a_low_one():
    assert ticks(1.0, [5, 3, 1, 0]) is None
    assert ticks(0.1, [5, 3, 1, 0]) == 1
    assert ticks(1.0, list(range(20, -1, -1))) is None
    assert ticks(1.0, list(range(60, -1, -1))) == 1


def test_clip_writes_signs_into_the_guess_and_scale_into_what_is_carried_out_alone():
    seen = []

    def watched(x, t, condition):
        seen.append(x.clone())
        return Prediction(x, torch.zeros_like(x))

    plan = torch.tensor([[[0.3, 0.2], [-0.3, -0.2]]], dtype=torch.float64)
    clip = RTI([0], discrete_dims=[1], factor=10.0)
    replanned(clip, MEAN, plan, watched)
    replanned(RTI([0], discrete_dims=[1], discrete="scale"), MEAN, plan, watched)
    assert seen[0].flatten().tolist() == pytest.approx([0.3, 0.1, -0.3, -0.1])
    assert torch.equal(seen[1], plan)
    assert clip.carried_out(plan)[0].tolist() == [[0.3, 1.0], [-0.3, -1.0]]


# -- SDEdit ----------------------------------------------------------------------------------------


def test_sdedit_of_no_step_returns_the_guess_and_of_all_steps_a_sample_from_the_prior():
    schedule, data = cosine(), Data()
    chain = Chain(schedule, schedule.grid(16), DDIM(1.0))
    guess, noise = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)), names(5)
    assert torch.equal(replanned(SDEdit(0), chain, guess, data.denoiser(schedule), noise), guess)
    rows = Rows(torch.zeros(5))
    drawn = chain.sample(data.denoiser(schedule), rows, noise, (2, 3)).x0
    whole = replanned(SDEdit(16), chain, guess, data.denoiser(schedule), noise)
    assert torch.allclose(whole, drawn, atol=1e-5), "this schedule forgets all at its noisiest"
    less = replanned(SDEdit(8), chain, guess, data.denoiser(schedule), noise)
    assert float((less - drawn).abs().max()) > 1e-2


@pytest.mark.parametrize("schedule", [VP, Linear()], ids=["vp", "flow"])
def test_sdedit_begins_with_the_marginal_of_its_level(schedule):
    chain, rows = Chain(schedule, schedule.grid(20), DDIM(0.0)), 4000
    guess = torch.full((rows, 1, 1), 0.7)
    warm, denoise = SDEdit(8), Data().denoiser(schedule)
    begun = warm.replan(chain, denoise, Rows(torch.zeros(rows)), names(rows), guess).start
    t = chain.grid[12]
    assert float(begun.mean()) == pytest.approx(0.7 * float(schedule.alpha(t)), abs=0.02)
    assert float(begun.std()) == pytest.approx(float(schedule.sigma(t)), rel=0.04)


def test_from_data_sdedit_keeps_the_datas_distribution_and_rti_does_not():
    """A relabelled plan lacks the noise that its level should have."""
    data, rows = Data(0.0, 0.5), 4000
    guess = 0.5 * names(rows)(7, (1, 1))
    kept = replanned(
        SDEdit(40), Chain(VP, VP.grid(100), DDIM(0.0)), guess, data.denoiser(VP), names(rows)
    )
    levels = list(range(39, -1, -1))
    narrow = replanned(RTI(levels), MEAN, guess, data.denoiser(VP), names(rows))
    assert float(kept.std()) == pytest.approx(0.5, rel=0.04)
    assert float(narrow.std()) < 0.3
    assert math.isclose(float(narrow.std()), 0.5 * contraction(MEAN, levels, 0.5), rel_tol=0.05)


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warm", "chain", "best_of", "said"),
    [
        (RTI([1, 0]), Chain(Linear(), Linear().grid(10)), 1, "use sdedit on this policy"),
        (RTI([1, 0]), DDPM, 4, "all candidates would begin as the same guess"),
        (RTI([1, 0]), Chain(VP, VP.grid(10), Heun()), 1, "a solver has none"),
        (RTI([]), DDPM, 1, "fall from at most 99"),
        (RTI([2, 1]), DDPM, 1, "to 0"),
        (RTI([0, 1]), DDPM, 1, "to 0"),
        (RTI([2, 2, 0]), DDPM, 1, "must fall"),
        (RTI([100, 0]), DDPM, 1, "fall from at most 99"),
        (RTI([0], discrete_dims=[2]), DDPM, 1, "dims are 0 to 1"),
        (RTI([0], discrete_dims=[0], factor=0.0), DDPM, 1, "must be above 0"),
        (SDEdit(101), DDPM, 1, "has 0 to 100"),
    ],
)
def test_what_does_not_fit_is_one_sentence(warm, chain, best_of, said):
    with pytest.raises(ValueError, match=said):
        warm.require_fit(chain, (4, 2), best_of)


def test_sdedit_fits_every_schedule_and_several_candidates():
    for schedule in (VP, Linear(), EDM()):
        SDEdit(5).require_fit(Chain(schedule, schedule.grid(10)), (4, 2), 16)


def test_sdedit_goes_through_a_solver_as_through_its_ode():
    heun, ode = (Chain(VP, VP.grid(20), kernel) for kernel in (Heun(), DDIM(0.0)))
    warm, guess = SDEdit(5), constant(0.4)
    warm.require_fit(heun, (1, 1), 1)
    assert warm.contraction(heun, 0.1) == warm.contraction(ode, 0.1)
    ends = [float(replanned(warm, c, guess.float(), Data().denoiser(VP))) for c in (heun, ode)]
    assert ends[0] == pytest.approx(ends[1], abs=0.1)
    assert torch.equal(
        replanned(SDEdit(0), heun, guess.float(), Data().denoiser(VP)), guess.float()
    )
