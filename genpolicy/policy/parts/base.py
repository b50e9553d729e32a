"""The base of the noisier steps: frozen weights that denoise above a noise time (DPPO's K' < K)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.chain import Condition, Prediction
from genpolicy.chain.values import Denoiser
from genpolicy.contracts.model import Model
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.weights import copied, swapped

WEIGHTS, SETTINGS = "base.safetensors", "base.json"


@dataclass(eq=False)
class Base:
    """Values of a model's trainable parameters by name, used at noise times above ``above``."""

    weights: Mapping[str, Tensor]
    above: float

    kind: ClassVar[str] = "base"
    slot: ClassVar[str] = "base"
    version: ClassVar[int] = 1

    @classmethod
    def of(cls, model: Model, above: float) -> Self:
        """The base that is ``model`` as it is now."""
        names = model.trainable()
        return cls(dict(zip(names, copied(list(names.values())), strict=True)), above)

    def attach(self, policy: ChainPolicy) -> ChainPolicy:
        """The policy whose noisier steps are the base's; `ValueError` where the names differ."""
        parameters = policy.model.trainable()
        if list(parameters) != list(self.weights):
            raise ValueError("the policy's base was made for another network than this one")

        def handed_over(denoise: Denoiser) -> Denoiser:
            return _Handover(denoise, list(parameters.values()), self)

        return replace(policy, base=handed_over)

    def save(self, folder: Path) -> None:
        """Write the weights as safetensors and the noise time as json."""
        (folder / SETTINGS).write_text(json.dumps({"above": self.above}) + "\n")
        weights = {name: value.contiguous() for name, value in self.weights.items()}
        save_file(weights, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, model: Model) -> Self:
        """Read the base of ``model``; `ValueError` where it was made for another network."""
        above = float(json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["above"])
        tensors = load_file(folder / WEIGHTS, device=str(model.device))
        names = list(model.trainable())
        if tensors.keys() != set(names):
            raise ValueError("it was made for another network than this one")
        return cls({name: tensors[name] for name in names}, above)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the noise time."""
        return {"weights": dict(self.weights), "above": self.above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take weights and noise time."""
        mine = self.weights
        self.weights = {name: state["weights"][name].to(mine[name].device) for name in mine}
        self.above = state["above"]


@dataclass(frozen=True)
class _Handover:
    """The base for rows at noise times above its own, the learning network for the others."""

    denoiser: Denoiser
    parameters: Sequence[torch.nn.Parameter]
    base: Base

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Prediction:
        # tokens have times of their own, a row one network: the base's where any lies above
        above = t > self.base.above
        if above.ndim > 1:
            above = above.any(1)
        if not bool(above.any()):
            return self.denoiser(x, t, condition)
        if bool(above.all()):
            return self._frozen(x, t, condition)
        # rows on both sides: each by its own network, then in their order again
        noisier, others = above.nonzero().flatten(), (~above).nonzero().flatten()
        frozen = self._frozen(x[noisier], t[noisier], condition[noisier])
        learned = self.denoiser(x[others], t[others], condition[others])
        order = torch.cat([noisier, others]).argsort()
        std = None
        if frozen.std is not None and learned.std is not None:
            std = torch.cat([frozen.std, learned.std])[order]
        return Prediction(
            torch.cat([frozen.x0, learned.x0])[order],
            torch.cat([frozen.eps, learned.eps])[order],
            std,
        )

    def _frozen(self, x: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The prediction of the base's weights, without gradients."""
        values = [value.to(x.device) for value in self.base.weights.values()]
        with torch.no_grad(), swapped(self.parameters, values):
            return self.denoiser(x, t, condition)
