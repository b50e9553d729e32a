"""The chain's coefficients are looked up once:
equal to the bit to looking them up at every step, for every row.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from genpolicy.chain import (
    CPS,
    DDIM,
    EDM,
    SDE,
    Chain,
    ClipStd,
    Consistency,
    FloorStd,
    Gaussian,
    Linear,
    Mean,
    Prediction,
    Trajectory,
    VariancePreserving,
)
from genpolicy.chain.kernel import Kernel
from genpolicy.chain.noise import PRIOR
from genpolicy.chain.schedule import Schedule, Step
from genpolicy.chain.values import Denoiser, expand
from tests.chain.exact import Network, Rows, batch, cosine

EVENT, K = (3, 2), 6
ALPHA_BAR = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)
SCHEDULES: dict[str, Schedule] = {
    "vp": VariancePreserving(ALPHA_BAR),
    "vp with an end of its own": VariancePreserving(ALPHA_BAR, final_alpha_bar=0.999),
    "cosine": cosine(),
    "linear": Linear(3.0),
    "edm": EDM(),
}
KERNELS: list[Kernel] = [
    DDIM(0.0),
    DDIM(0.7),
    FloorStd(ClipStd(DDIM(1.0), 0.05, 0.3), 0.1),
    FloorStd(ClipStd(DDIM(1.0), 0.05, 0.3, consistent=False), 0.1, consistent=False),
    Consistency(),
    CPS(0.8),
    Mean(DDIM(1.0)),
]
CASES = [
    *((name, kernel) for name in SCHEDULES for kernel in KERNELS),
    *(("linear", kernel) for kernel in (SDE(0.7), SDE(0.3, "constant"), Mean(SDE(0.7)))),
]


@dataclass(frozen=True)
class Plain:
    """A variance-preserving schedule that takes its roots at every lookup."""

    table: VariancePreserving

    def alpha_bar(self, t: Tensor) -> Tensor:
        final = torch.tensor([self.table.final_alpha_bar], dtype=torch.float64)
        levels = torch.cat([final, self.table.alpha_bar.double()])
        return levels[(t * len(self.table.alpha_bar)).round().long()]

    def alpha(self, t: Tensor) -> Tensor:
        return self.alpha_bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha_bar(t)).sqrt()


def every_time(chain: Chain, denoiser: Denoiser, x: Tensor, k: int | Tensor, c: Rows) -> Gaussian:
    """The transition of step k with every coefficient looked up, for every row, there and then."""
    table = chain.schedule
    schedule = Plain(table) if isinstance(table, VariancePreserving) else table
    if isinstance(k, int):
        t, s = chain.grid[k].expand(len(x)), chain.grid[k + 1].expand(len(x))
    else:
        t, s = chain.grid[k], chain.grid[k + 1]
    here = Step(t, s, schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s))
    low, high = chain.window if chain.window is not None else (0, chain.K - 1)
    inside = bool(((torch.as_tensor(k) >= low) & (torch.as_tensor(k) < high)).all())
    jumps = isinstance(chain.kernel, Consistency) and bool((s == 0).all())
    found = (chain.kernel if inside or jumps else DDIM(0.0)).coefficients(here)
    said = denoiser(x, t, c)
    mean = expand(found.x0, x) * said.x0 + expand(found.eps, x) * said.eps
    if bool((found.x != 0).any()):
        mean = mean + expand(found.x, x) * x
    return Gaussian(mean, expand(found.std, x))


def denoiser(schedule: Schedule) -> Denoiser:
    """A network that says a velocity, and its eps by the schedule's own alpha and sigma at t."""
    network = Network(EVENT)

    def predict(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        x0 = network(x, t, condition).x0.clamp(-2, 2)
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return predict


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("window", [(0, K), (1, 4), None], ids=str)
@pytest.mark.parametrize(("name", "kernel"), CASES, ids=str)
def test_sampling_is_equal_to_the_bit_to_looking_up_at_every_step(
    name: str, kernel: Kernel, window: tuple[int, int] | None, rows: int
) -> None:
    schedule = SCHEDULES[name]
    chain = Chain(schedule, schedule.grid(K), kernel, window)
    network, (condition, noise) = denoiser(schedule), batch(rows, 1)
    with torch.no_grad():
        once = chain.sample(network, condition, noise, EVENT, keep=(0, K))
        t = chain.grid[:1]
        scale = float((schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).sqrt())
        x = torch.full((rows, 1, 1), scale) * noise(PRIOR, EVENT)
        for k in range(K):
            assert torch.equal(once.before(k), x)
            gaussian = every_time(chain, network, x, k, condition)
            assert torch.equal(once.acted(k).mean, gaussian.mean)
            assert torch.equal(once.acted(k).std, gaussian.std)
            inside = k in chain.stochastic and bool((gaussian.std > 0).any())
            x = gaussian.sample(noise(k, EVENT)) if inside else gaussian.mean
        assert torch.equal(once.x0, x)


@pytest.mark.parametrize(("name", "kernel"), CASES, ids=str)
def test_steps_of_each_rows_own_are_equal_to_the_bit(name: str, kernel: Kernel) -> None:
    schedule = SCHEDULES[name]
    chain = Chain(schedule, schedule.grid(K), kernel, window=(1, 5))
    network, (condition, noise) = denoiser(schedule), batch(20, 1)
    k = 1 + torch.arange(20) % 4
    trajectory = chain.sample(network, condition, noise, EVENT)
    once = chain.transition(network, trajectory, k)
    reference = every_time(chain, network, trajectory.before(k), k, condition)
    assert torch.equal(once.mean, reference.mean)
    assert torch.equal(once.std, reference.std)
    wrong = every_time(chain, network, trajectory.before(k), k.roll(1), condition)
    assert not torch.equal(once.mean, wrong.mean)  # control: the step matters


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_is_what_the_schedule_says(name: str) -> None:
    schedule = SCHEDULES[name]
    chain, k = Chain(schedule, schedule.grid(K)), torch.tensor([4, 0, 2, 2])
    plain = Plain(schedule) if isinstance(schedule, VariancePreserving) else schedule
    for here, at in ((chain.step(k, 4), k), (chain.step(3, 2), torch.tensor([3, 3]))):
        t, s = chain.grid[at], chain.grid[at + 1]
        wanted = (t, s, plain.alpha(t), plain.sigma(t), plain.alpha(s), plain.sigma(s))
        assert all(torch.equal(a, b) for a, b in zip(vars(here).values(), wanted, strict=True))


def test_times_of_tokens_are_looked_up_with_the_rest() -> None:
    """grid [K+1,T]: every token of a row has a time of its own."""
    grid = torch.stack([Linear().grid(K), Linear(3.0).grid(K), Linear(5.0).grid(K)], 1)
    chain, network = Chain(Linear(), grid, DDIM(1.0)), denoiser(Linear())

    def by_token(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        assert t.shape == (4, 3)
        return network(x, t[:, 0], condition)

    condition, noise = batch(4, 1)
    trajectory = chain.sample(by_token, condition, noise, EVENT)
    for k in trajectory.steps:
        own = torch.full((4,), k)
        again = chain.transition(by_token, trajectory, own)
        reference = every_time(chain, by_token, trajectory.before(k), own, condition)
        assert trajectory.acted(k).std.shape == (4, 3, 1)
        for found in (again, trajectory.acted(k)):
            assert torch.equal(found.mean, reference.mean)
            assert torch.equal(found.std, reference.std)


def same(a: Trajectory, b: Trajectory) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("x", "mean", "std", "x0"))


def test_another_window_or_kernel_sees_nothing_of_the_old_one() -> None:
    schedule = SCHEDULES["vp"]
    network, (condition, noise) = denoiser(schedule), batch(4, 1)
    used = Chain(schedule, schedule.grid(K), DDIM(1.0), window=(0, K))

    def sample(chain: Chain) -> Trajectory:
        return chain.sample(network, condition, noise, EVENT, keep=(0, K))

    first = sample(used)
    for change in ({"window": (2, 4)}, {"kernel": DDIM(0.3)}, {"grid": schedule.grid(K, 0.8)}):
        changed = sample(replace(used, **change))
        settings = {"kernel": used.kernel, "window": used.window, "grid": used.grid} | change
        assert same(changed, sample(Chain(schedule, **settings)))
        assert not same(changed, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_handed_out_may_be_changed_in_place(dtype: torch.dtype) -> None:
    """The denoiser's times, a step, and a Gaussian's std are copies, of one row too."""
    schedule = Linear()
    chain = Chain(schedule, schedule.grid(K).to(dtype), DDIM(1.0), window=(0, K))
    network, (condition, noise) = denoiser(schedule), batch(1, 1)

    def careless(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        said = network(x, t, condition)
        t.zero_()
        return said

    first = chain.sample(careless, condition, noise, EVENT)
    for k in first.steps:
        gaussian = chain.transition(careless, first, k)
        for value in (gaussian.std, gaussian.mean.detach(), *vars(chain.step(k, 1)).values()):
            value.zero_()
    assert same(first, chain.sample(careless, condition, noise, EVENT))
