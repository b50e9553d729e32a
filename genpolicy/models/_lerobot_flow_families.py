"""The differences between SmolVLA, pi0 and pi0.5: names, the form of a mask, the place where the
robot's state enters, and the settings of their training times.

All three are a vision-language model that reads images and instruction (the prefix), and an action
expert that attends to its keys and values. The prefix does not depend on the noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.special import betaincinv
from torch import Tensor

from genpolicy.models._lerobot import STATE
from genpolicy.models._vla_prefix import Prefix


@dataclass(frozen=True)
class Family:
    """One of LeRobot's flow policies.

    joint: the module that holds both networks.
    prefix: the beginnings of the names of the prefix's parameters; all others are the expert's.
    images: the policy's method that prepares them.
    additive: masks are 0 and -inf [B,1,S,S], not bool [B,S,S].
    state: the place where the robot's state enters.
    learns_pad: its own loss counts the actions after an episode's end.
    """

    joint: str
    prefix: tuple[str, ...]
    images: str
    additive: bool
    state: Literal["prefix", "suffix", "prompt"]
    learns_pad: bool


FAMILIES = {
    "smolvla": Family(
        "vlm_with_expert",
        ("vlm_with_expert.vlm.", "state_proj."),
        "prepare_images",
        False,
        "prefix",
        False,
    ),
    "pi0": Family(
        "paligemma_with_expert",
        ("paligemma_with_expert.paligemma.",),
        "_preprocess_images",
        True,
        "suffix",
        True,
    ),
    "pi05": Family(
        "paligemma_with_expert",
        ("paligemma_with_expert.paligemma.",),
        "_preprocess_images",
        True,
        "prompt",
        True,
    ),
}


TIMES = {"beta_alpha": 1.5, "beta_beta": 1.0, "scale": 0.999, "offset": 0.001}
"""Distribution of training times; SmolVLA's, which are not in its configuration, and pi's defaults.
"""


def training_times(config: Any, uniform: Tensor) -> Tensor:
    """scale * Beta(a, b) + offset through the quantile function, from uniform numbers in [0,1)."""
    a, b, scale, offset = (
        getattr(config, f"time_sampling_{name}", value) for name, value in TIMES.items()
    )
    quantile = torch.from_numpy(betaincinv(a, b, uniform.double().cpu().numpy())).to(uniform)
    return scale * quantile + offset


def encode_prefix(policy: Any, family: Family, batch: Mapping[str, Tensor]) -> Prefix:
    """Images, instruction and, in SmolVLA, the state through the vision-language model, as its own
    sampler does.
    """
    from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
    from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS

    network = policy.model
    joint = getattr(network, family.joint)
    images, masks = getattr(policy, family.images)(batch)
    state = {"state": policy.prepare_state(batch)} if family.state == "prefix" else {}
    words = (batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK])
    embedded, valid, blocks = network.embed_prefix(images, masks, *words, **state)
    attends = make_att_2d_masks(valid, blocks)
    if family.additive:
        attends = prepare_attention_masks_4d(attends)
        joint.paligemma.model.language_model.config._attn_implementation = "eager"
    (hidden, _), cache = joint.forward(
        attention_mask=attends,
        position_ids=torch.cumsum(valid, 1) - 1,
        past_key_values=None,
        inputs_embeds=[embedded, None],
        use_cache=True,
    )
    weight = valid.float()[..., None]
    summary = (hidden.float() * weight).sum(1) / weight.sum(1)
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), valid, summary)


def velocity(
    policy: Any, family: Family, prefix: Prefix, state: Tensor, x: Tensor, t: Tensor
) -> Tensor:
    """One evaluation of the expert: v [B,T,max_action_dim] at x, t [B] fp32.

    The cache is made anew each time: SmolVLA appends the expert's keys to the one it is given, and
    what it cuts off again would keep this evaluation's graph alive in the next one.
    """
    from transformers import DynamicCache

    enters = {"state": policy.prepare_state({STATE: state})} if family.state == "suffix" else {}
    return policy.model.denoise_step(
        prefix_pad_masks=prefix.valid,
        past_key_values=DynamicCache(prefix.layers),
        x_t=x,
        timestep=t,
        **enters,
    )
