"""Recording episodes: everything that a method may learn from, kept as it is played."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from genpolicy.chain import Noise, Trajectory
from genpolicy.contracts.task import Context, Environments, TaskStep
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.episodes import play
from genpolicy.rollout.frames import FrameByFrame
from genpolicy.rollout.person import takeovers
from genpolicy.rollout.rollout import Decisions

CHAIN = ("start", "x", "mean", "std", "x0")
"""The tensors that a rollout keeps of a trajectory, beside its condition,"""


OUTCOME = ("rewards", "executed", "terminated", "truncated", "success")
"""and of what came of it,"""
PERSON = ("actions", "human")
"""with what a `TaskStep` says besides where a person can take over."""
FRAMES = "frames"
"""The key of an episode for what was seen before each of its actions, where that is kept."""


@dataclass(frozen=True)
class Lived:
    """The result of `live`: E episodes as R rows, and by name what each episode came to, [E]."""

    trajectory: Trajectory
    context: Context
    outputs: Tensor
    parts: dict[str, Tensor]
    decisions: Decisions


class Ledger(Protocol):
    """The place where the episodes of a rollout are written down as they end,
    and read again after a run was killed.
    """

    def read(self, episode: int) -> dict[str, Any] | None:
        """An episode that is there already, as it was written."""
        ...

    def write(self, episode: int, rows: dict[str, Any]) -> None: ...

    def found(self, known: int, asked: int) -> None:
        """Called before anybody acts where episodes are there already: how many of how many."""
        ...


def live(
    policy: ChainPolicy,
    environments: Environments,
    seeds: Sequence[int],
    noise: Noise,
    *,
    ledger: Ledger | None = None,
    frames: FrameByFrame | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Lived:
    """Play an episode from each seed, and keep everything a method may learn from. parts: return,
    success, length; where a person can take over, also person (steps) and takeovers.

    ledger: what it has is not played again, and what is played is written there, with what was seen
    before every single action too where the environments are, or act through, ``frames``.
    """
    on_phase("sample")
    known = (
        {}
        if ledger is None
        else {e: rows for e in range(len(seeds)) if (rows := ledger.read(e)) is not None}
    )
    if ledger is not None and known:
        ledger.found(len(known), len(seeds))
    world = _Recalling(environments, known) if known else environments
    made = dict(known)
    for episode, slot, rows in _episodes(policy, world, seeds, noise):
        if episode not in known:
            made[episode] = rows
            if ledger is not None:
                seen = {FRAMES: frames.frames(slot)} if frames is not None else {}
                ledger.write(episode, {**rows, **seen})
    return _lived([made[e] for e in range(len(seeds))], policy)


class _Recalling:
    """Environments of which some episodes are known: those answer with what was written down, and
    nothing moves. Everybody else acts beside the same rows as if all were played, so that not even
    a matrix product is rounded in another way. Episodes must begin in their order, as in `play`.
    """

    def __init__(self, environments: Environments, known: Mapping[int, Mapping[str, Any]]) -> None:
        self.count, self._world, self._known = environments.count, environments, known
        self._begun = 0
        self._at: dict[int, tuple[int, int]] = {}  # slot -> its episode, and decisions so far

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> Context:
        for slot in slots:
            self._at[slot] = (self._begun, 0)
            self._begun += 1
        moving = self._moving(slots)
        seen = [self._recalled(slot) for slot in slots]
        if moving:
            fresh = self._world.reset(
                [slots[row] for row in moving], [seeds[row] for row in moving]
            )
            for place, row in enumerate(moving):
                seen[row] = fresh[place : place + 1]
        return Context.cat(seen)

    def step(self, slots: Sequence[int], actions: Tensor) -> TaskStep:
        moving = self._moving(slots)
        rows = [self._known.get(self._at[slot][0]) for slot in slots]
        h = [self._at[slot][1] for slot in slots]
        for slot in slots:
            self._at[slot] = (self._at[slot][0], self._at[slot][1] + 1)
        seen = [self._recalled(slot) for slot in slots]
        parts = [
            {name: known[name][j : j + 1] for name in _told(known)} if known else {}
            for known, j in zip(rows, h, strict=True)
        ]
        if moving:
            fresh = self._world.step([slots[row] for row in moving], actions[moving])
            for place, row in enumerate(moving):
                seen[row] = fresh.context[place : place + 1]
                parts[row] = {
                    name: getattr(fresh, name)[place : place + 1]
                    for name in (*OUTCOME, *PERSON)
                    if getattr(fresh, name) is not None
                }
        return TaskStep(
            Context.cat(seen),
            **{name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        )

    def render(self, slot: int) -> Any:
        return self._world.render(slot)

    def close(self) -> None:
        self._world.close()

    def _moving(self, slots: Sequence[int]) -> list[int]:
        """The rows whose episode is not known."""
        return [row for row, slot in enumerate(slots) if self._at[slot][0] not in self._known]

    def _recalled(self, slot: int) -> Context:
        """The observation in a slot now, as it was written down (nothing, if it is not known)."""
        episode, h = self._at[slot]
        rows = self._known.get(episode)
        if rows is None:
            return Context([])
        if h == len(rows["x0"]):
            return Context(rows["prompts"][-1:], rows["final"])
        return Context(
            rows["prompts"][h : h + 1],
            {name: value[h : h + 1] for name, value in rows["observation"].items()},
        )


def _episodes(
    policy: ChainPolicy, environments: Environments, seeds: Sequence[int], noise: Noise
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(which seed's, in which slot, its rows) of every episode as it ends."""
    going: dict[int, list[dict[str, Any]]] = {}
    for decision in play(policy, environments, seeds, noise):
        chain, step = _kept(decision.trajectory), decision.step
        last = (step.terminated | step.truncated).tolist()
        for row, episode in enumerate(decision.episode.tolist()):
            one = slice(row, row + 1)
            made: dict[str, Any] = {name: value[one].clone() for name, value in chain.items()}
            made |= {name: getattr(step, name)[one].clone() for name in OUTCOME}
            made |= {
                "actions": decision.actions[one].clone(),
                "observation": _observed(decision.context, one),
            }
            made["prompts"] = [decision.context.prompts[row]]
            if step.human is not None:
                made["human"] = step.human[one].clone()
            going.setdefault(episode, []).append(made)
            if last[row]:
                rows = going.pop(episode)
                whole: dict[str, Any] = {
                    name: torch.cat([r[name] for r in rows])
                    for name in (*CHAIN, "actions", *_told(made))
                }
                whole["observation"] = {
                    name: torch.cat([r["observation"][name] for r in rows])
                    for name in made["observation"]
                }
                whole["prompts"] = [prompt for r in rows for prompt in r["prompts"]]
                whole["final"] = _observed(step.context, one)
                yield episode, decision.slots[row], whole


