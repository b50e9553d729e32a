"""Experience: the recorded episodes that a run learns from, those of the data section and those it
has collected itself.
"""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from genpolicy.chain.values import Condition
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.model import ControlModel
from genpolicy.contracts.task import Context
from genpolicy.rollout.replay import Replay
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.run import Run


class Experience:
    """The data section's episodes and those of the iterations that were added, as one replay, in
    memory.

    A checkpoint holds the iterations' numbers; the episodes themselves are in the run's folder
    (`EpisodeStore`), where every process reads all of them. cut_fails: True where nothing comes
    after an episode that its time limit cut. own: True where `replay` holds the run's own episodes
    alone, and the data section's are only imitated.
    """

    def __init__(self, run: Run, cut_fails: bool, own: bool = False) -> None:
        self.run = run
        self.model = cast(ControlModel, run.policy.model)
        self.cut_fails = cut_fails
        self.own = own
        self.iterations: list[int] = []
        self._everything: tuple[Replay, Replay] | None = None
        self.renew()
        run.register(experience=self)

    def renew(self) -> None:
        """Forgets what the encoder made of the views: call it when the encoder has changed."""
        self._conditions: Condition | None = None

    def add(self, iteration: int) -> None:
        """Adds the episodes that were kept in an iteration."""
        self.iterations.append(iteration)
        self.run.pin(iteration)
        self._everything = None
        self.renew()

    @property
    def _both(self) -> tuple[Replay, Replay]:
        """All decisions, and those that critics and models learn from. Raises `ConfigError` where
        there are none.
        """
        if self._everything is None:
            data = cast(Dataset | None, self.run.data)
            parts: list[Replay] = []
            if data is not None:
                parts.append(Replay.of_dataset(data, self.model, self.cut_fails))
            given = sum(map(len, parts))
            for iteration in self.iterations:
                parts.append(Replay.of_episodes(self.run.kept(iteration), self.cut_fails))
            if not parts or (self.own and not self.iterations):
                raise ConfigError(
                    "there is nothing to learn from: name recorded episodes in the data section,"
                    " or collect some"
                )
            whole = Replay.cat(parts)
            learned = whole[torch.arange(given, len(whole))] if self.own else whole
            self._everything = whole, learned
        return self._everything

    @property
    def everything(self) -> Replay:
        """All decisions, those of the data section first."""
        return self._both[0]

    @property
    def replay(self) -> Replay:
        """The decisions that critics and models learn from."""
        return self._both[1]

    @property
    def conditions(self) -> Condition:
        """The conditions of the replay's F views, by the encoder as it is."""
        if self._conditions is None:
            self._conditions = self.replay.encoded(self.model)
        return self._conditions

    @property
    def features(self) -> Tensor:
        """The replay's views as critics see them, Float[F,D]."""
        return self.model.features(self.conditions)

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
        self._everything = None
        self.renew()
