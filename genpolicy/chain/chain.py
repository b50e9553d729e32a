"""The chain: sample it, and score the stored steps again through the very same transition."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from genpolicy.chain.kernel import DDIM, Consistency, Kernel
from genpolicy.chain.noise import PRIOR, Noise
from genpolicy.chain.prior import StandardNormal
from genpolicy.chain.schedule import Schedule, Step, step
from genpolicy.chain.solver import Solver
from genpolicy.chain.values import Coefficients, Condition, Denoiser, Gaussian

ODE = DDIM(eta=0.0)


@dataclass(frozen=True)
class Trajectory:
    """The record of B chains: the states around the kept steps ``first`` .. ``first + W - 1``,
    and the result.

    x [B,W+1,*E] (x[:, j] is the state before kept step j, x[:, j+1] after it), mean [B,W,*E] and
    std [B,W,*1 or *E] of the transitions that acted, x0 [B,*E] the final sample. ``shared`` = N
    says that the N consecutive rows of each group have the same x[:, 0]: it is evaluated once per
    group. ``start`` [B,*E] is x before the chain's first step, in fp32, as the prior drew it or as
    it was handed in; it is there whatever steps are kept, and None where whoever made the
    trajectory did not keep it. ``chain`` is the one that drew it, whose times and kernel its steps
    are scored with (`ChainPolicy.along`); None where whoever made the trajectory did not say.
    """

    condition: Condition
    x: Tensor
    mean: Tensor
    std: Tensor
    x0: Tensor
    first: int
    shared: int = 1
    start: Tensor | None = None
    chain: "Chain | None" = None

    def __len__(self) -> int:
        return len(self.x0)

    @property
    def steps(self) -> range:
        """The denoising indices k of the kept steps."""
        return range(self.first, self.first + self.mean.shape[1])

    def __getitem__(self, rows: slice | Tensor) -> "Trajectory":
        """A stretch of rows, or the rows of an index [b]; where a start is shared it must be a
        stretch of whole groups.
        """
        if isinstance(rows, slice):
            low, high, stride = rows.indices(len(self))
            if stride != 1 or low % self.shared or high % self.shared:
                raise ValueError(
                    f"rows {low}:{high}:{stride} skip rows or cut a group of {self.shared} that"
                    " shares its start"
                )
        elif self.shared > 1:
            raise ValueError(
                f"an index may cut a group of {self.shared} that shares its start: give a stretch"
                " of groups"
            )
        return replace(
            self,
            condition=self.condition[rows],
            x=self.x[rows],
            mean=self.mean[rows],
            std=self.std[rows],
            x0=self.x0[rows],
            start=None if self.start is None else self.start[rows],
        )

    @classmethod
    def cat(cls, parts: "Sequence[Trajectory]", condition: Condition) -> "Trajectory":
        """Chains that were drawn alike, one after the other, under the ``condition`` of all."""
        starts = [part.start for part in parts if part.start is not None]
        return replace(
            parts[0],
            condition=condition,
            **{
                name: torch.cat([getattr(part, name) for part in parts])
                for name in ("x", "mean", "std", "x0")
            },
            start=torch.cat(starts) if len(starts) == len(parts) else None,
        )

    def only(self, steps: range) -> "Trajectory":
        """The same chains with fewer kept steps; `ValueError` for one that was not kept."""
        for k in (steps.start, steps.stop - 1):
            self.acted(k)
        low, high = steps.start - self.first, steps.stop - self.first
        return replace(
            self,
            x=self.x[:, low : high + 1],
            mean=self.mean[:, low:high],
            std=self.std[:, low:high],
            first=steps.start,
            shared=self.shared if low == 0 else 1,
        )

    def acted(self, k: int | Tensor) -> Gaussian:
        """The Gaussian that acted at step k."""
        return Gaussian(self._at(self.mean, k), self._at(self.std, k))

    def before(self, k: int | Tensor) -> Tensor:
        """x before step k, [B,*E]: what the network saw. k may be each row's own, [B], here and
        below.
        """
        return self._at(self.x, k)

    def after(self, k: int | Tensor) -> Tensor:
        """x after step k, [B,*E]: the sample that the Gaussian of step k is scored on."""
        return self._at(self.x, k, 1)

    def _at(self, kept: Tensor, k: int | Tensor, ahead: int = 0) -> Tensor:
        asked = torch.as_tensor(k).reshape(-1)
        missing = asked[(asked < self.steps.start) | (asked >= self.steps.stop)]
        if len(missing):
            raise ValueError(
                f"step {int(missing[0])} was not kept: this trajectory has steps"
                f" {self.first}..{self.steps.stop - 1}"
            )
        place = k - self.first + ahead
        return kept[:, place] if isinstance(place, int) else kept[torch.arange(len(self)), place]


@dataclass(frozen=True)
class Chain:
    """Gaussian steps along ``grid`` [K+1]: ``kernel`` inside ``window`` = [low, high), the ODE
    outside.

    By default the last step is outside: it is taken at its mean and not trained (a method that
    trains it passes window=(0, K)). That mean is the ODE's, and of a consistency chain, in or
    outside its window, the jump. A `Solver` in the place of the kernel samples the whole grid
    and keeps no step.

    A grid may begin below the schedule's noisiest time (``schedule.grid(K, start=t)``). There x_t
    is no longer pure noise: alpha x_0 is a part of it, and the prior stands in for that part with
    noise of its size, N(0, ``scale``^2 I). This is the distribution of x_t exactly for Gaussian
    data of mean 0 and variance 1, and an approximation for other data that are standardised. A
    network that was trained to start elsewhere needs a ``prior`` that says so.

    finish: a solver that takes the steps behind the window together, in the place of the ODE's
    (MixGRPO-Flash, arXiv 2507.21802).
    """

    schedule: Schedule
    grid: Tensor
    kernel: Kernel | Solver = field(default_factory=DDIM)
    window: tuple[int, int] | None = None
    prior: StandardNormal = field(default_factory=StandardNormal)
    finish: Solver | None = None

    def __post_init__(self) -> None:
        low, high = self.stochastic.start, self.stochastic.stop
        if not 0 <= low <= high <= self.K:
            raise ValueError(
                f"window [{low}, {high}) does not lie inside the chain's {self.K} steps"
            )

    @property
    def K(self) -> int:
        """The number of denoising steps."""
        return len(self.grid) - 1

    @cached_property
    def scale(self) -> float:
        """sqrt(alpha^2 + sigma^2) at the first time (of the first token, where tokens have their
        own): the std that the prior starts with, and that of x_t for data of mean 0 and variance 1.

        It is 1 on VP from every time. On flows it is 1 from t = 1 and sqrt((1-t)^2 + t^2) below; on
        EDM it is sqrt(1 + t^2).
        """
        t = self.grid[:1].flatten()[:1]
        return float((self.schedule.alpha(t) ** 2 + self.schedule.sigma(t) ** 2).sqrt())

    @cached_property
    def stochastic(self) -> range:
        """The steps at which the kernel acts."""
        if isinstance(self.kernel, Solver):
            return range(0)
        return range(*self.window) if self.window is not None else range(self.K - 1)

    @cached_property
    def noisy(self) -> bool:
        """True where the kernel draws noise of its own at some step at which it acts."""
        return any(self.acting[k].noisy for k in self.stochastic)

    def below(self, t: Tensor) -> "Chain":
        """The same chain entered at noise time t (a scalar, above 0): t, then the times of the grid
        below it. The kernel acts at the steps that are left of its window.
        """
        later = self.grid[self.grid < t]
        if len(later) == self.K and bool(self.grid[0] == t):
            return self
        skipped = self.K - len(later)
        window = self.window and (
            max(self.window[0] - skipped, 0),
            max(self.window[1] - skipped, 0),
        )
        return replace(self, grid=torch.cat([t.view(1).to(later), later]), window=window)

    def step(self, k: int | Tensor, rows: int) -> Step:
        """The coefficients of step k (of each row's own, if k is [rows]) for a batch, from grid[k]
        to grid[k+1]: fp64 on the CPU, whatever device x is on.
        """
        return self.steps[torch.full((rows,), k) if isinstance(k, int) else k]

    @cached_property
    def steps(self) -> Step:
        """All K steps, looked up once: each [K] (or [K,T])."""
        return step(self.schedule, self.grid[:-1], self.grid[1:])

    def kernel_at(self, k: int | Tensor) -> Kernel:
        """The kernel that acts at step k: outside the window the ODE, and at a consistency chain's
        last step its jump. Steps [B] must lie all inside the window, or all outside.
        """
        if isinstance(self.kernel, Solver):
            raise ValueError(
                f"{type(self.kernel).__name__} is a solver: it samples and has no transition to"
                " score"
            )
        if self._inside(k):
            return self.kernel
        jumps = isinstance(self.kernel, Consistency)
        return self.kernel if jumps and bool(torch.as_tensor(k == self.K - 1).all()) else ODE

    def _inside(self, k: int | Tensor) -> bool:
        """True where step k, or each of [B], lies in the window; `ValueError` where some do."""
        if isinstance(k, int):
            return k in self.stochastic
        inside = (k >= self.stochastic.start) & (k < self.stochastic.stop)
        if bool(inside.any()) and not bool(inside.all()):
            raise ValueError(
                "these steps lie partly inside and partly outside the stochastic window"
            )
        return bool(inside.all())

    def coefficients(self, k: int | Tensor) -> Coefficients:
        """The coefficients of what acts at step k: one row, [1] (or [1,T]); those of each row's
        own, [B], if k is [B]. They are not to be changed in place.
        """
        if isinstance(k, int):
            return self.acting[k]
        self.kernel_at(k)  # refuses steps on both sides of the window
        columns = (
            torch.cat([getattr(c, f.name) for c in self.acting]) for f in fields(Coefficients)
        )
        return Coefficients(*(column.index_select(0, k) for column in columns))

    @cached_property
    def acting(self) -> tuple[Coefficients, ...]:
        """The coefficients of every step, computed once: they depend on schedule, grid, kernel and
        window, not on rows.
        """
        return tuple(self.kernel_at(k).coefficients(self.step(k, 1)) for k in range(self.K))

    def _act(
        self, denoiser: Denoiser, x: Tensor, k: int | Tensor, condition: Condition
    ) -> Gaussian:
        """The one place that acting and scoring both go through."""
        t = self.grid[k].expand(len(x), *self.grid.shape[1:]).clone()
        prediction = denoiser(x, t, condition)
        if prediction.std is not None and not self._inside(k):
            # outside the window nothing is drawn
            prediction = replace(prediction, std=torch.zeros_like(prediction.std))
        return self.coefficients(k).gaussian(x, prediction)

    def transition(self, denoiser: Denoiser, trajectory: Trajectory, k: int | Tensor) -> Gaussian:
        """Re-score stored step k: the Gaussian over x after it under ``denoiser``, with gradients
        if they are on. k [B] gives each row its own step.

        A start that a group shares is evaluated once per group (exact: the rows are equal).
        """
        self.kernel_at(k)  # refuses a solver
        if not self._inside(k):
            raise ValueError(
                f"step {k} is a point (ODE or last step): it has no density and is never trained on"
            )
        x, condition, shared = trajectory.before(k), trajectory.condition, trajectory.shared
        if shared > 1 and isinstance(k, int) and k == trajectory.first:
            gaussian = self._act(denoiser, x[::shared], k, condition[::shared])
            return Gaussian(
                *(v.repeat_interleave(shared, 0) for v in (gaussian.mean, gaussian.std))
            )
        return self._act(denoiser, x, k, condition)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        condition: Condition,
        noise: Noise,
        shape: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        start: tuple[int, Tensor] | None = None,
        keep: tuple[int, int] | None = None,
        branch_at: int | None = None,
        members: int = 1,
        storage: torch.dtype = torch.float32,
        on_step: Callable[[int], None] | None = None,
    ) -> Trajectory:
        """Sample B rows. ``condition`` and ``noise`` have B rows (group-major, ``members`` = N to a
        group), shape is E.

        start: (k, x [B,*E]) enters the chain before step k instead of drawing from the prior. keep:
        [low, high) steps to record, by default the stochastic window. branch_at: the N rows of a
        group share everything before step ``branch_at`` (0: the initial noise), which is
            evaluated once per group, as is the network at that step itself.
        storage: dtype that recorded states are rounded to *before* the chain goes on from them, so
        that what is scored
            is what acted.
        on_step: called with k after each step (progress).
        """
        device = torch.device(device)
        first, x = start if start is not None else (0, None)
        low, high = keep if keep is not None else (self.stochastic.start, self.stochastic.stop)
        low, high = max(low, first), max(high, first)
        if high > self.K:
            raise ValueError(f"keep [{low}, {high}) does not lie inside the chain's {self.K} steps")
        shared = members if branch_at is not None else 1
        branch = low if branch_at is None else branch_at
        if shared > 1 and (len(noise) % members or not first <= branch <= low):
            raise ValueError(
                f"branch_at {branch_at} must lie between step {first} and the first kept step {low}"
            )
        if x is None:
            draw = noise.trunk(members) if shared > 1 else noise
            x = self._begin(condition[::shared], draw, shape, device)
        else:
            x = x[::shared]
        begun = x.repeat_interleave(shared, 0)
        if isinstance(self.kernel, Solver):
            return self._solve(denoiser, condition, begun, first)
        states: list[Tensor] = []
        acted: list[Gaussian] = []
        for k in range(first, self.K):
            if self.finish is not None and k == self.stochastic.stop:
                x = self._integrated(self.finish, denoiser, condition, x, k)
                break
            if low <= k < high:
                x = x.to(storage).float()
            branching = shared > 1 and k == branch
            whole = shared == 1 or k > branch
            gaussian = self._act(denoiser, x, k, condition if whole else condition[::shared])
            if branching:
                x = x.repeat_interleave(shared, 0)
                gaussian = Gaussian(
                    *(v.repeat_interleave(shared, 0) for v in (gaussian.mean, gaussian.std))
                )
            if low <= k < high:
                states.append(x)
                acted.append(gaussian)
            x = self._after(gaussian, k, noise if whole or branching else noise.trunk(members))
            if k == high - 1:
                x = x.to(storage).float()
                states.append(x)
            if on_step is not None:
                on_step(k)
        if x.shape[0] != len(condition):
            x = x.repeat_interleave(shared, 0)
        empty = x[:, None][:, :0]
        return Trajectory(
            condition=condition,
            x=torch.stack(states, 1) if acted else empty,
            mean=torch.stack([g.mean for g in acted], 1) if acted else empty,
            std=torch.stack([g.std for g in acted], 1) if acted else empty,
            x0=x,
            first=low,
            shared=shared if branch_at == low else 1,
            start=begun.float(),
            chain=self,
        )

    def unroll(
        self,
        denoiser: Denoiser,
        condition: Condition,
        noise: Noise,
        shape: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        start: tuple[int, Tensor] | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Sample x0 [B,*E] with gradients through the steps: the value is that of `sample` (to the
        bit, where the denoiser says fp32), and what acts is the same.

        condition, noise, shape, start: as in `sample`; gradients reach a ``start`` that has them.
        last: only the last so many steps have gradients, and what is before them is a constant;
        None: all. The graph of every such step is held until the backward.
        """
        for solver in (self.kernel, self.finish):
            if isinstance(solver, Solver):
                raise ValueError(
                    f"{type(solver).__name__} is a solver: it samples and is not differentiated"
                )
        first = 0 if start is None else start[0]
        if last is not None and not 1 <= last <= self.K - first:
            raise ValueError(
                f"last is {last}; it must lie between 1 and the {self.K - first} steps taken"
            )
        learned = first if last is None else self.K - last
        wanted = torch.is_grad_enabled()
        if start is None:
            x = self._begin(condition, noise, shape, torch.device(device))
        else:
            x = start[1]
        for k in range(first, self.K):
            with torch.set_grad_enabled(wanted and k >= learned):
                x = self._after(self._act(denoiser, x, k, condition), k, noise)
        return x

    @torch.no_grad()
    def relabelled(
        self,
        denoiser: Denoiser,
        condition: Condition,
        noise: Noise,
        x: Tensor,
        steps: Sequence[int],
    ) -> Trajectory:
        """Take the listed steps from x [B,*E], in their order; no step is kept.

        Each takes x as it stands for x at its own time, grid[k], and goes to grid[k+1]: where the
        next one of the list is not k + 1, nothing stretches from the one to the other.
        """
        begun = x
        for k in steps:
            x = self._after(self._act(denoiser, x, k, condition), k, noise)
        empty = x[:, None][:, :0]
        return Trajectory(condition, empty, empty, empty, x, self.K, start=begun, chain=self)

    def _begin(
        self, condition: Condition, noise: Noise, shape: tuple[int, ...], device: torch.device
    ) -> Tensor:
        """A draw from the prior, [B,*E]."""
        start = self.prior(condition, shape, self.scale, device)
        return start.sample(noise(PRIOR, shape, device))

    def _after(self, gaussian: Gaussian, k: int, noise: Noise) -> Tensor:
        """x after step k: a draw from its Gaussian, or its mean where there is nothing to draw."""
        if k in self.stochastic and (self.acting[k].noisy or bool((gaussian.std > 0).any())):
            return gaussian.sample(noise(k, tuple(gaussian.mean.shape[1:]), gaussian.mean.device))
        return gaussian.mean

    def _solve(self, denoiser: Denoiser, condition: Condition, x: Tensor, first: int) -> Trajectory:
        assert isinstance(self.kernel, Solver)
        x0 = self._integrated(self.kernel, denoiser, condition, x, first)
        empty = x0[:, None][:, :0]
        return Trajectory(condition, empty, empty, empty, x0, first=0, start=x.float(), chain=self)

    def _integrated(
        self, solver: Solver, denoiser: Denoiser, condition: Condition, x: Tensor, first: int
    ) -> Tensor:
        """x_0 as a solver finds it from x before step ``first``, [B,*E]."""
        grid = self.grid[first:]
        return solver.integrate(lambda x, t: denoiser(x, t, condition), x, self.schedule, grid)
