"""Experience: all that a run has to learn from off the policy, the data section and what it has
collected itself.
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

    What is saved with a checkpoint is which iterations there are; the episodes themselves are in
    the run's folder (`EpisodeStore`), where every process reads all of them. conditions, features:
    of the replay's views by the encoder as it is; `renew` says that it has changed. cut_fails:
    nothing comes after an episode that was cut. own: `replay` holds what the run has collected
    itself, and the data section's episodes are only imitated.
    """

    def __init__(self, run: Run, cut_fails: bool, own: bool = False) -> None:
        self.run, self.model, self.cut_fails, self.own = (
            run,
            cast(ControlModel, run.policy.model),
            cut_fails,
            own,
        )
        self.iterations: list[int] = []
        self._everything: tuple[Replay, Replay] | None = None
        self.renew()
        run.register(experience=self)

    def renew(self) -> None:
        """What was computed with another encoder is computed again when it is asked for."""
        self._conditions: Condition | None = None

    def add(self, iteration: int) -> None:
        """The episodes that were kept in this iteration belong to it from now on."""
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
            parts = [] if data is None else [Replay.of_dataset(data, self.model, self.cut_fails)]
            given = sum(map(len, parts))
            parts += [Replay.of_episodes(self.run.kept(i), self.cut_fails) for i in self.iterations]
            if not parts or (self.own and not self.iterations):
                raise ConfigError(
                    "there is nothing to learn from: name recorded episodes in the data section, or collect some"
                )
            whole = Replay.cat(parts)
            self._everything = whole, whole[torch.arange(given, len(whole))] if self.own else whole
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
        """[F]: of the replay's views."""
        if self._conditions is None:
            self._conditions = self.replay.encoded(self.model)
        return self._conditions

    @property
    def features(self) -> Tensor:
        """Float[F,D]: what critics see of the replay's views."""
        return self.model.features(self.conditions)

    def redraw(
        self, states: int, number: int, samples: int = 1, branch_at: int | None = None
    ) -> tuple[Rollout, Tensor]:
        """The policy's decisions at ``states`` recorded ones (of all processes together),
        ``samples`` in a row at each, and the indices [R] of the recorded decisions in `replay`.

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
        """Float[R,D]: what critics see at the recorded decisions ``index`` [R]."""
        return self.features[self.replay.now[index]]

    def imitable(self, rows: Tensor) -> tuple[Context, Tensor, None]:
        """A `genpolicy.methods.parts.imitation.Source` over the decisions of episodes that succeeded."""
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
