"""Replay: recorded decisions to learn from off the policy: what was seen, what was done, what came
of it, what was seen next.

It stores observations, not features: what a critic sees of them is computed when the encoder is
settled, and again when it has changed (`encoded`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from genpolicy.chain.values import Condition
from genpolicy.contracts.dataset import Dataset, Merged
from genpolicy.contracts.model import ControlModel
from genpolicy.contracts.task import Context

REWARD, SUCCESS = "next.reward", "next.success"
"""LeRobot's names of the outcome of a frame."""
AT_ONCE = 1024
"""Observations that are encoded together."""


@dataclass(frozen=True)
class Replay:
    """R decisions over F views.

    views: F observations. now, after [R]: the views before and after each decision (where nothing
    comes after it, any). event [R,*E]: the chunk that was carried out, as the chain has it. start
    [R,*E]: the noise that it was drawn from, nan where it was not. rewards [R,T]: of its
    environment steps. executed [R]: how many were taken. human [R,T]: which of them a person took.
    terminated [R]: nothing comes after. success [R]: its episode succeeded. episode [R]: whose it
    is. first [R]: it is the first of its episode.
    """

    views: Context
    now: Tensor
    after: Tensor
    event: Tensor
    start: Tensor
    rewards: Tensor
    executed: Tensor
    human: Tensor
    terminated: Tensor
    success: Tensor
    episode: Tensor
    first: Tensor

    def __len__(self) -> int:
        return len(self.now)

    def __getitem__(self, rows: Tensor) -> "Replay":
        """The decisions of these rows, over the same views."""
        kept = {name: getattr(self, name)[rows] for name in ROWS}
        return Replay(self.views, **kept)

    @classmethod
    def cat(cls, parts: Sequence["Replay"]) -> "Replay":
        """Several recordings as one."""
        rows: dict[str, list[Tensor]] = {name: [] for name in ROWS}
        views = episodes = 0
        for part in parts:
            shift = {"now": views, "after": views, "episode": episodes}
            for name, values in rows.items():
                values.append(
                    getattr(part, name) + shift[name] if name in shift else getattr(part, name)
                )
            views += len(part.views)
            episodes += int(part.episode.max()) + 1 if len(part) else 0
        return cls(
            Context.cat([p.views for p in parts]),
            **{name: torch.cat(values) for name, values in rows.items()},
        )

    @classmethod
    def of_episodes(
        cls,
        episodes: Sequence[Mapping[str, Any]],
        model: ControlModel,
        cut_fails: bool = False,
    ) -> "Replay":
        """Episodes as `genpolicy.rollout.recorder.live` writes them: a row is a decision of the
        policy, or of a person, whose chunk ``model`` puts as the chain has it. cut_fails: nothing
        comes after an episode that was cut.
        """
        contexts, parts, begin = [], [], 0
        for number, e in enumerate(episodes):
            length = len(e["x0"])
            contexts += [
                Context(e["prompts"], e["observation"]),
                Context(e["prompts"][-1:], e["final"]),
            ]
            now = begin + torch.arange(length)
            human = e.get("human", torch.zeros_like(e["rewards"], dtype=torch.bool))
            event, start = _by_hand(e, human, model)
            row = {"now": now, "after": now + 1, "event": event, "rewards": e["rewards"].double()}
            row |= {
                "start": start,
                "executed": e["executed"],
                "human": human,
                "terminated": e["terminated"] | (e["truncated"] & cut_fails),
            }
            row |= {
                "success": e["success"][-1:].repeat(length),
                "episode": torch.full((length,), number),
            }
            row["first"] = torch.arange(length) == 0
            parts.append(row)
            begin += length + 1
        return cls(
            Context.cat(contexts), **{name: torch.cat([p[name] for p in parts]) for name in ROWS}
        )

    @classmethod
    def of_dataset(cls, data: Dataset, model: ControlModel, cut_fails: bool = False) -> "Replay":
        """A data set's frames, each as the decision that it could have been: the chunk that follows
        it. What came of it is decided by `outcome`, of several data sets for each by itself.

        An episode ended by itself where it succeeded; where it was cut, what comes after its last
        chunk was not recorded, and that chunk is left out, unless nothing does (``cut_fails``).
        """
        if isinstance(data, Merged):
            return cls.cat([cls.of_dataset(part, model, cut_fails) for part in data.parts])
        number = data.episode.unique_consecutive(return_inverse=True)[1]
        lengths = number.bincount()
        last = (lengths.cumsum(0) - 1)[number]
        frame, steps = torch.arange(len(number)), torch.arange(model.executed)
        reward, success = outcome(data)
        succeeded = success[number]
        executed = (last - frame + 1).clamp_max(model.executed)
        ends = frame + model.executed > last
        views, actions, _ = data.rows(frame, model.history, model.horizon)
        event = model.event(actions).cpu()
        inside = steps < executed[:, None]
        rewards = reward[(frame[:, None] + steps).clamp_max(len(frame) - 1)] * inside
        whole = cls(
            views,
            frame,
            torch.minimum(frame + model.executed, last),
            event,
            torch.full_like(event, math.nan),
            rewards,
            executed,
            torch.zeros_like(inside),
            ends & (succeeded | cut_fails),
            succeeded,
            number,
            frame == (last - lengths[number] + 1),
        )
        return whole[(~ends | whole.terminated).nonzero().flatten()]

    def returns(self, gamma: float) -> Tensor:
        """The return of every decision's episode from there on, sum_j gamma^j r_j over its
        environment steps: [R] fp64, nan where the recording stops before the episode does.
        """
        row_of = torch.full((len(self.views) + 1,), -1)
        row_of[self.now] = torch.arange(len(self))
        following = torch.where(self.terminated, -1, row_of[self.after]).tolist()
        steps = torch.arange(self.rewards.shape[1])
        happened = torch.where(steps < self.executed[:, None], self.rewards.double(), 0.0)
        own = (happened * gamma**steps).sum(1).tolist()
        discount, over = (gamma ** self.executed.double()).tolist(), self.terminated.tolist()
        found = [math.nan] * len(self)
        for row in reversed(range(len(self))):  # a decision's next one stands behind it
            rest = 0.0 if over[row] else found[following[row]] if following[row] > row else math.nan
            found[row] = own[row] + discount[row] * rest
        return torch.tensor(found, dtype=torch.float64)

    @torch.no_grad()
    def encoded(self, model: ControlModel) -> Condition:
        """The views as conditions of the policy, [F], by the encoder as it is now."""
        parts = [model.encode(self.views[rows]) for rows in _slices(len(self.views))]
        return torch.cat(parts)  # type: ignore[arg-type]


