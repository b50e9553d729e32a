"""Published checkpoints of diffusers whose memory can be told without their weights: the settings
of their denoisers, what these are shown, and the sizes of the other parts.

The settings are those of the checkpoints' own config.json; the numbers of parameters that come of
them are the published ones to the last (tests/models/test_memory.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = Callable[[Mapping[str, Any], int], dict[str, Tensor]]
"""(policy.call, rows) -> the denoiser's arguments, on the device "meta"."""


@dataclass(frozen=True)
class Published:
    """A checkpoint.

    denoiser: the diffusers class of what denoises, and ``settings``, with which it is made. inputs:
    what it is shown. text, vae: parameters of all text encoders, and of the VAE.
    """

    denoiser: str
    inputs: Inputs
    text: int
    vae: int
    settings: dict[str, Any] = field(default_factory=dict)


def _made(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


def _latents(call: Mapping[str, Any], side: int, patch: int) -> tuple[int, int]:
    return (call.get("height") or side) // patch, (call.get("width") or side) // patch


def _sd15(call: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    return {
        "sample": _made(rows, 4, *_latents(call, 512, 8)),
        "timestep": _made(rows),
        "encoder_hidden_states": _made(rows, 77, 768),
    }


def _sdxl(call: Mapping[str, Any], rows: int) -> dict[str, Any]:
    return {
        "sample": _made(rows, 4, *_latents(call, 1024, 8)),
        "timestep": _made(rows),
        "encoder_hidden_states": _made(rows, 77, 2048),
        "added_cond_kwargs": {"text_embeds": _made(rows, 1280), "time_ids": _made(rows, 6)},
    }


def _sd3(call: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    tokens = 77 + (call.get("max_sequence_length") or 256)
    return {
        "hidden_states": _made(rows, 16, *_latents(call, 1024, 8)),
        "timestep": _made(rows),
        "encoder_hidden_states": _made(rows, tokens, 4096),
        "pooled_projections": _made(rows, 2048),
    }


def _flux(call: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    height, width = _latents(call, 1024, 16)
    tokens = call.get("max_sequence_length") or 512
    return {
        "hidden_states": _made(rows, height * width, 64),
        "timestep": _made(rows),
        "guidance": _made(rows),
        "encoder_hidden_states": _made(rows, tokens, 4096),
        "pooled_projections": _made(rows, 768),
        "img_ids": _made(height * width, 3),
        "txt_ids": _made(tokens, 3),
    }


def _wan(call: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    height, width = (call.get("height") or 480) // 8, (call.get("width") or 832) // 8
    frames = ((call.get("num_frames") or 81) - 1) // 4 + 1
    tokens = call.get("max_sequence_length") or 512
    return {
        "hidden_states": _made(rows, 16, frames, height, width),
        "timestep": _made(rows),
        "encoder_hidden_states": _made(rows, tokens, 4096),
    }


CLIP_L, CLIP_G, T5_XXL, UMT5_XXL = 123_060_480, 694_659_840, 4_762_310_656, 5_680_910_336

PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Published(
        "UNet2DConditionModel",
        _sd15,
        text=CLIP_L,
        vae=83_653_863,
        settings={"sample_size": 64, "cross_attention_dim": 768},
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Published(
        "UNet2DConditionModel",
        _sdxl,
        text=CLIP_L + CLIP_G,
        vae=83_653_863,
        settings={
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "stabilityai/stable-diffusion-3.5-medium": Published(
        "SD3Transformer2DModel",
        _sd3,
        text=CLIP_L + CLIP_G + T5_XXL,
        vae=83_819_683,
        settings={
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "black-forest-labs/FLUX.1-dev": Published(
        "FluxTransformer2DModel",
        _flux,
        text=CLIP_L + T5_XXL,
        vae=83_819_683,
        settings={"guidance_embeds": True},
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Published(
        "WanTransformer3DModel",
        _wan,
        text=UMT5_XXL,
        vae=126_892_531,
        settings={
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "num_layers": 30,
            "ffn_dim": 8960,
            "text_dim": 4096,
            "freq_dim": 256,
            "in_channels": 16,
            "out_channels": 16,
            "qk_norm": "rms_norm_across_heads",
            "cross_attn_norm": True,
        },
    ),
}
"""By hub id."""
