"""What differs between SmolVLA, pi0 and pi0.5: a table of names, and where the state enters.

All three are a vision-language model whose keys and values (the prefix: images, instruction) an action expert attends to.
The prefix does not depend on the noise: it is encoded once and read by every denoising step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True)
class Family:
    """One family of LeRobot's flow policies.

    joint: name of the module that holds both networks. prefix: the modules that the prefix is computed with, all others
    are the expert. images: name of the policy's method that prepares them. attention: what the joint module wants for
    a mask. state: where the robot's state enters. pad_counts: whether the family learns the actions after an episode's
    end (the last one repeated), as its own loss does.
    """

    joint: str
    prefix: tuple[str, ...]
    images: str
    attention: Callable[[Tensor], Tensor]
    state: Literal["prefix", "suffix", "prompt"]
    pad_counts: bool


SMOLVLA = Family(
    joint="vlm_with_expert",
    prefix=("vlm_with_expert.vlm.", "state_proj."),
    images="prepare_images",
    attention=lambda mask: mask,
    state="prefix",
    pad_counts=False,
)
PI0 = Family(
    joint="paligemma_with_expert",
    prefix=("paligemma_with_expert.paligemma.",),
    images="_preprocess_images",
    attention=prepare_attention_masks_4d,
    state="suffix",
    pad_counts=True,
)
PI05 = Family(
    joint="paligemma_with_expert",
    prefix=("paligemma_with_expert.paligemma.",),
    images="_preprocess_images",
    attention=prepare_attention_masks_4d,
    state="prompt",
    pad_counts=True,
)
FAMILIES = {"smolvla": SMOLVLA, "pi0": PI0, "pi05": PI05}


@dataclass(frozen=True)
class Prefix:
    """What the expert attends to, B rows: keys and values of each layer [B,heads,S,dim], valid [B,S], and the last
    hidden states [B,S,width]. ``mark`` identifies the weights it was computed with.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    valid: Tensor
    hidden: Tensor
    mark: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Prefix":
        layers = tuple((keys[rows], values[rows]) for keys, values in self.layers)
        return Prefix(layers, self.valid[rows], self.hidden[rows], self.mark)


def encode_prefix(policy: Any, family: Family, batch: dict[str, Tensor], mark: Tensor) -> Prefix:
    """Images, instruction (and SmolVLA's state) through the vision-language model."""
    model = policy.model
    images, masks = getattr(policy, family.images)(batch)
    state = {"state": policy.prepare_state(batch)} if family.state == "prefix" else {}
    tokens = (batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK])
    embedded, valid, blocks = model.embed_prefix(images, masks, *tokens, **state)
    (hidden, _), cache = getattr(model, family.joint).forward(
        attention_mask=family.attention(make_att_2d_masks(valid, blocks)),
        position_ids=torch.cumsum(valid, 1) - 1,
        past_key_values=None,
        inputs_embeds=[embedded, None],
        use_cache=True,
    )
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    return Prefix(layers, valid, hidden, mark)


def velocity(policy: Any, family: Family, batch: dict[str, Tensor], prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
    """One evaluation of the expert: v [B,T,max_action_dim] of x at t [B].

    The cache is made anew: SmolVLA appends the expert's keys to the one it is given, and what is cut off again later
    would keep the graph of this evaluation alive for the next.
    """
    state = {"state": policy.prepare_state(batch)} if family.state == "suffix" else {}
    cache = DynamicCache(prefix.layers)
    return policy.model.denoise_step(
        prefix_pad_masks=prefix.valid, past_key_values=cache, x_t=x, timestep=t, **state
    )
