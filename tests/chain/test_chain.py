"""The chain: what acted is what is scored, over windows, branches, splits, storage and starts."""

from collections.abc import Callable
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
    ClipX0,
    Consistency,
    DPMSolver,
    FloorStd,
    Guidance,
    Heun,
    Linear,
    Prediction,
    Trajectory,
    VariancePreserving,
)
from genpolicy.chain.kernel import Kernel
from genpolicy.chain.noise import PRIOR, Noise
from genpolicy.chain.schedule import Schedule, step
from genpolicy.chain.values import Denoiser
from tests.chain.exact import (
    DATA,
    SCHEDULES,
    Data,
    Network,
    Rows,
    batch,
    cosine,
    relative,
    transition,
)

SHAPE = (6, 8)
GROUPS, MEMBERS, K = 3, 4, 6
KERNELS: list[Kernel] = [
    DDIM(0.5),
    DDIM(1.0),
    SDE(0.7),
    SDE(0.3, "constant"),
    CPS(0.8),
    FloorStd(DDIM(0.5), 0.2),
    Consistency(),
]


@dataclass(frozen=True)
class Case:
    """A chain of 3 groups of 4, and how it is sampled."""

    kernel: Kernel = KERNELS[1]
    window: tuple[int, int] | None = None
    branch_at: int | None = None
    storage: torch.dtype = torch.float32
    guidance: float = 1.0
    dtype: torch.dtype = torch.float32

    def chain(self) -> Chain:
        return Chain(Linear(3.0), Linear(3.0).grid(K), self.kernel, self.window)

    def denoiser(self) -> Denoiser:
        network = Network(SHAPE, self.dtype)
        if self.guidance == 1:
            return network
        return Guidance(
            network, lambda c: Rows(torch.zeros_like(c.value)), self.guidance, interval=(0.3, 0.95)
        )

    def sample(self, denoiser: Denoiser) -> Trajectory:
        condition, noise = batch(GROUPS, MEMBERS)
        branch = {} if self.branch_at is None else {"branch_at": self.branch_at, "members": MEMBERS}
        return self.chain().sample(
            denoiser, condition, noise, SHAPE, storage=self.storage, **branch
        )


CASES = [
    *(Case(kernel) for kernel in KERNELS),
    Case(FloorStd(DDIM(0.5), 0.2), window=(0, K)),
    *(
        Case(kernel, window=(1, 4), branch_at=b)
        for kernel in (DDIM(1.0), SDE(0.7))
        for b in (None, 0, 1)
    ),
    *(Case(kernel, branch_at=0) for kernel in (DDIM(1.0), SDE(0.7), CPS(0.8))),
    *(
        Case(kernel, storage=s, branch_at=b)
        for kernel in (DDIM(1.0), SDE(0.7))
        for s in (torch.bfloat16, torch.float16)
        for b in (None, 0)
    ),
    *(
        Case(kernel, guidance=4.5, branch_at=b)
        for kernel in (DDIM(1.0), SDE(0.7))
        for b in (None, 0)
    ),
    Case(SDE(0.7), window=(1, 4), branch_at=1, storage=torch.bfloat16, guidance=4.5),
]


def log_ratio(chain: Chain, denoiser: Denoiser, trajectory: Trajectory, k: int) -> Tensor:
    """Mean-reduced log-ratio of the replayed transition to the one that acted, [B]."""
    now, then, after = (
        chain.transition(denoiser, trajectory, k),
        trajectory.acted(k),
        trajectory.after(k),
    )
    return now.log_prob(after, reduce="mean") - then.log_prob(after, reduce="mean")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replay_with_the_same_batch_gives_ratio_1_exactly(case: Case) -> None:
    denoiser = case.denoiser()
    trajectory = case.sample(denoiser)
    assert list(trajectory.steps) == list(case.chain().stochastic)
    for k in trajectory.steps:
        now, then = case.chain().transition(denoiser, trajectory, k), trajectory.acted(k)
        assert torch.equal(now.mean, then.mean)
        assert torch.equal(now.std.expand_as(then.std), then.std)
        assert (log_ratio(case.chain(), denoiser, trajectory, k).exp() == 1).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replay_in_splits(case: Case) -> None:
    """One group at a time (and one row at a time where no start is shared): <= 1e-5 in fp32."""
    denoiser = case.denoiser()
    trajectory = case.sample(denoiser)
    for size in (MEMBERS if trajectory.shared > 1 else 1, 2 * MEMBERS):
        for start in range(0, len(trajectory), size):
            part = trajectory[start : start + size]
            for k in part.steps:
                assert log_ratio(case.chain(), denoiser, part, k).abs().max() <= 1e-5


@pytest.mark.parametrize("kernel", [DDIM(1.0), SDE(0.7)], ids=str)
@pytest.mark.parametrize("branch_at", [None, 0])
def test_replay_of_an_fp64_network_in_splits(kernel: Kernel, branch_at: int | None) -> None:
    case = Case(kernel, branch_at=branch_at, dtype=torch.float64)
    denoiser = case.denoiser()
    trajectory = case.sample(denoiser)
    for start in range(0, len(trajectory), MEMBERS):
        part = trajectory[start : start + MEMBERS]
        for k in part.steps:
            assert log_ratio(case.chain(), denoiser, part, k).abs().max() <= 1e-12


