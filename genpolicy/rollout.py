"""Rollouts: policy x task -> trajectories with rewards, in groups."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genpolicy.chain import Gaussian, Noise, Trajectory
from genpolicy.episodes import Decision, play
from genpolicy.policy import ChainPolicy
from genpolicy.reward import WeightedRewards
from genpolicy.task import Context, Environments


@dataclass(frozen=True)
class Decisions:
    """What came of a rollout's R rows. A row is one decision; an episode's rows stand together, in order.

    episode [R]: whose it is, counted over this process's episodes (group-major). rewards [R,T]: of its environment
    steps. executed [R]: how many it took. terminated [R]: nothing comes after it. last [R]: its episode ended here, by
    itself or cut. final: what was seen at the end of each episode. place [R]: its number among ``total`` rows of all
    processes, whatever their count.
    """

    episode: Tensor
    rewards: Tensor
    executed: Tensor
    terminated: Tensor
    last: Tensor
    final: Context
    place: Tensor
    total: int


@dataclass(frozen=True)
class Rollout:
    """M groups of N episodes, of which this process owns some; a prompt is an episode of one decision.

    trajectory, context, outputs: the R rows (decisions) of the groups ``local`` [m], group-major. parts, rewards: of
    the episodes of *all* groups, [M,N] fp64 on the CPU, so that every process computes the same advantages. weights: of
    the parts. prompts: the M groups' prompts.
    """

    trajectory: Trajectory
    context: Context
    outputs: Tensor
    parts: Mapping[str, Tensor]
    weights: Mapping[str, float]
    rewards: Tensor
    prompts: tuple[str, ...]
    local: Tensor
    decisions: Decisions

    @property
    def ragged(self) -> bool:
        """Whether episodes, of whatever process, have several decisions, so that rows are not groups of N."""
        return self.decisions.total > self.rewards.numel()

    def rows(self, values: Tensor) -> Tensor:
        """Pick this process's rows from episodes' values [M,N]: [R] fp32 on the trajectory's device."""
        return values[self.local].flatten()[self.decisions.episode].float().to(self.trajectory.x0.device)


@dataclass(frozen=True)
class Scored:
    """A stored step of b rows under the current weights: all that a loss on transitions needs.

    new: the transition now (with its graph); old: the one that acted; reference: the one of the policy at step 0, if
    asked; x [b,*E] the sample all three are scored on, restricted to the dims that likelihoods count; advantage [b];
    std: the step's total std; dt = t - s > 0; gain: kappa = d mean / d output. index: the step's place 0 .. steps - 1
    among the kept steps. std, dt, gain and index are [b] where rows are at steps of their own.
    """

    new: Gaussian
    old: Gaussian
    reference: Gaussian | None
    x: Tensor
    advantage: Tensor
    std: float | Tensor
    dt: float | Tensor
    gain: float | Tensor
    index: int | Tensor
    steps: int


@dataclass(frozen=True)
class Judged:
    """What `collect` returns for the groups it was given: B rows, and their rewards by name [B]."""

    trajectory: Trajectory
    context: Context
    outputs: Tensor
    parts: dict[str, Tensor]


