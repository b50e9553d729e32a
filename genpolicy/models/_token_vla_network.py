"""The network of a token VLA: the losses of a chunk's tokens, and their generation.

    picture tokens, text | <bos> token_0 token_1 ... token_{D-1}

Before the bar every token sees all others, which is how PaliGemma reads a prompt; behind it every
token sees those before it. The prompt is read once into keys and values, from which any number of
chunks are said.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from genpolicy.models._token_networks import drawn
from genpolicy.models._token_vla_prompt import IDS, PICTURES, VALID
from genpolicy.models._vla_prefix import ROWS, Prefix, Seen


@dataclass(eq=False)
class Network:
    """A PaliGemma of transformers that says actions.

    model: `PaliGemmaForConditionalGeneration`; it is used as it is, through its own forward.
    actions: [bins], the ids that say an action, in the order of the bins.
    begin: the id that a chunk begins with.
    precision: dtype that it runs in (autocast).
    """

    model: Any
    actions: Tensor
    begin: int
    precision: torch.dtype

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by their names in the network, in its order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def losses(self, batch: Mapping[str, Tensor], said: Tensor) -> Tensor:
        """The cross-entropy of a chunk's tokens [B,D] over the whole vocabulary, in nats, [B,D]: as
        the model's own ``labels``, row by row and token by token.
        """
        words = self.actions[said]
        before = torch.cat([torch.full_like(words[:, :1], self.begin), words[:, :-1]], 1)
        valid = torch.cat([batch[VALID], torch.ones_like(before)], 1)
        kinds = torch.cat([torch.zeros_like(batch[IDS]), torch.ones_like(before)], 1)
        with self._autocast():
            logits = self.model(
                input_ids=torch.cat([batch[IDS], before], 1),
                pixel_values=batch[PICTURES].flatten(0, 1),
                attention_mask=valid,
                token_type_ids=kinds,
                position_ids=valid.cumsum(1),
                logits_to_keep=before.shape[1],
            ).logits
        return functional.cross_entropy(logits.float().movedim(-1, 1), words, reduction="none")

    def prefix(self, seen: Seen) -> Prefix:
        """The prompts' keys and values, without gradient; of each row they are computed once for
        all that is picked of it, and anew when what learns has changed.
        """
        learning = [p.detach().double().sum() for p in self.trainable().values()]
        return seen.store.prefix(seen.rows, self._read, torch.stack(learning))

    def summary(self, seen: Seen) -> Tensor:
        """The prompts' mean last hidden states, without gradient, [B,width]. Where they are not
        kept, no more than `ROWS` are in memory at a time.
        """
        parts = (
            [seen] if seen.keep else [seen[part] for part in torch.arange(len(seen)).split(ROWS)]
        )
        return torch.cat([self.prefix(part).summary for part in parts])

    def _read(self, batch: Mapping[str, Tensor]) -> Prefix:
        valid = batch[VALID]
        with self._autocast():
            made = self.model.model(
                input_ids=batch[IDS],
                pixel_values=batch[PICTURES].flatten(0, 1),
                attention_mask=valid,
                token_type_ids=torch.zeros_like(valid),
                position_ids=valid.cumsum(1),
                use_cache=True,
            )
        layers = tuple((layer.keys, layer.values) for layer in made.past_key_values.layers)
        weight = valid.float()[..., None]
        summary = (made.last_hidden_state.float() * weight).sum(1) / weight.sum(1)
        return Prefix(layers, valid, summary)

    @torch.no_grad()
    def generate(self, seen: Seen, uniform: Tensor) -> Tensor:
        """Draws the tokens one after another by their inverse distribution functions, of the
        actions' ids alone: uniform numbers [B,D] in [0,1] -> places in units of bins [B,D]; see
        `genpolicy.models._token_networks`.
        """
        parts = torch.arange(len(seen)).split(ROWS)
        return torch.cat([self._said(self.prefix(seen[part]), uniform[part]) for part in parts])

    def _said(self, prefix: Prefix, uniform: Tensor) -> Tensor:
        cache = DynamicCache(prefix.layers)  # a new one: what is said is appended to it
        valid = prefix.valid
        token = torch.full_like(valid[:, :1], self.begin)
        places: list[Tensor] = []
        for level in uniform.unbind(1):
            valid = torch.cat([valid, torch.ones_like(token)], 1)
            with self._autocast():
                logits = self.model(
                    input_ids=token,
                    attention_mask=valid,
                    position_ids=valid.sum(1, keepdim=True),
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
            index, within = drawn(logits[:, self.actions].float(), level)
            places.append(index + within)
            token = self.actions[index][:, None]
        return torch.stack(places, 1)

    def _autocast(self) -> AbstractContextManager[Any]:
        """The precision that the network runs in; single precision changes nothing."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.actions.device.type, self.precision)


def action_ids(tokenizer: Any, vocabulary: int, bins: int) -> Tensor:
    """The ids of the bins [bins]: the last ones of the vocabulary that are no special token, the
    lowest bin last, as OpenVLA (arXiv 2406.09246) and pi0-FAST count from its end.

    Raises `ValueError` where there are not so many.
    """
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(min(len(tokenizer), vocabulary)) if i not in special]
    if bins > len(plain):
        raise ValueError(
            f"policy token_vla: bins is {bins}, and the vocabulary has {len(plain)} tokens that are"
            f" not special: set bins to at most {len(plain)}"
        )
    return torch.tensor(plain[::-1][:bins])