def test_control_another_network_is_not_ratio_1() -> None:
    case = Case()
    denoiser = case.denoiser()
    trajectory = case.sample(denoiser)
    with torch.no_grad():
        denoiser.body[0].weight.add_(1e-3)
    assert log_ratio(case.chain(), denoiser, trajectory, 2).abs().max() > 1e-4


def test_control_another_kernel_step_or_time_is_not_ratio_1() -> None:
    case = Case()
    denoiser = case.denoiser()
    trajectory = case.sample(denoiser)
    other = replace(case, kernel=DDIM(0.99)).chain()
    assert log_ratio(other, denoiser, trajectory, 2).abs().max() > 1e-3
    moved = replace(case.chain(), grid=Linear(2.9).grid(K))
    assert log_ratio(moved, denoiser, trajectory, 2).abs().max() > 1e-3


# ---- storage


@pytest.mark.parametrize(
    ("storage", "error"), [(torch.bfloat16, 1e-4), (torch.float16, 2e-6)], ids=str
)
@pytest.mark.parametrize("kernel", [DDIM(1.0), SDE(0.7)], ids=str)
def test_control_rounding_after_scoring_moves_the_log_prob(
    kernel: Kernel, storage: torch.dtype, error: float
) -> None:
    """Published code scores fp32 states and stores rounded ones;
    ours rounds first, and replays exactly.
    """
    case = Case(kernel)
    denoiser = case.denoiser()
    trajectory = case.sample(denoiser)
    rounded = replace(trajectory, x=trajectory.x.to(storage).float())

    def moved(k: int) -> Tensor:
        stored = (
            case.chain().transition(denoiser, rounded, k).log_prob(rounded.after(k), reduce="mean")
        )
        return (
            (stored - trajectory.acted(k).log_prob(trajectory.after(k), reduce="mean")).abs().max()
        )

    assert max(moved(k) for k in trajectory.steps) > error
    assert torch.equal(case.sample(denoiser).x, trajectory.x)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16], ids=str)
def test_recorded_states_are_representable_and_the_chain_goes_on_from_them(
    storage: torch.dtype,
) -> None:
    case = Case(window=(1, 4), storage=storage)
    denoiser = case.denoiser()
    trajectory = case.sample(denoiser)
    assert torch.equal(trajectory.x, trajectory.x.to(storage).float())
    assert relative(trajectory.x, replace(case, storage=torch.float32).sample(denoiser).x) > 1e-4
    for k in trajectory.steps:
        noise = batch(GROUPS, MEMBERS)[1](k, SHAPE)
        assert torch.equal(
            trajectory.after(k), trajectory.acted(k).sample(noise).to(storage).float()
        )


def test_steps_outside_the_kept_ones_are_not_rounded() -> None:
    """A window (1, 2): what happens after it is the ODE in fp32 from the rounded state."""
    case = Case(window=(1, 2), storage=torch.bfloat16)
    denoiser = case.denoiser()
    trajectory = case.sample(denoiser)
    condition, noise = batch(GROUPS, MEMBERS)
    ode = Chain(Linear(3.0), Linear(3.0).grid(K), DDIM(0.0), window=(0, 0))
    onwards = ode.sample(denoiser, condition, noise, SHAPE, start=(2, trajectory.after(1)))
    assert torch.equal(trajectory.x0, onwards.x0)


# ---- window and keep


@pytest.mark.parametrize("window", [None, (0, 2), (1, 4), (3, 3), (0, K)], ids=str)
def test_window_is_stochastic_and_the_rest_is_the_ode(window: tuple[int, int] | None) -> None:
    case = Case(FloorStd(DDIM(1.0), 0.1), window=window)
    denoiser = case.denoiser()
    chain = case.chain()
    condition, noise = batch(GROUPS, MEMBERS)
    trajectory = chain.sample(denoiser, condition, noise, SHAPE, keep=(0, K))
    assert trajectory.x.shape == (12, K + 1, *SHAPE)
    assert trajectory.mean.shape == (12, K, *SHAPE)
    assert torch.equal(trajectory.x[:, -1], trajectory.x0)
    inside = range(*window) if window is not None else range(K - 1)
    for k in range(K):
        acted, after, here = trajectory.acted(k), trajectory.after(k), chain.step(k, 12)
        assert bool((acted.std > 0).all()) == (k in inside)
        if k in inside:
            assert torch.equal(after, acted.mean + acted.std * noise(k, SHAPE))
        else:
            prediction = denoiser(trajectory.before(k), here.t, condition)
            euler = trajectory.before(k) + (here.s - here.t)[0] * (prediction.eps - prediction.x0)
            assert torch.equal(after, acted.mean)
            assert relative(after, euler) <= 1e-6


