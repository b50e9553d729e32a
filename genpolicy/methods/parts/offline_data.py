"""Experience: the recorded episodes that a run learns from, those of the data section and those it
has collected itself.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from genpolicy.chain.values import Condition, joined
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Dataset, recordings
from genpolicy.contracts.model import ControlModel
from genpolicy.contracts.task import Context
from genpolicy.rollout.replay import REWARD, SUCCESS, Replay, outcome
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.build import called
from genpolicy.training.run import Run

AT_ONCE = 256
"""Views whose features are computed together: a prompt's are the mean of a large embedding."""


class Experience:
    """The data section's episodes and those of the iterations that were added, as one replay, in
    memory.

    A checkpoint holds the iterations' numbers; the episodes themselves are in the run's folder
    (`EpisodeStore`), where every process reads all of them. What came of the data section's is
    told to the person when it is read. cut_fails: True where nothing comes after an episode that
    its time limit cut. own: True where `replay` holds the run's own episodes alone, and the data
    section's are only imitated.
    """

    def __init__(self, run: Run, cut_fails: bool, own: bool = False) -> None:
        self.run = run
        self.model = cast(ControlModel, run.policy.model)
        self.cut_fails = cut_fails
        self.own = own
        self.iterations: list[int] = []
        self._parts: list[Replay] = []  # the data section's, if there is one, and each iteration's
        self._everything: Replay | None = None
        self._whole: Replay | None = None
        self.renew()
        run.register(experience=self)

    def renew(self) -> None:
        """Forgets what the encoder made of the views: call it when the encoder has changed."""
        self._encoded: list[Condition] = []
        self._conditions: Condition | None = None
        self._features: Tensor | None = None

    def add(self, iteration: int) -> None:
        """Adds the episodes that were kept in an iteration."""
        self.iterations.append(iteration)
        self.run.pin(iteration)
        self._everything = self._whole = self._conditions = self._features = None

    @property
    def parts(self) -> list[Replay]:
        """The data section's decisions, if there is one, and those of each iteration that was
        added, each read once.
        """
        data = cast(Dataset | None, self.run.data)
        if data is not None and not self._parts:
            self._parts.append(Replay.of_dataset(data, self.model, self.cut_fails))
            self._tell()
        for iteration in self.iterations[len(self._parts) - (data is not None) :]:
            kept = self.run.kept(iteration)
            self._require_one_reward([_returns(kept)])
            self._parts.append(Replay.of_episodes(kept, self.cut_fails, self.model))
        return self._parts

    @property
    def learned(self) -> list[Replay]:
        """Those of the `parts` that critics and models learn from. Raises `ConfigError` where there
        are none.
        """
        found = self.parts[1:] if self.own and self.run.data is not None else self.parts
        if not found:
            raise ConfigError(
                "there is nothing to learn from: name recorded episodes in the data section,"
                " or collect some"
            )
        return found

    @cached_property
    def _recordings(self) -> list[tuple[str, Dataset]]:
        """The data sets of the data section, each with what it is called."""
        data = cast(Dataset | None, self.run.data)
        section = self.run.experiment.data
        name = called(section) if isinstance(section, Mapping) else "data"
        return [] if data is None else recordings(data, name)

    def _tell(self) -> None:
        """Says how many of the data section's episodes succeeded, and what does not say it."""
        found = [(name, part, outcome(part)[1]) for name, part in self._recordings]
        episodes = sum(len(success) for _, _, success in found)
        succeeded = sum(int(success.sum()) for _, _, success in found)
        text = f"data: {succeeded} of {episodes} episodes succeeded"
        for name, part, success in found:
            if SUCCESS in part.columns:
                continue
            if REWARD in part.columns:
                text += f"; {name} has no {SUCCESS}: an episode counts as one where it was rewarded"
            else:
                text += f"; {name} records no outcome: its {len(success)} count as successes"
        self.run.say(text)

    def require_one_reward(self) -> None:
        """Raises `ConfigError` where a data set without rewards would be valued beside an
        environment, or a data set, that has rewards of its own. Call it when the policy has played
        its first evaluation.
        """
        before = self.run.deployment.before
        others = [(before["return"], before.get("success_rate", 0.0))] if before else []
        for _, part in self._recordings:
            if REWARD not in part.columns:
                continue
            reward, success = outcome(part)
            episode = part.episode.unique_consecutive(return_inverse=True)[1]
            returns = torch.zeros(len(success), dtype=torch.float64).index_add(0, episode, reward)
            worst = (returns - success.double()).abs().argmax()
            others.append((float(returns[worst]), float(success[worst])))
        self._require_one_reward(others)

    def _require_one_reward(self, found: Sequence[tuple[float, float]]) -> None:
        """Raises where a data set has no rewards, unless success alone is paid in what was found:
        (return, success) of episodes, or of their means.
        """
        lacking = [name for name, part in self._recordings if REWARD not in part.columns]
        if self.own or not lacking:
            return
        for paid, success in found:
            if abs(paid - success) > 1e-6:
                raise ConfigError(
                    f"data: {lacking[0]} has no column {REWARD}: its successes would be valued at"
                    f" 1, beside rewards of another kind (a return of {paid:g} at a success of"
                    f" {success:g}); record {REWARD}, take the task's sparse reward, or only"
                    " imitate the data (method rl100: offline.demonstrations: false)"
                )

    @property
    def everything(self) -> Replay:
        """All decisions, those of the data section first."""
        if self._everything is None:
            learned = self.learned
            alike = len(learned) == len(self.parts)
            self._everything = self.replay if alike else Replay.cat(self.parts)
        return self._everything

    @property
    def replay(self) -> Replay:
        """The decisions that critics and models learn from."""
        if self._whole is None:
            self._whole = Replay.cat(self.learned)
        return self._whole

    @property
    def conditions(self) -> Condition:
        """The conditions of the replay's F views, by the encoder as it is."""
        if self._conditions is None:
            for part in self.learned[len(self._encoded) :]:
                self._encoded.append(part.encoded(self.model))
            self._conditions = joined(self._encoded)
        return self._conditions

    @property
    def features(self) -> Tensor:
        """The replay's views as critics see them, Float[F,D]."""
        if self._features is None:
            rows = torch.arange(len(self.replay.views)).split(AT_ONCE)
            parts = [self.model.features(self.conditions[part]) for part in rows]
            self._features = torch.cat(parts)
        return self._features

    def redraw(
        self, states: int, number: int, samples: int = 1, branch_at: int | None = None
    ) -> tuple[Rollout, Tensor]:
        """Returns decisions that the policy draws at ``states`` recorded ones (of all processes
        together), ``samples`` in a row at each, and the indices [R] of the recorded ones in
        `replay`.

        number: of this redrawing in its iteration; another finds other decisions and other noise.
        branch_at: the samples at a state share their first ``branch_at`` denoising steps.
        """
        run = self.run
        drawn = run.rows(len(self.replay), states, "redrawn decisions", number)
        state = run.mine(np.arange(states)).repeat_interleave(samples)
        place = state * samples + torch.arange(len(state)) % samples
        index = drawn.repeat_interleave(samples)
        rollout = run.redraw(
            self.conditions[self.replay.now[index]],
            place,
            states * samples,
            number=number,
            members=samples,
            branch_at=branch_at,
        )
        return rollout, index

    def seen(self, index: Tensor) -> Tensor:
        """The views of the recorded decisions ``index`` [R] as critics see them, Float[R,D]."""
        return self.features[self.replay.now[index]]

    def done(self, rows: Tensor) -> tuple[Context, Tensor, Tensor | None]:
        """Reads the replay's decisions ``rows``, as a source of
        `genpolicy.methods.parts.imitation`: what was carried out counts.
        """
        replay = self.replay
        steps = torch.arange(replay.rewards.shape[1])
        event = replay.event[rows].to(self.model.device)
        mask = self.model.event_mask(steps >= replay.executed[rows][:, None])
        return replay.views[replay.now[rows]], event, mask

    def imitable(self, rows: Tensor) -> tuple[Context, Tensor, None]:
        """Reads decisions of episodes that succeeded, as a source of
        `genpolicy.methods.parts.imitation`.
        """
        replay = self.everything
        chosen = replay.success.nonzero().flatten()[rows]
        return replay.views[replay.now[chosen]], replay.event[chosen].to(self.model.device), None

    def state_dict(self) -> dict[str, Any]:
        return {"iterations": list(self.iterations)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iterations = list(state["iterations"])
        for iteration in self.iterations:
            self.run.pin(iteration)
        self._parts, self._everything, self._whole = [], None, None
        self.renew()


def _returns(episodes: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The return and the success of the episode in which they differ most."""
    both = [(float(e["rewards"].sum()), float(e["success"][-1])) for e in episodes]
    return max(both, key=lambda pair: abs(pair[0] - pair[1]))
