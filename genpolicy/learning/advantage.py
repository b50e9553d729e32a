"""Advantages: from rewards to how much better than expected each row was. Pure functions on fp64
tensors.

Rewards of whole episodes come as [M,N]: M groups of N members (one prompt, or one start state,
each); rewards of decisions as [R,T]: R decisions (rows) of up to T environment steps each.
"""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Scale = Literal["group", "all", "none"]
Kind = Literal["group", "all", "none", "leave_one_out", "prompt_history"]
Combine = Literal["sum", "z_sum"]


def group_relative(
    rewards: Tensor, scale: Scale = "group", eps: float = 1e-4, correction: int = 0
) -> Tensor:
    """A = (R - mean of the group) / (std + eps), [M,N] -> [M,N]; std has ddof ``correction``.

    scale: "group" the group's std (GRPO, arXiv 2402.03300; GRPO-Guard's configs), "all" the std of
    every reward of the iteration (flow_grpo's global_std, its SD3 default), "none" divides by
    nothing (Dr. GRPO, arXiv 2503.20783). eps: flow_grpo stat_tracking.py. A group whose rewards are
    all equal gives zeros.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (rewards.std(1, correction=correction, keepdim=True) + eps)
    if scale == "all":
        return centred / (rewards.std(correction=correction) + eps)
    raise ValueError(f"advantage scale is {scale!r}; valid are 'group', 'all', 'none'")


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): A_i = R_i - mean of the others in its group = N/(N-1) (R_i - mean),
    [M,N] -> [M,N].
    """
    members = rewards.shape[1]
    if members < 2:
        raise ValueError("leave-one-out needs at least 2 members in a group")
    return (rewards - rewards.mean(1, keepdim=True)) * members / (members - 1)


def discounted(rewards: Tensor, gamma: float) -> Tensor:
    """sum_j gamma^j r_j of a decision's environment steps, [R,T] -> [R]."""
    return rewards @ gamma ** torch.arange(rewards.shape[1], dtype=rewards.dtype)