@pytest.mark.parametrize("keep", [(0, K), (2, 4), (0, 1), (K - 1, K), (3, 3)], ids=str)
@pytest.mark.parametrize("window", [None, (1, 4)], ids=str)
def test_keep_chooses_what_is_recorded_and_nothing_else(
    keep: tuple[int, int], window: tuple[int, int] | None
) -> None:
    case = Case(window=window)
    denoiser = case.denoiser()
    condition, noise = batch(GROUPS, MEMBERS)
    everything = case.chain().sample(denoiser, condition, noise, SHAPE, keep=(0, K))
    kept = case.chain().sample(denoiser, condition, noise, SHAPE, keep=keep)
    low, high = keep
    assert kept.steps == range(low, high)
    assert torch.equal(kept.x0, everything.x0)
    for k in range(low, high):
        assert torch.equal(kept.before(k), everything.before(k))
        assert torch.equal(kept.after(k), everything.after(k))
        assert torch.equal(kept.acted(k).mean, everything.acted(k).mean)


@pytest.mark.parametrize("k", [-1, 0, 1, 4, K])
def test_steps_that_were_not_kept_refuse(k: int) -> None:
    case = Case()
    condition, noise = batch(GROUPS, MEMBERS)
    trajectory = case.chain().sample(case.denoiser(), condition, noise, SHAPE, keep=(2, 4))
    for ask in (trajectory.before, trajectory.acted, trajectory.after):
        with pytest.raises(ValueError, match="was not kept"):
            ask(k)
    with pytest.raises(ValueError, match=r"was not kept|is a point"):
        case.chain().transition(case.denoiser(), trajectory, k)


@pytest.mark.parametrize("k", [0, 4, K - 1])
def test_steps_outside_the_window_refuse_to_be_scored(k: int) -> None:
    case = Case(window=(1, 4))
    condition, noise = batch(GROUPS, MEMBERS)
    trajectory = case.chain().sample(case.denoiser(), condition, noise, SHAPE, keep=(0, K))
    with pytest.raises(ValueError, match="is a point"):
        case.chain().transition(case.denoiser(), trajectory, k)
    with pytest.raises(ValueError, match="std 0 is a point"):
        trajectory.acted(k).log_prob(trajectory.after(k), reduce="mean")


@pytest.mark.parametrize("window", [(-1, 2), (3, 2), (0, K + 1)], ids=str)
def test_windows_outside_the_chain_refuse(window: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="window"):
        Case(window=window).chain()


def test_keep_outside_the_chain_refuses() -> None:
    condition, noise = batch(GROUPS, MEMBERS)
    with pytest.raises(ValueError, match="keep"):
        Case().chain().sample(Case().denoiser(), condition, noise, SHAPE, keep=(2, K + 1))


# ---- branches


