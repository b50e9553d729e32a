"""The two networks of a flow policy, its vision-language model and its action expert: which of
their parameters learn, and their evaluations.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genpolicy.models._lerobot import STATE
from genpolicy.models._lerobot_flow_families import Family, encode_prefix, velocity
from genpolicy.models._reached import reached
from genpolicy.models._vla_prefix import Prefix, Seen


@dataclass(eq=False)
class Networks:
    """The networks of a loaded policy.

    frozen: dtype that what is frozen is stored in, and that the networks run in (autocast).
    whole: everything learns, not the expert alone.
    """

    policy: Any
    family: Family
    device: torch.device
    frozen: torch.dtype
    whole: bool
    _learning_prefix: list[torch.nn.Parameter] = field(init=False, default_factory=list)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by their names in the policy's network, in its order."""
        return {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}

    def choose_what_learns(self, evaluate: Callable[[], Tensor]) -> None:
        """Chooses, of the part that is to learn, the parameters that a gradient reaches: those in
        the graph of a dry evaluation.

        Left out are heads and last layers that nothing reads; they stay in the checkpoint as they
        are.
        """
        network = self.policy.model
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(self.whole or not name.startswith(self.family.prefix))
        self._note_prefix()
        with torch.enable_grad():
            found = reached(evaluate())
        for parameter in network.parameters():
            learns = parameter in found
            dtype = torch.float32 if learns else self.frozen
            parameter.requires_grad_(learns).data = parameter.data.to(dtype)
        self._note_prefix()

    def _note_prefix(self) -> None:
        learning = self.trainable().items()
        self._learning_prefix = [p for name, p in learning if name.startswith(self.family.prefix)]

    def prefix(self, seen: Seen) -> Prefix:
        """The stored prefix, unless a gradient goes through it; where it learns, every change of
        its weights makes it anew.
        """
        if self._learning_prefix and torch.is_grad_enabled():
            return self._encode(seen.batch)
        return seen.store.prefix(seen.rows, self._encode, self._mark())

    def knowing(self, batch: Mapping[str, Tensor], prefix: Prefix) -> Seen:
        """Rows as the preprocessor made them, whose prefixes were computed elsewhere."""
        seen = Seen.all(batch, keep=True)
        seen.store.know(prefix, self._mark())
        return seen

    def _mark(self) -> Tensor:
        """A number of each weight of the prefix that learns."""
        return torch.stack(
            [p.detach().double().sum() for p in self._learning_prefix] or [torch.zeros(())]
        )

    def _encode(self, batch: Mapping[str, Tensor]) -> Prefix:
        with self._autocast():
            return encode_prefix(self.policy, self.family, batch)

    def velocity(self, x: Tensor, t: Tensor, seen: Seen) -> Tensor:
        """One evaluation of the expert: its output [B,T,max_action_dim] at x, t [B]."""
        prefix = self.prefix(seen)
        state = seen.value(STATE)
        with self._autocast():
            return velocity(self.policy, self.family, prefix, state, x, t.to(x))

    def _autocast(self) -> AbstractContextManager[Any]:
        """The precision that the networks run in: single precision changes nothing, so that who
        calls them may choose a lower one.
        """
        if self.frozen == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.frozen)
