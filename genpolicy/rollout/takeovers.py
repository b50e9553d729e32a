"""Take-overs: a person acts in the place of the policy for some steps of an episode.

A chunk that is learned from is one actor's. It is cut where the next step is another's: what is
seen there comes after it, and the episode goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError
from genpolicy.contracts.model import ControlModel
from genpolicy.contracts.task import Context
from genpolicy.rollout.frames import PICTURES
from genpolicy.rollout.recorder import FRAMES


def last_own(episode: Tensor, human: Tensor) -> Tensor:
    """The last frame up to which the actor of each frame goes on without a break, in its episode:
    [F], of ``episode`` [F] and of which frames a person acted in, bool [F].
    """
    other = (episode[1:] != episode[:-1]) | (human[1:] != human[:-1])
    ends = torch.cat([other, other.new_ones(1)]).nonzero().flatten()
    return ends[torch.searchsorted(ends, torch.arange(len(episode)))]


@dataclass(frozen=True)
class Kept:
    """The decisions of an episode that was kept, each of one actor's steps: R of them.

    views: what was seen before each of them. event [R,*E], start [R,*E], rewards [R,T], executed
    [R], human [R,T]: as of `Replay`.
    """

    views: Context
    event: Tensor
    start: Tensor
    rewards: Tensor
    executed: Tensor
    human: Tensor

    def __len__(self) -> int:
        return len(self.executed)


def decisions(episode: Mapping[str, Any], model: ControlModel | None) -> Kept:
    """The decisions of an episode as `genpolicy.rollout.recorder.live` writes it, those cut where a
    person takes over, or hands back, between two steps of one. What a person did was drawn from no
    noise; its event is made of the executed actions.

    Raises `ValueError` where a person acted and there is no ``model`` to make events, and
    `ConfigError` where a decision is both a person's and the policy's and what was seen in between
    was not kept.
    """
    executed, rewards = episode["executed"], episode["rewards"].double()
    steps = torch.arange(rewards.shape[1])
    human = episode.get("human", torch.zeros_like(rewards, dtype=torch.bool))
    human = human & (steps < executed[:, None])
    views = Context(episode["prompts"], episode["observation"])
    whole = Kept(views, episode["x0"], episode["start"], rewards, executed, human)
    if not bool(human.any()):
        return whole
    if model is None:
        raise ValueError("a person acted in this episode: name the model that makes events of it")
    # the episode step by step: L of them
    taken = steps < executed[:, None]
    person, paid, done = human[taken], rewards[taken], episode["actions"][taken]
    of = torch.arange(len(executed)).repeat_interleave(executed)
    own = last_own(of, person)
    begin = torch.cat([own.new_zeros(1), own.unique()[:-1] + 1])
    count = own[begin] - begin + 1
    place = begin[:, None] + steps
    inside = steps < count[:, None]
    place = place.clamp_max(len(of) - 1)
    # a chunk goes on as long as its actor does, and then with the last of its actions
    until = last_own(torch.zeros_like(of), person)[begin]
    asked = begin[:, None] + torch.tensor(model.horizon)
    acted = model.event(done[torch.minimum(asked.clamp_min(0), until[:, None])]).cpu()
    first = begin == (executed.cumsum(0) - executed)[of[begin]]
    planned = first & ~person[begin]
    where = planned.view(-1, *[1] * (whole.event.ndim - 1))
    return Kept(
        _views(episode, begin, of[begin], bool(first.all()), model.history),
        torch.where(where, whole.event[of[begin]], acted),
        torch.where(where, whole.start[of[begin]], torch.nan),
        paid[place] * inside,
        count,
        person[place] & inside,
    )


def _views(
    episode: Mapping[str, Any], begin: Tensor, decision: Tensor, at_decisions: bool, history: int
) -> Context:
    """What was seen before the steps ``begin`` [R], of the decisions ``decision`` [R]; all of them
    begin with one, or not.
    """
    prompts = [episode["prompts"][h] for h in decision.tolist()]
    if at_decisions:
        seen = episode["observation"]
        return Context(prompts, {name: value[decision] for name, value in seen.items()})
    if FRAMES not in episode:
        raise ConfigError(
            "a decision of this episode is both a person's and the policy's, and what was seen when"
            " one followed the other was not kept: collect with record: true in the experiment"
        )
    past = (begin[:, None] + torch.arange(1 - history, 1)).clamp_min(0)
    return Context(
        prompts,
        {
            name: value[past] / 255 if name.startswith(PICTURES) else value[past]
            for name, value in episode[FRAMES].items()
        },
    )