def seen(denoiser: Callable, record: list[Tensor]) -> Denoiser:
    def watched(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        record.append(x.clone())
        return denoiser(x, t, condition)

    return watched


@pytest.mark.parametrize("kernel", [DDIM(1.0), SDE(0.7)], ids=str)
@pytest.mark.parametrize(
    ("branch_at", "window"),
    [(0, None), (0, (0, 2)), (2, (2, 5)), (3, (3, 5)), (1, (3, 5))],
    ids=str,
)
def test_branches_share_what_lies_before(
    kernel: Kernel, branch_at: int, window: tuple[int, int] | None
) -> None:
    """Network rows: one per group up to and at the branching step, all after;
    states differ only after it.
    """
    case = Case(kernel, window=window, branch_at=branch_at)
    network = case.denoiser()
    record: list[Tensor] = []
    trajectory = case.sample(seen(network, record))
    assert network.rows == [GROUPS] * (branch_at + 1) + [GROUPS * MEMBERS] * (K - branch_at - 1)
    low = case.chain().stochastic.start
    assert trajectory.shared == (MEMBERS if branch_at == low else 1)
    members = trajectory.x.unflatten(0, (GROUPS, MEMBERS))
    assert (members[:, :, 0] == members[:, :1, 0]).all()
    if branch_at == low:
        assert torch.equal(trajectory.before(low)[::MEMBERS], record[branch_at])
    for i in range(1, MEMBERS):
        assert not (members[:, 0, 1:] == members[:, i, 1:]).any()
    assert not torch.equal(members[0, 0, 0], members[1, 0, 0])  # groups differ


def test_without_a_branch_every_row_is_its_own() -> None:
    case = Case()
    network = case.denoiser()
    members = case.sample(network).x.unflatten(0, (GROUPS, MEMBERS))
    assert network.rows == [GROUPS * MEMBERS] * K
    assert not (members[:, 0] == members[:, 1]).any()


def test_the_trunk_may_be_stochastic() -> None:
    """B2-DiffuRL: the trunk is sampled with the kernel too, once per group;
    only the branches are kept.
    """
    case = Case(window=(0, K - 1))
    denoiser = case.denoiser()
    condition, noise = batch(GROUPS, MEMBERS)
    sample = case.chain().sample
    trajectory = sample(
        denoiser, condition, noise, SHAPE, keep=(3, 5), branch_at=3, members=MEMBERS
    )
    trunk = sample(denoiser, condition[::MEMBERS], noise.trunk(MEMBERS), SHAPE, keep=(0, 3))
    assert torch.equal(trajectory.before(3)[::MEMBERS], trunk.after(2))
    assert torch.equal(trajectory.after(3), trajectory.acted(3).sample(noise(3, SHAPE)))
    for k in (3, 4):
        assert (log_ratio(case.chain(), denoiser, trajectory, k) == 0).all()


@pytest.mark.parametrize("kernel", [DDIM(1.0), SDE(0.7), DDIM(0.0)], ids=str)
@pytest.mark.parametrize("k", range(1, K))
def test_several_continuations_from_any_step(kernel: Kernel, k: int) -> None:
    """Steps [k, K) of every member are kept; the k steps before are the group's, evaluated once."""
    chain, network = Case(kernel, window=(0, K)).chain(), Case().denoiser()
    condition, noise = batch(GROUPS, MEMBERS)
    trajectory = chain.sample(
        network, condition, noise, SHAPE, keep=(k, K), branch_at=k, members=MEMBERS
    )
    assert network.rows == [GROUPS] * (k + 1) + [GROUPS * MEMBERS] * (K - k - 1)
    assert trajectory.steps == range(k, K)
    assert trajectory.shared == MEMBERS

    # The trunk is the group's own chain, and so is each continuation from where it ends.
    trunk = chain.sample(network, condition[::MEMBERS], noise.trunk(MEMBERS), SHAPE, keep=(0, k))
    there = trunk.after(k - 1).repeat_interleave(MEMBERS, 0)
    assert torch.equal(trajectory.before(k), there)
    alone = chain.sample(network, condition, noise, SHAPE, start=(k, there))
    assert torch.allclose(trajectory.x0, alone.x0, atol=1e-5)
    again = chain.sample(
        network, condition, noise, SHAPE, start=(k, there), branch_at=k, members=MEMBERS
    )
    assert torch.equal(trajectory.x0, again.x0)
    members = trajectory.x0.unflatten(0, (GROUPS, MEMBERS))
    drawn = kernel != DDIM(0.0) and (k < K - 1 or isinstance(kernel, SDE))  # DDIM's last std is 0
    assert bool((members[:, 0] != members[:, 1]).all()) == drawn

    # What acted is what is scored, and the step that the group shares is scored once per group.
    for j in trajectory.steps if kernel != DDIM(0.0) else ():
        network.rows.clear()
        now, then = chain.transition(network, trajectory, j), trajectory.acted(j)
        assert torch.equal(now.mean, then.mean)
        assert torch.equal(now.std, then.std)
        assert network.rows == [GROUPS if j == k else GROUPS * MEMBERS]


@pytest.mark.parametrize("k", range(1, K))
def test_continuations_whose_kept_steps_begin_before_them_refuse(k: int) -> None:
    condition, noise = batch(GROUPS, MEMBERS)
    with pytest.raises(ValueError, match=f"branch_at {k} must lie between step 0 and the first"):
        Case(window=(0, K)).chain().sample(
            Case().denoiser(), condition, noise, SHAPE, branch_at=k, members=MEMBERS
        )


def test_shared_start_is_evaluated_once_per_group_and_its_gradient_is_the_unshared_one() -> None:
    case = Case(branch_at=0)
    network = case.denoiser()
    trajectory = case.sample(network)
    alone = replace(trajectory, shared=1)
    weight = torch.linspace(-1, 1, len(trajectory))

    def gradient(t: Trajectory, k: int) -> Tensor:
        network.rows.clear()
        return network.gradient((weight * log_ratio(case.chain(), network, t, k).exp()).sum())

    ours, theirs = gradient(trajectory, 0), None
    assert network.rows == [GROUPS]
    theirs = gradient(alone, 0)
    assert network.rows == [GROUPS * MEMBERS]
    assert relative(ours, theirs) <= 1e-5
    gradient(trajectory, 1)
    assert network.rows == [GROUPS * MEMBERS]
    first_only = network.gradient(
        (weight[::MEMBERS] * log_ratio(case.chain(), network, trajectory, 0)[::MEMBERS]).sum()
    )
    assert relative(first_only, theirs) > 0.1  # control: a group's other members count too


@pytest.mark.parametrize(
    "rows", [slice(0, 3), slice(2, 6), slice(0, 12, 2), slice(0, 12, 4)], ids=str
)
def test_rows_that_cut_a_group_refuse(rows: slice) -> None:
    trajectory = Case(branch_at=0).sample(Case().denoiser())
    with pytest.raises(ValueError, match="cut a group"):
        trajectory[rows]
    assert len(trajectory[4:12]) == 8


@pytest.mark.parametrize(("branch_at", "start"), [(2, None), (1, 3)])
def test_branches_inside_the_kept_steps_or_before_the_start_refuse(
    branch_at: int, start: int | None
) -> None:
    condition, noise = batch(GROUPS, MEMBERS)
    given = None if start is None else (start, torch.zeros(12, *SHAPE))
    with pytest.raises(ValueError, match="branch_at"):
        Case().chain().sample(
            Case().denoiser(),
            condition,
            noise,
            SHAPE,
            branch_at=branch_at,
            members=MEMBERS,
            start=given,
        )


# ---- starts


@pytest.mark.parametrize("k", [1, 3, K - 1])
@pytest.mark.parametrize("kernel", [DDIM(1.0), SDE(0.7)], ids=str)
def test_partial_start_goes_on_as_the_whole_chain_did(kernel: Kernel, k: int) -> None:
    case = Case(kernel)
    network = case.denoiser()
    condition, noise = batch(GROUPS, MEMBERS)
    whole = case.chain().sample(network, condition, noise, SHAPE, keep=(0, K))
    network.times.clear()
    part = case.chain().sample(network, condition, noise, SHAPE, start=(k, whole.before(k)))
    assert network.times == case.chain().grid[k:-1].tolist()
    assert torch.equal(part.x0, whole.x0)
    assert part.steps == range(k, K - 1)
    for j in part.steps:
        assert torch.equal(part.before(j), whole.before(j))
        assert (log_ratio(case.chain(), network, part, j) == 0).all()


def begun(trajectory: Trajectory) -> Tensor:
    """The start of a trajectory, which every sampled one has."""
    assert trajectory.start is not None
    return trajectory.start


@pytest.mark.parametrize("window", [None, (2, 4), (3, 3)], ids=str)
@pytest.mark.parametrize("branch_at", [None, 0, 2])
def test_where_a_chain_began_is_kept_whatever_its_window(
    window: tuple[int, int] | None, branch_at: int | None
) -> None:
    case = Case(DDIM(1.0), window)
    condition, noise = batch(GROUPS, MEMBERS)
    drawn = noise if branch_at is None else noise.trunk(MEMBERS)
    options = {} if branch_at is None else {"branch_at": branch_at, "members": MEMBERS}
    if branch_at == 2:
        options["keep"] = (2, K)
    trajectory = case.chain().sample(case.denoiser(), condition, noise, SHAPE, **options)
    wanted = drawn(PRIOR, SHAPE)
    wanted = wanted if branch_at is None else wanted.repeat_interleave(MEMBERS, 0)
    assert begun(trajectory).dtype == torch.float32
    assert torch.equal(begun(trajectory), wanted)
    part = trajectory[MEMBERS : 2 * MEMBERS]
    assert torch.equal(begun(part), wanted[MEMBERS : 2 * MEMBERS])
    again = case.chain().sample(
        case.denoiser(), condition, noise, SHAPE, **options, start=(0, begun(trajectory))
    )
    assert torch.equal(again.x0, trajectory.x0)


@pytest.mark.parametrize("kernel", [DDIM(1.0), Heun(), DPMSolver()], ids=str)
def test_where_a_chain_was_entered_is_kept_too(kernel: Kernel) -> None:
    case = Case(kernel)
    condition, noise = batch(GROUPS, MEMBERS)
    x = torch.randn(GROUPS * MEMBERS, *SHAPE, dtype=torch.float64)
    before = x.clone()
    for given, wanted in ((None, noise(PRIOR, SHAPE)), ((2, x), x.float())):
        trajectory = case.chain().sample(case.denoiser(), condition, noise, SHAPE, start=given)
        assert torch.equal(begun(trajectory), wanted)
        begun(trajectory).zero_()
    assert torch.equal(x, before)
    order = torch.tensor([7, 2, 11])
    picked = case.chain().sample(case.denoiser(), condition, noise, SHAPE)[order]
    assert torch.equal(begun(picked), noise(PRIOR, SHAPE)[order])


def test_a_trajectory_without_its_start_can_be_picked_from() -> None:
    assert replace(Case().sample(Case().denoiser()), start=None)[2:5].start is None


def test_partial_start_with_branches() -> None:
    case = Case()
    network = case.denoiser()
    condition, noise = batch(GROUPS, MEMBERS)
    x = torch.randn(GROUPS, *SHAPE, generator=torch.Generator().manual_seed(0)).repeat_interleave(
        MEMBERS, 0
    )
    part = case.chain().sample(
        network, condition, noise, SHAPE, start=(3, x), branch_at=3, members=MEMBERS
    )
    assert part.shared == MEMBERS
    assert part.steps == range(3, K - 1)
    assert torch.equal(part.before(3), x)
    assert network.rows == [GROUPS] + [GROUPS * MEMBERS] * (K - 4)
    assert (log_ratio(case.chain(), network, part, 3) == 0).all()


PRIORS = [
    (Linear(), 1.0),
    (Linear(3.0), 1.0),
    (cosine(), 1.0),
    (VariancePreserving(torch.linspace(0.999, 0.01, 100)), 1.0),
]
PRIORS += [(EDM(), 6401**0.5)]


@pytest.mark.parametrize(
    ("schedule", "std"), PRIORS, ids=lambda v: type(v).__name__ if not isinstance(v, float) else ""
)
def test_prior_is_diffusers_init_noise_sigma(schedule: Schedule, std: float) -> None:
    """1 on VP (whatever its last sigma is) and on flows,
    sqrt(sigma_max^2 + 1) for EDMEulerScheduler.
    """
    condition, noise = batch(GROUPS, MEMBERS)
    chain = Chain(schedule, schedule.grid(2))
    x = chain.sample(DATA.denoiser(schedule), condition, noise, SHAPE, keep=(0, 1)).before(0)
    assert relative(x, std * noise(PRIOR, SHAPE)) <= 1e-6


# Starts below the noisiest time, for data of mean 0 and variance 1: (schedule, its start).
BELOW = [("linear", 0.7), ("shifted", 0.7), ("vp", 0.7), ("edm", 2.0)]


@pytest.mark.parametrize("kernel", [DDIM(0.0), DDIM(0.5), DDIM(1.0)], ids=str)
@pytest.mark.parametrize(("name", "begin"), BELOW)
def test_a_chain_that_starts_below_the_noisiest_time_ends_at_the_data(
    name: str, begin: float, kernel: Kernel
) -> None:
    """Mean 0 and std 1 after 128 steps from N(0, scale^2), over 40 000 draws."""
    schedule, data = SCHEDULES[name], Data(0.0, 1.0)
    chain = Chain(schedule, schedule.grid(128, begin), kernel)
    assert float(chain.grid[0]) == pytest.approx(begin, abs=1e-3)
    assert chain.scale == pytest.approx(data.marginal(schedule, chain.grid[0])[1], rel=1e-12)
    condition, noise = batch(1, 1)

    def final_std(scale: float) -> float:
        x = scale * noise(PRIOR, (40_000,))
        sampled = chain.sample(data.denoiser(schedule), condition, noise, (40_000,), start=(0, x))
        assert abs(float(sampled.x0.mean())) < 0.02
        return float(sampled.x0.std())

    drawn = chain.sample(data.denoiser(schedule), condition, noise, (40_000,)).x0
    assert float(drawn.std()) == pytest.approx(1, abs=0.025)
    assert final_std(chain.scale) == pytest.approx(float(drawn.std()), abs=1e-6)
    if kernel == DDIM(0.0) and name != "vp":  # controls: of the noise alone, and of pure noise
        assert final_std(float(schedule.sigma(chain.grid[:1]))) < 0.93
        assert abs(final_std(1.0) - 1) > 0.3


@pytest.mark.parametrize(("name", "begin"), BELOW)
def test_the_scale_is_the_std_of_noised_data_of_unit_variance(name: str, begin: float) -> None:
    schedule = SCHEDULES[name]
    grid = schedule.grid(K, begin)
    by_hand = {
        "linear": 0.58**0.5,
        "shifted": 0.58**0.5,
        "vp": 1.0,
        "edm": 5**0.5,
    }
    assert Chain(schedule, grid).scale == pytest.approx(by_hand[name], rel=1e-9)
    whole = Chain(schedule, schedule.grid(K))
    assert whole.scale == pytest.approx(6401**0.5 if name == "edm" else 1.0, rel=1e-9)
    assert replace(whole, grid=grid).scale == Chain(schedule, grid).scale


# ---- batches


ANYWHERE = [
    (name, k)
    for name in ("shifted", "vp", "edm")
    for k in KERNELS
    if name == "shifted" or not isinstance(k, SDE)
]


@pytest.mark.parametrize(("name", "kernel"), ANYWHERE, ids=str)
def test_rows_sampled_alone_equal_rows_sampled_together(name: str, kernel: Kernel) -> None:
    schedule = SCHEDULES[name]
    chain = Chain(schedule, schedule.grid(K), kernel)
    condition, noise = batch(GROUPS, MEMBERS)
    denoiser = DATA.denoiser(schedule)  # elementwise: a row cannot depend on its batch
    together = chain.sample(denoiser, condition, noise, SHAPE)
    order = torch.tensor([7, 2, 11])
    for rows in (slice(5, 6), slice(4, 8), order):
        alone = chain.sample(denoiser, condition[rows], noise[rows], SHAPE)
        assert torch.equal(alone.x, together.x[rows])
        assert torch.equal(alone.x0, together.x0[rows])


@pytest.mark.parametrize("branch_at", [None, 0])
def test_groups_sampled_alone_equal_groups_sampled_together_with_a_network(
    branch_at: int | None,
) -> None:
    case = Case()
    denoiser = case.denoiser()
    condition, noise = batch(GROUPS, MEMBERS)
    branch = {} if branch_at is None else {"branch_at": branch_at, "members": MEMBERS}
    together = case.chain().sample(denoiser, condition, noise, SHAPE, **branch)
    alone = case.chain().sample(denoiser, condition[4:8], noise[4:8], SHAPE, **branch)
    assert relative(alone.x, together.x[4:8]) <= 1e-5
    assert relative(alone.x0, together.x0[4:8]) <= 1e-5


def test_every_name_of_the_noise_changes_the_sample() -> None:
    case = Case()
    denoiser = case.denoiser()
    condition, noise = batch(GROUPS, MEMBERS)
    first = case.sample(denoiser)
    assert torch.equal(case.sample(denoiser).x0, first.x0)
    for other in (
        replace(noise, seed=1),
        replace(noise, iteration=1),
        replace(noise, group=noise.group + 3),
    ):
        assert not (case.chain().sample(denoiser, condition, other, SHAPE).x0 == first.x0).any()


# ---- chains of one step, solvers, tokens, dtypes


def test_a_chain_of_one_step() -> None:
    """The default window is the last step: one evaluation, taken at its mean, nothing kept."""
    condition, noise = batch(GROUPS, MEMBERS)
    network = Network(SHAPE)
    chain = Chain(Linear(), Linear().grid(1))
    trajectory = chain.sample(network, condition, noise, SHAPE)
    start = noise(PRIOR, SHAPE)
    assert network.rows == [12]
    assert len(trajectory.steps) == 0
    assert torch.equal(
        trajectory.x0, network(start, torch.ones(12, dtype=torch.float64), condition).x0
    )


def test_a_chain_of_one_trained_step() -> None:
    condition, noise = batch(GROUPS, MEMBERS)
    network = Network(SHAPE)
    chain = Chain(Linear(), Linear().grid(1), FloorStd(DDIM(1.0), 0.1), window=(0, 1))
    trajectory = chain.sample(network, condition, noise, SHAPE, branch_at=0, members=MEMBERS)
    assert network.rows == [GROUPS]
    assert trajectory.shared == MEMBERS
    assert trajectory.std.unique().tolist() == [pytest.approx(0.1)]
    assert torch.equal(trajectory.x0, trajectory.after(0))
    assert (log_ratio(chain, network, trajectory, 0) == 0).all()
    point = replace(chain, kernel=DDIM(1.0))
    with pytest.raises(ValueError, match="std 0 is a point"):
        log_ratio(point, network, point.sample(network, condition, noise, SHAPE), 0)


@pytest.mark.parametrize(
    ("solver", "evaluations"), [(Heun(), 2 * K - 1), (DPMSolver(), K)], ids=str
)
def test_solvers_sample_and_refuse_to_be_scored(solver: Heun | DPMSolver, evaluations: int) -> None:
    condition, noise = batch(GROUPS, MEMBERS)
    network = Network(SHAPE)
    chain = Chain(Linear(), Linear().grid(K), solver)
    trajectory = chain.sample(network, condition, noise, SHAPE)
    assert len(network.rows) == evaluations
    assert trajectory.x0.shape == (12, *SHAPE)
    assert len(trajectory.steps) == 0
    ode = Chain(Linear(), Linear().grid(400), window=(0, 0)).sample(
        network, condition, noise, SHAPE
    )
    assert relative(trajectory.x0, ode.x0) < 0.02
    kept = Case().sample(network)
    with pytest.raises(ValueError, match="is a solver"):
        chain.transition(network, kept, 0)


@pytest.mark.parametrize("solver", [Heun(), DPMSolver()], ids=str)
def test_solvers_start_where_they_are_told(solver: Heun | DPMSolver) -> None:
    condition, noise = batch(GROUPS, MEMBERS)
    network = Network(SHAPE)
    chain = Chain(Linear(), Linear().grid(K), solver)
    x = torch.zeros(12, *SHAPE)
    trajectory = chain.sample(network, condition, noise, SHAPE, start=(3, x))
    assert max(network.times) == float(chain.grid[3])
    part = Chain(Linear(), chain.grid[3:], solver).sample(
        network, condition, noise, SHAPE, start=(0, x)
    )
    assert torch.equal(trajectory.x0, part.x0)


@pytest.mark.parametrize("solver", [Heun(), DPMSolver()], ids=str)
def test_solvers_never_ask_the_network_at_the_end(solver: Heun | DPMSolver) -> None:
    """t = 0 of a VP family is its final alpha-bar, not a level a network knows,
    even where sigma(0) > 0.
    """
    schedule = VariancePreserving(torch.linspace(0.999, 0.01, 100), final_alpha_bar=0.999)
    times: list[float] = []

    def denoiser(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        times.append(float(t.min()))
        return DATA.denoiser(schedule)(x, t, condition)

    condition, noise = batch(GROUPS, MEMBERS)
    x0 = Chain(schedule, schedule.grid(K), solver).sample(denoiser, condition, noise, SHAPE).x0
    assert min(times) > 0
    assert x0.isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("k", [0, 2, K - 1])
def test_per_token_times_that_are_equal_are_per_row_times(kernel: Kernel, k: int) -> None:
    """t [B,T] at kernel level: bitwise the same Gaussian."""
    grid, tokens = Linear().grid(K), SHAPE[0]
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(k))
    prediction = Prediction(
        *torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(k + 1))
    )
    t, s = grid[k].expand(2), grid[k + 1].expand(2)
    per_row = transition(kernel, x, prediction, step(Linear(), t, s))
    per_token = transition(
        kernel,
        x,
        prediction,
        step(Linear(), t[:, None].expand(2, tokens), s[:, None].expand(2, tokens)),
    )
    assert torch.equal(per_row.mean, per_token.mean)
    assert torch.equal(per_row.std.expand_as(x), per_token.std.expand_as(x))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_per_token_times_that_differ_are_each_tokens_own(kernel: Kernel) -> None:
    t = torch.linspace(1, 0.3, SHAPE[0], dtype=torch.float64)
    s = t - 0.2
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    prediction = Prediction(*torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(1)))
    together = transition(kernel, x, prediction, step(Linear(), t.expand(2, -1), s.expand(2, -1)))
    for i in range(SHAPE[0]):
        own = Prediction(prediction.x0[:, i], prediction.eps[:, i])
        alone = transition(kernel, x[:, i], own, step(Linear(), t[i].expand(2), s[i].expand(2)))
        assert torch.equal(together.mean[:, i], alone.mean)
        assert torch.equal(together.std[:, i].expand_as(x[:, i]), alone.std.expand_as(x[:, i]))


