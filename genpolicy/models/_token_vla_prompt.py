r"""The prompt of a token VLA: its pictures, the instruction and the state as text.

    <image> ... <image> <bos> Task: go to the red circle, State: 131 96;\n

The text is pi0-FAST's, which takes 256 bins of the state, too. Theirs are of its range in the data;
these are of `genpolicy.models._mlp_scaling`'s standardised state between -5 and 5, so that a state
that the data did not have has a bin of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genpolicy.contracts.task import Context
from genpolicy.models._mlp_scaling import OUTLIER, Scaling
from genpolicy.models._observed import observed

STATE = "observation.state"
CAMERA = "observation.image"
"""The beginning of the name of every camera."""
STATE_BINS = 256
"""Bins of every dim of the state."""
IDS, VALID, PICTURES = "ids", "valid", "pictures"
"""The names of a prompt's tokens [B,S], which of them count [B,S], and its pictures
[B,cameras,3,H,W] as the vision tower takes them.
"""


@dataclass(frozen=True)
class Prompt:
    """The way from what is seen and asked to what the network reads.

    processor: transformers' own, of tokenizer and pictures.
    shapes: of what is seen, name -> shape: the state, and every camera in the order of its
        pictures.
    words: tokens that a text may have; shorter ones are padded behind.
    """

    processor: Any
    shapes: dict[str, tuple[int, ...]]
    scaling: Scaling
    words: int
    device: torch.device

    def __call__(self, context: Context) -> dict[str, Tensor]:
        """The prompts of B rows, name -> [B,...]: `IDS`, `VALID`, `PICTURES`, and the
        standardised state [B,q].
        """
        seen = {
            name: observed(context, name, (1, *shape))[:, -1].to(self.device)
            for name, shape in self.shapes.items()
        }
        state = self.scaling.standardised(STATE, seen.pop(STATE))
        ids, valid = self._tokens([*map(text, context.prompts, state.cpu())], len(seen))
        pictures = torch.stack([self._prepared(camera) for camera in seen.values()], 1)
        return {IDS: ids, VALID: valid, PICTURES: pictures, STATE: state}

    def _prepared(self, pictures: Tensor) -> Tensor:
        """Pictures [B,3,h,w] in [0,1], in the size and scale of the vision tower."""
        prepare = self.processor.image_processor
        made = prepare([*pictures], do_rescale=False, return_tensors="pt", device=self.device)
        return made["pixel_values"]

    def _tokens(self, texts: Sequence[str], cameras: int) -> tuple[Tensor, Tensor]:
        """The tokens of B prompts [B,S] and which of them count: S is the same for all texts."""
        processor, words = self.processor, self.processor.tokenizer
        blank = [processor.image_token_id] * (processor.image_seq_length * cameras)
        said = words([words.bos_token + text for text in texts], add_special_tokens=False)
        ids = torch.full((len(texts), len(blank) + self.words), words.pad_token_id or 0)
        valid = torch.zeros_like(ids)
        for row, (text, tokens) in enumerate(zip(texts, said["input_ids"], strict=True)):
            if len(tokens) > self.words:
                raise ValueError(
                    f"policy token_vla: the prompt {text!r} has {len(tokens)} tokens, and"
                    f" policy.words is {self.words}: train with more"
                )
            whole = torch.tensor(blank + tokens)
            ids[row, : len(whole)] = whole
            valid[row, : len(whole)] = 1
        return ids.to(self.device), valid.to(self.device)


def text(instruction: str, state: Tensor) -> str:
    """The text of one row, as pi0-FAST writes it; state [q], standardised."""
    asked = instruction.strip().replace("_", " ").replace("\n", " ")
    places = ((state / OUTLIER + 1) * (STATE_BINS / 2)).long().clamp(0, STATE_BINS - 1)
    return f"Task: {asked}, State: {' '.join(map(str, places.tolist()))};\n"
