"""LeRobot's policy type genpolicy: a saved policy of ours that acts with its deployed sampler."""

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.contracts.task import Context
from genpolicy.policy.files import saved
from lerobot_policy_genpolicy.configuration_genpolicy import REFUSED, GenpolicyConfig

POLICY = "policy"
"""The folder inside, as genpolicy saves a policy."""


class GenpolicyPolicy(PreTrainedPolicy):
    """B robots or environments side by side, each with the frames that it saw and the plan before.

    The noise of a decision is a function of a seed, which `reset` draws from torch's generator
    (LeRobot's --seed), of the row and of the number of the decision.
    """

    config_class = GenpolicyConfig
    name = "genpolicy"

    def __init__(self, config: GenpolicyConfig, folder: Path | None = None, **_: Any) -> None:
        super().__init__(config)
        if folder is None:
            raise ValueError(REFUSED)
        found = saved(folder / POLICY)
        self.acting = replace(found, policy={**found.policy, "device": config.device}).load()
        self.reset()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_name_or_path: str | Path, *, config: Any = None, **options: Any
    ) -> "GenpolicyPolicy":
        """The policy of a folder or hub id."""
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            revision = options.get("revision")
            folder = Path(snapshot_download(str(pretrained_name_or_path), revision=revision))
        if config is None:
            config = PreTrainedConfig.from_pretrained(folder)
        return cls(config, folder).eval()

    def reset(self) -> None:
        """Begins episodes in all rows."""
        self._frames: deque[dict[str, Tensor]] = deque(maxlen=self.acting.model.history)
        self._actions: deque[Tensor] = deque()
        self._plan: Tensor | None = None
        self._decisions = 0
        self._seed = int(torch.randint(2**31, ()))

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The action [B,D] of the next environment step, in the environment's units."""
        self._see(batch)
        if not self._actions:
            self._actions.extend(self._decide(batch).unbind(1))
        return self._actions.popleft()

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """The actions [B,n,D] of a new decision, in the environment's units."""
        self._see(batch)
        return self._decide(batch)

    def _see(self, batch: dict[str, Any]) -> None:
        """Keeps the frame of every row; an episode's first one stands for those before it. Raises
        `ValueError`, and keeps nothing, for numbers that are not finite, and where the number of
        rows has changed within an episode: no action may come of such an observation.
        """
        names = self.acting.model.shapes
        with torch.inference_mode(False):
            frame = {name: batch[name].clone() for name in names}
        for name, value in frame.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"the observation {name} has numbers that are not finite")
            if self._frames and len(value) != len(self._frames[-1][name]):
                raise ValueError(
                    f"the observation {name} has {len(value)} rows, and {len(self._frames[-1][name])}"
                    " before: call reset between episodes"
                )
        self._frames.append(frame)
        while len(self._frames) < self.acting.model.history:
            self._frames.append(frame)

    def _decide(self, batch: dict[str, Any]) -> Tensor:
        # a refiner takes gradients, which LeRobot's inference mode does not know
        with torch.inference_mode(False), torch.no_grad():
            seen = {
                name: torch.stack([f[name] for f in self._frames], 1) for name in self._frames[0]
            }
            rows = len(next(iter(seen.values())))
            told = batch.get("task") or ""
            words = [told] * rows if isinstance(told, str) else list(told)
            noise = Noise.rows(self._seed, 0, torch.arange(rows), 1)
            noise = noise.at(torch.full((rows,), self._decisions))
            condition = self.acting.model.encode(Context(words, seen))
            plan = self.acting.sample(condition, noise, previous=self._plan, keep=(0, 0)).x0
            self._decisions += 1
            self._plan = None if self.acting.warm is None else plan
            return self.acting.actions(plan)

    def forward(self, batch: dict[str, Tensor]) -> NoReturn:
        """Raises: it is not trained here."""
        raise NotImplementedError(REFUSED)

    def get_optim_params(self) -> NoReturn:
        """Raises: it is not trained here."""
        raise NotImplementedError(REFUSED)