def test_a_chain_of_per_token_times() -> None:
    """A grid [K+1,T] whose tokens are equal is the grid [K+1]."""
    condition, noise = batch(GROUPS, MEMBERS)
    grid = Linear().grid(K)
    denoiser = DATA.denoiser(Linear())
    per_row = Chain(Linear(), grid).sample(denoiser, condition, noise, SHAPE)
    chain = Chain(Linear(), grid[:, None].expand(-1, SHAPE[0]))
    per_token = chain.sample(denoiser, condition, noise, SHAPE)
    assert torch.equal(per_token.x, per_row.x)
    assert torch.equal(per_token.x0, per_row.x0)
    assert (log_ratio(chain, denoiser, per_token, 2) == 0).all()


def test_the_networks_own_std_is_the_transitions() -> None:
    std = torch.rand(12, *SHAPE) + 0.1

    def noisy(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        p = network(x, t, condition)
        return Prediction(p.x0, p.eps, std)

    network = Network(SHAPE)
    condition, noise = batch(GROUPS, MEMBERS)
    chain = Chain(Linear(), Linear().grid(K), DDIM(0.0))
    trajectory = chain.sample(noisy, condition, noise, SHAPE)
    assert torch.equal(trajectory.acted(2).std, std)
    assert torch.equal(chain.transition(noisy, trajectory, 2).std, std)
    assert torch.equal(trajectory.after(2), trajectory.acted(2).sample(noise(2, SHAPE)))
    end = chain.sample(noisy, condition, noise, SHAPE, keep=(K - 1, K))
    assert torch.equal(
        end.x0, end.acted(K - 1).mean
    )  # outside the window nothing is added, whatever the network says


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: ClipX0(d, Linear(3.0), 0.5)], ids=["plain", "clipped"]
)
@pytest.mark.parametrize("kernel", [DDIM(1.0), SDE(0.7)], ids=str)
def test_kernel_algebra_is_fp32_under_autocast(
    kernel: Kernel, wrap: Callable[[Denoiser], Denoiser]
) -> None:
    """The network runs in bf16; the transition is what its outputs give outside autocast;
    replay is exact.
    """
    case = Case(kernel)
    network = case.denoiser()
    outputs: list[Prediction] = []

    def recorded(x: Tensor, t: Tensor, condition: Rows) -> Prediction:
        outputs.append(wrap(network)(x, t, condition))
        return outputs[-1]

    with torch.autocast("cpu", torch.bfloat16):
        trajectory = case.sample(recorded)
        assert (log_ratio(case.chain(), wrap(network), trajectory, 2) == 0).all()
    assert trajectory.mean.dtype == trajectory.x.dtype == trajectory.std.dtype == torch.float32
    for k in trajectory.steps:
        outside = transition(kernel, trajectory.before(k), outputs[k], case.chain().step(k, 12))
        assert torch.equal(outside.mean, trajectory.acted(k).mean)
    assert relative(trajectory.x0, case.sample(wrap(network)).x0) > 1e-5  # bf16 did act