def _told(episode: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what a recorded episode, or decision, came to: a person's too, where one could
    take over.
    """
    return (*OUTCOME, *PERSON) if "human" in episode else OUTCOME


def _kept(trajectory: Trajectory) -> dict[str, Tensor]:
    """The tensors of a trajectory that are recorded, by name, on the CPU: there they meet episodes
    that are read again and those of data sets.
    """
    return {name: getattr(trajectory, name).cpu() for name in CHAIN}


def _observed(context: Context, one: slice) -> dict[str, Tensor]:
    return {name: value[one].clone() for name, value in context.observation.items()}


def _lived(episodes: Sequence[dict[str, Any]], policy: ChainPolicy) -> Lived:
    """Episodes one after the other."""

    def joined(name: str) -> Tensor:
        return torch.cat([episode[name] for episode in episodes])

    lengths = torch.tensor([len(e["x0"]) for e in episodes])
    number = torch.arange(len(episodes)).repeat_interleave(lengths)
    prompts = [prompt for e in episodes for prompt in e["prompts"]]
    context = Context(prompts, _stacked([e["observation"] for e in episodes]))
    final = Context([e["prompts"][-1] for e in episodes], _stacked([e["final"] for e in episodes]))
    # a VLA's condition holds its whole prefix: it is encoded again, all at once
    with torch.no_grad():
        condition = policy.model.encode(context)
    start, x, mean, std, x0 = (joined(name).to(policy.model.device) for name in CHAIN)
    first = policy.chain.stochastic.start
    trajectory = Trajectory(
        condition, x, mean, std, x0, first=first, start=start, chain=policy.chain
    )
    terminated, truncated, rewards = (
        joined("terminated"),
        joined("truncated"),
        joined("rewards").double(),
    )
    last, executed = terminated | truncated, joined("executed")
    zeros = torch.zeros(len(episodes), dtype=torch.float64)
    parts = {
        "return": zeros.index_add(0, number, rewards.sum(1)),
        "success": joined("success")[last].double(),
        "length": zeros.index_add(0, number, executed.double()),
    }
    if "human" in episodes[0]:
        human = joined("human")
        first = torch.cat([torch.arange(len(e["x0"])) == 0 for e in episodes])
        parts["person"] = zeros.index_add(0, number, human.double().sum(1))
        parts["takeovers"] = zeros.index_add(0, number, takeovers(human, first).double())
    decisions = Decisions(
        number, rewards, executed, terminated, last, final, torch.arange(len(last)), len(last)
    )
    return Lived(trajectory, context, joined("actions"), parts, decisions)


def _stacked(observations: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([o[name] for o in observations]) for name in observations[0]}