def gae(
    rewards: Tensor,
    executed: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    last: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438 eq. 16) over decisions of n_h environment
    steps each, [R]:

        delta_h = sum_j gamma^j r_{h,j} + gamma^{n_h} V(s_{h+1}) (1 - terminated_h) - V(s_h)
        A_h     = delta_h + gamma^{n_h} lam A_{h+1} (1 - last_h)

    Rows are decisions, each episode's in order and together. rewards [R,T]; executed [R] = n_h;
    values [R] = V(s_h); next_values [R] = V of what is seen after the decision, where the episode
    was cut its *final* observation, never the first of the next one; terminated [R]: nothing comes
    after (no bootstrap); last [R]: the episode ended here, by itself or cut (the trace ends).
    """
    discount = gamma ** executed.to(values.dtype)
    delta = (
        discounted(rewards.to(values.dtype), gamma) + discount * next_values * ~terminated - values
    )
    carry = discount * lam * ~last
    advantage = torch.empty_like(delta)
    following = 0.0
    for row in reversed(range(len(delta))):
        following = float(delta[row]) + float(carry[row]) * following
        advantage[row] = following
    return advantage


class PromptHistory:
    """Per-prompt running statistics (DDPO): A = (R - mean)/(std + 1e-6) over the prompt's last
    ``size`` rewards.

    While a prompt has fewer than ``min_count`` of them, the whole batch's mean and std are used
    instead (ddpo-pytorch stat_tracking.py: buffer_size 16 or 32, min_count 16). It has a
    state_dict, so that Run can save and resume it.
    """

    def __init__(self, size: int = 32, min_count: int = 16) -> None:
        self.size, self.min_count = size, min_count
        self.history: dict[Hashable, deque[float]] = {}

    def __call__(self, rewards: Tensor, prompts: Sequence[Hashable]) -> Tensor:
        """rewards [M,N] with M prompts -> [M,N]; the rewards enter the history first."""
        rows: list[Tensor] = []
        for prompt, row in zip(prompts, rewards, strict=True):
            self.history.setdefault(prompt, deque(maxlen=self.size)).extend(
                float(reward) for reward in row
            )
        for prompt, row in zip(prompts, rewards, strict=True):
            seen = torch.tensor(list(self.history[prompt]), dtype=rewards.dtype)
            pool = seen if len(seen) >= self.min_count else rewards
            rows.append((row - pool.mean()) / (pool.std(correction=0) + 1e-6))
        return torch.stack(rows)

    def state_dict(self) -> dict[Hashable, list[float]]:
        return {prompt: list(values) for prompt, values in self.history.items()}

    def load_state_dict(self, state: dict[Hashable, list[float]]) -> None:
        self.history = {prompt: deque(values, maxlen=self.size) for prompt, values in state.items()}


class StageHistory:
    """Per-prompt statistics over an iteration and those before it (B²-DiffuRL):
    z = (R - mean) / (std + 1e-8) over every reward of the prompt in this iteration and in those of
    the ``past`` ones before it in which it was asked; std has ddof 1 (run_select.py). Where all are
    the same z is 0. It has a state_dict, so that Run can save and resume it.
    """

    def __init__(self, past: int = 8) -> None:
        self.past = past
        self.stages: dict[int, dict[str, list[float]]] = {}

    def __call__(self, rewards: Tensor, prompts: Sequence[str], iteration: int) -> Tensor:
        """rewards [M,N] with M prompts, of an iteration -> [M,N]."""
        now: dict[str, list[float]] = {}
        for prompt, row in zip(prompts, rewards, strict=True):
            now.setdefault(prompt, []).extend(float(reward) for reward in row)
        self.stages[iteration] = now
        self.stages = {i: seen for i, seen in self.stages.items() if i >= iteration - self.past}
        rows: list[Tensor] = []
        for prompt, row in zip(prompts, rewards, strict=True):
            pool = [value for seen in self.stages.values() for value in seen.get(prompt, [])]
            seen = torch.tensor(pool, dtype=rewards.dtype)
            spread = seen.std() if len(seen) > 1 else torch.zeros_like(seen[0])
            rows.append((row - seen.mean()) / (spread + 1e-8))
        return torch.stack(rows)

    def state_dict(self) -> dict[int, dict[str, list[float]]]:
        return {iteration: dict(seen) for iteration, seen in self.stages.items()}

    def load_state_dict(self, state: dict[int, dict[str, list[float]]]) -> None:
        self.stages = {iteration: dict(seen) for iteration, seen in state.items()}


class Advantage:
    """Rewards by name to one advantage per row, bounded to [-bound, bound] (public code clips at
    5).

    kind: the scale of `group_relative`, `leave_one_out`, or a `PromptHistory`. combine: "sum" adds
    the weighted rewards and scores the total; "z_sum" scores every reward by itself and adds the
    weighted scores (MixGRPO's advantage_aggr): a reward then counts by its weight, not by its
    scale. It has a state_dict, so that Run can save and resume it.
    """

    def __init__(self, kind: Kind = "group", combine: Combine = "sum", bound: float = 5.0) -> None:
        for what, value, valid in (
            ("kind", kind, get_args(Kind)),
            ("combine", combine, get_args(Combine)),
        ):
            if value not in valid:
                raise ValueError(f"advantage {what} is {value!r}; valid are {', '.join(valid)}")
        self.kind: Kind = kind
        self.combine, self.bound = combine, bound
        self.histories: dict[str, PromptHistory] = {}

    def __call__(
        self, parts: Mapping[str, Tensor], weights: Mapping[str, float], prompts: Sequence[str]
    ) -> Tensor:
        """parts: name -> [M,N] rewards; weights by the same names;
        the M groups' prompts -> [M,N].
        """
        if self.combine == "sum":
            total = torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)
            advantage = self._score("total", total, prompts)
        else:
            scores = [
                weights[name] * self._score(name, part, prompts) for name, part in parts.items()
            ]
            advantage = torch.stack(scores).sum(0)
        return advantage.clamp(-self.bound, self.bound)

    def _score(self, name: str, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.kind == "leave_one_out":
            return leave_one_out(rewards)
        if self.kind == "prompt_history":
            return self.histories.setdefault(name, PromptHistory())(rewards, prompts)
        return group_relative(rewards, self.kind)

    def state_dict(self) -> dict[str, Any]:
        return {name: history.state_dict() for name, history in self.histories.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, history in state.items():
            self.histories.setdefault(name, PromptHistory()).load_state_dict(history)