def test_progress_is_told() -> None:
    told: list[int] = []
    condition, noise = batch(GROUPS, MEMBERS)
    Case().chain().sample(Case().denoiser(), condition, noise, SHAPE, on_step=told.append)
    assert told == list(range(K))


def test_sampling_keeps_no_graph() -> None:
    trajectory = Case().sample(Case().denoiser())
    assert not trajectory.x0.requires_grad
    assert not trajectory.mean.requires_grad
    assert Case().chain().transition(Case().denoiser(), trajectory, 1).mean.requires_grad


def test_noise_of_a_trajectory_is_named_by_its_rows() -> None:
    """Sampling rows of group 5 gives what group 5 gets in any batch."""
    case = Case()
    denoiser = DATA.denoiser(Linear(3.0))
    far = Noise.rows(0, 0, torch.tensor([0, 5]), MEMBERS)
    near = Noise.rows(0, 0, torch.tensor([5]), MEMBERS)
    both = case.chain().sample(
        denoiser, Rows(torch.zeros(8)), far, SHAPE, branch_at=0, members=MEMBERS
    )
    one = case.chain().sample(
        denoiser, Rows(torch.zeros(4)), near, SHAPE, branch_at=0, members=MEMBERS
    )
    assert torch.equal(one.x0, both.x0[MEMBERS:])
