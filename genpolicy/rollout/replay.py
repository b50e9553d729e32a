"""Replay: recorded decisions to learn from off the policy: what was seen, what was done, what came
of it, what was seen next.

It stores observations, not features: what a critic sees of them is computed when the encoder is
settled, and again when it has changed (`encoded`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from genpolicy.chain.values import Condition, joined
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Dataset, Merged
from genpolicy.contracts.model import ControlModel
from genpolicy.contracts.task import Context
from genpolicy.rollout.columns import (
    DECISION,
    DONE,
    EXECUTED,
    INTERVENTION,
    REWARD,
    START,
    SUCCESS,
    TRUNCATED,
)
from genpolicy.rollout.takeovers import decisions, last_own

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
        cut_fails: bool = False,
        model: ControlModel | None = None,
    ) -> "Replay":
        """Episodes as `genpolicy.rollout.recorder.live` writes them: a row is a decision of the
        policy, or of a person's (see `genpolicy.rollout.takeovers`, which then needs the
        ``model``). cut_fails: nothing comes after an episode that was cut.
        """
        contexts, parts, begin = [], [], 0
        for number, e in enumerate(episodes):
            kept = decisions(e, model)
            length = len(kept)
            contexts += [kept.views, Context(e["prompts"][-1:], e["final"])]
            now = begin + torch.arange(length)
            over = bool(e["terminated"][-1] | (e["truncated"][-1] & cut_fails))
            row = {
                "now": now,
                "after": now + 1,
                "event": kept.event,
                "start": kept.start,
                "rewards": kept.rewards,
                "executed": kept.executed,
                "human": kept.human,
                "terminated": (torch.arange(length) == length - 1) & over,
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
        it, cut where a person takes over or hands back. What came of it is decided by `outcome`,
        of several data sets for each by itself.

        An episode ended by itself where the data set says so (`ended`); where it was cut, what
        comes after its last chunk was not recorded, and that chunk is left out, unless nothing does
        (``cut_fails``). The noise of a decision is that of the chunk which begins where it does and
        has as many steps.
        """
        if isinstance(data, Merged):
            return cls.cat([cls.of_dataset(part, model, cut_fails) for part in data.parts])
        number = data.episode.unique_consecutive(return_inverse=True)[1]
        lengths = number.bincount()
        last = (lengths.cumsum(0) - 1)[number]
        frame, steps = torch.arange(len(number)), torch.arange(model.executed)
        reward, success = outcome(data)
        succeeded = success[number]
        human = data.columns.get(INTERVENTION, torch.zeros(len(frame))).flatten() > 0
        own = last_own(number, human)
        executed = (own - frame + 1).clamp_max(model.executed)
        ends = frame + executed > last
        views, actions, _ = data.rows(frame, model.history, model.horizon)
        if bool(human.any()):  # a chunk goes on as long as its actor does
            asked = frame[:, None] + torch.tensor(model.horizon)
            begin = last - lengths[number] + 1
            actions = data.columns["action"][asked.clamp(begin[:, None], own[:, None])]
        event = model.event(actions).cpu()
        inside = steps < executed[:, None]
        rewards = reward[(frame[:, None] + steps).clamp_max(len(frame) - 1)] * inside
        whole = cls(
            views,
            frame,
            torch.minimum(frame + executed, last),
            event,
            _noise(data, event, executed, human),
            rewards,
            executed,
            inside & human[:, None],
            ends & (ended(data, success)[number] | cut_fails),
            succeeded,
            number,
            frame == (last - lengths[number] + 1),
        )
        return whole[(~ends | whole.terminated).nonzero().flatten()]

    def following(self) -> Tensor:
        """The row of the decision that was taken where each one led to, [R]; -1 where there is
        none: its episode ended or was cut there.
        """
        row_of = torch.full((len(self.views),), -1)
        row_of[self.now] = torch.arange(len(self))
        found = torch.where(self.terminated, -1, row_of[self.after])
        return torch.where(found > torch.arange(len(self)), found, -1)

    def returns(self, gamma: float) -> Tensor:
        """The return of every decision's episode from there on, sum_j gamma^j r_j over its
        environment steps: [R] fp64, nan where the recording stops before the episode does.
        """
        following, steps = self.following().tolist(), torch.arange(self.rewards.shape[1])
        happened = torch.where(steps < self.executed[:, None], self.rewards.double(), 0.0)
        own = (happened * gamma**steps).sum(1).tolist()
        discount, over = (gamma ** self.executed.double()).tolist(), self.terminated.tolist()
        found = [math.nan] * len(self)
        for row in reversed(range(len(self))):  # a decision's next one stands behind it
            rest = 0.0 if over[row] else found[following[row]] if following[row] >= 0 else math.nan
            found[row] = own[row] + discount[row] * rest
        return torch.tensor(found, dtype=torch.float64)

    def joined(self, length: int) -> "Replay":
        """Every decision with those that follow it in its episode, up to ``length`` together, as
        one: what was done, [R,length,*E] (behind the episode's end its last chunk again), what came
        of it, and what was seen after the last of them.
        """
        following = self.following()
        last, steps = torch.arange(len(self)), self.rewards.shape[1]
        rows, before = [], torch.zeros_like(self.executed)
        rewards = self.rewards.new_zeros(len(self), length * steps)
        human = self.human.new_zeros(len(self), length * steps)
        going = torch.ones(len(self), dtype=torch.bool)
        for _ in range(length):
            rows.append(last)
            # place this chunk's steps behind those that were taken before it
            offset = torch.arange(steps)
            taken = going[:, None] & (offset < self.executed[last][:, None])
            row, step = taken.nonzero(as_tuple=True)
            at = before[row] + step
            rewards[row, at] = self.rewards[last[row], step]
            human[row, at] = self.human[last[row], step]
            before = before + torch.where(going, self.executed[last], 0)
            going = going & (following[last] >= 0)
            last = torch.where(going, following[last], last)
        last = rows[-1]
        return replace(
            self,
            after=self.after[last],
            event=torch.stack([self.event[row] for row in rows], 1),
            start=torch.stack([self.start[row] for row in rows], 1),
            rewards=rewards,
            executed=before,
            human=human,
            terminated=self.terminated[last],
        )

    @torch.no_grad()
    def encoded(self, model: ControlModel) -> Condition:
        """The views as conditions of the policy, [F], by the encoder as it is now."""
        parts = [model.encode(self.views[rows]) for rows in _slices(len(self.views))]
        return joined(parts)