def _by_hand(
    episode: Mapping[str, Any], human: Tensor, model: ControlModel
) -> tuple[Tensor, Tensor]:
    """The chunks of an episode's R decisions as the chain has them, and the noise they were drawn
    from. The policy's own are those that it planned; a person's are what was executed around the
    decision's first step, up to the hand-back, before which the last action is repeated.
    """
    event, start = episode["x0"], episode["start"]
    rows = human.any(1).nonzero().flatten()
    if not len(rows):
        return event, start
    executed = episode["executed"]
    inside = torch.arange(human.shape[1]) < executed[:, None]
    actions = episode["actions"][inside]  # [L,D], step by step
    theirs = human[inside]
    # of each step of the person: the last one before a step of the robot
    steps = torch.arange(len(theirs))
    robots = torch.where(theirs, len(steps), steps)
    ends = robots.flip(0).cummin(0).values.flip(0) - 1
    begins = (executed.cumsum(0) - executed)[rows, None]
    wanted = begins + torch.tensor(model.horizon)
    at = torch.minimum(wanted.clamp_min(0), ends[begins])
    event, start = event.clone(), start.clone()
    event[rows] = model.event(actions[at]).to(event)
    start[rows] = math.nan
    return event, start


def outcome(data: Dataset) -> tuple[Tensor, Tensor]:
    """The outcome of the N episodes of one data set: the reward of every frame [F] fp64, and which
    episodes succeeded, bool [N].

    Without "next.success" an episode succeeded where it was rewarded, and without "next.reward" too
    it is a demonstration, which succeeded at its last frame. Without "next.reward" a frame of
    success is rewarded with 1.
    """
    number = data.episode.unique_consecutive(return_inverse=True)[1]
    last = torch.ones_like(number, dtype=torch.bool)
    last[:-1] = number[1:] != number[:-1]
    judged = data.columns.get(SUCCESS, data.columns.get(REWARD, last.float()))
    success = judged.flatten() > 0
    reward = data.columns.get(REWARD, success.float()).flatten().double()
    count = torch.zeros(int(number.max()) + 1).index_add(0, number, success.float())
    return reward, count > 0


ROWS = tuple(field.name for field in fields(Replay) if field.name != "views")
"""The fields that a `Replay` has of every decision."""


def _slices(count: int) -> Iterator[slice]:
    yield from (slice(begin, min(begin + AT_ONCE, count)) for begin in range(0, count, AT_ONCE))