def collect(
    policy: ChainPolicy,
    context: Context,
    reward: WeightedRewards,
    noise: Noise,
    *,
    members: int,
    branch_at: int | None = None,
    keep: tuple[int, int] | None = None,
    storage: torch.dtype = torch.float32,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Judged:
    """Sample one output per row of ``context`` (group-major, ``members`` to a group), decode it and judge it.

    ``on_phase`` is told "sample", "decode", "reward" as each begins (timing, moving models in turn).
    """
    on_phase("sample")
    with torch.no_grad():
        condition = policy.model.encode(context)
    trajectory = policy.sample(condition, noise, members=members, branch_at=branch_at, keep=keep, storage=storage)
    on_phase("decode")
    with torch.no_grad():
        outputs = policy.model.decode(trajectory.x0)
    on_phase("reward")
    parts = reward.parts(outputs, context)
    return Judged(trajectory, context, outputs.float().cpu(), parts)


def recount(policy: ChainPolicy) -> Callable[[], None]:
    """What to call before work begins again: evaluations since now are forgotten, because aborted work does not count."""
    counted = policy.model.evaluations

    def restart() -> None:
        policy.model.evaluations = counted

    return restart


def concatenate(judged: list[Judged], policy: ChainPolicy) -> Judged:
    """Chunks of rows sampled one after the other, as one."""
    if len(judged) == 1:
        return judged[0]
    prompts = [prompt for j in judged for prompt in j.context.prompts]
    first = judged[0].trajectory
    trajectory = replace(
        first,
        condition=policy.model.encode(Context(prompts)),
        **{name: torch.cat([getattr(j.trajectory, name) for j in judged]) for name in ("x", "mean", "std", "x0")},
    )
    parts = {name: torch.cat([j.parts[name] for j in judged]) for name in judged[0].parts}
    return Judged(trajectory, Context(prompts), torch.cat([j.outputs for j in judged]), parts)


@dataclass(frozen=True)
class Lived:
    """What `live` returns: E episodes as R rows, and by name what each episode came to, [E]."""

    trajectory: Trajectory
    context: Context
    outputs: Tensor
    parts: dict[str, Tensor]
    decisions: Decisions


def live(
    policy: ChainPolicy,
    environments: Environments,
    seeds: Sequence[int],
    noise: Noise,
    *,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Lived:
    """Play an episode from each seed, and keep everything a method may learn from. parts: return, success, length."""
    on_phase("sample")
    # what was encoded is encoded again below, all at once: a VLA's condition holds its whole prefix
    made = [
        replace(decision, trajectory=replace(decision.trajectory, condition=torch.empty(0)))
        for decision in play(policy, environments, seeds, noise)
    ]
    order = _episode_by_episode(made)
    episode = torch.cat([d.episode for d in made])[order]
    context = Context.cat([d.context for d in made])[order]
    steps = [d.step for d in made]
    terminated, truncated, success, executed = (
        torch.cat([getattr(step, name) for step in steps])[order]
        for name in ("terminated", "truncated", "success", "executed")
    )
    rewards = torch.cat([step.rewards for step in steps])[order].double()
    last = terminated | truncated
    ends = last.nonzero().flatten()
    final = Context.cat([step.context for step in steps])[order[ends]]
    with torch.no_grad():
        condition = policy.model.encode(context)
    stored = {
        name: torch.cat([getattr(d.trajectory, name) for d in made])[order] for name in ("x", "mean", "std", "x0")
    }
    trajectory = replace(made[0].trajectory, condition=condition, **stored)
    zeros = torch.zeros(len(seeds), dtype=torch.float64)
    parts = {
        "return": zeros.index_add(0, episode, rewards.sum(1)),
        "success": success[ends].double(),
        "length": zeros.index_add(0, episode, executed.double()),
    }
    decisions = Decisions(episode, rewards, executed, terminated, last, final, torch.arange(len(order)), len(order))
    return Lived(trajectory, context, torch.cat([d.actions for d in made])[order], parts, decisions)


def _episode_by_episode(made: Sequence[Decision]) -> Tensor:
    """The order that puts the rows of each episode together, in time."""
    episode, h = torch.cat([d.episode for d in made]), torch.cat([d.h for d in made])
    return (episode * (int(h.max()) + 1) + h).argsort()


def single(rewards: Tensor, context: Context, place: Tensor, total: int) -> Decisions:
    """Prompts as episodes of one decision: rewards [B], all over after it."""
    rows, ended = torch.arange(len(rewards)), torch.ones(len(rewards), dtype=torch.bool)
    return Decisions(rows, rewards[:, None], torch.ones_like(rows), ended, ended, context, place, total)