def outcome(data: Dataset) -> tuple[Tensor, Tensor]:
    """The outcome of the N episodes of one data set: the reward of every frame [F] fp64, and which
    episodes succeeded, bool [N].

    Without "next.success" an episode succeeded where it was rewarded, and without "next.reward" too
    it is a demonstration, which succeeded at its last frame. Without "next.reward" a frame of
    success is rewarded with 1. Raises `ConfigError` for a data set with a person's interventions
    and neither: a policy's episode is no demonstration, and hand-back is no success.
    """
    if INTERVENTION in data.columns and not {SUCCESS, REWARD} & set(data.columns):
        raise ConfigError(
            f"data: it has the column {INTERVENTION}, of a policy's episodes that a person"
            f" corrected, and neither {SUCCESS} nor {REWARD}: nothing says what came of them. Add"
            f" one (lerobot.datasets.dataset_tools.add_features), or imitate it (method bc)"
        )
    number = data.episode.unique_consecutive(return_inverse=True)[1]
    last = torch.ones_like(number, dtype=torch.bool)
    last[:-1] = number[1:] != number[:-1]
    judged = data.columns.get(SUCCESS, data.columns.get(REWARD, last.float()))
    success = judged.flatten() > 0
    reward = data.columns.get(REWARD, success.float()).flatten().double()
    count = torch.zeros(int(number.max()) + 1).index_add(0, number, success.float())
    return reward, count > 0


def ended(data: Dataset, success: Tensor) -> Tensor:
    """Returns which of the N episodes of a data set ended by themselves, so that nothing comes
    after them: bool [N]. Those that "next.done" and "next.truncated" say, which are read together;
    without both, those that succeeded, ``success`` [N].
    """
    if DONE not in data.columns or TRUNCATED not in data.columns:
        return success
    number = data.episode.unique_consecutive(return_inverse=True)[1]
    over = (data.columns[DONE] > 0) & ~(data.columns[TRUNCATED] > 0)
    return torch.zeros(len(success)).index_add(0, number, over.flatten().float()) > 0


def _noise(data: Dataset, event: Tensor, executed: Tensor, human: Tensor) -> Tensor:
    """The noise that the chunks [F,*E] of every frame were drawn from, where it was recorded, nan
    elsewhere.
    """
    noise = torch.full_like(event, math.nan)
    start = data.columns.get(START)
    if start is None or start.shape != event.flatten(1).shape:
        return noise
    begins = torch.ones_like(human)
    decision = torch.stack([data.episode.double(), data.columns[DECISION].flatten().double()])
    begins[1:] = (decision[:, 1:] != decision[:, :-1]).any(0)
    whole = begins & ~human & (executed == data.columns[EXECUTED].flatten())
    noise[whole] = start[whole].view_as(event[whole])
    return noise


ROWS = tuple(field.name for field in fields(Replay) if field.name != "views")
"""The fields that a `Replay` has of every decision."""


def _slices(count: int) -> Iterator[slice]:
    yield from (slice(begin, min(begin + AT_ONCE, count)) for begin in range(0, count, AT_ONCE))
