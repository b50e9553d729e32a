"""A PaliGemma of transformers' own class, tiny: random weights, a tokenizer written by hand, saved
as transformers saves one, under a second.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)
from transformers.utils import logging

from assets.make_tiny_smolvla import tokenizer

WIDTH, IMAGE, PATCH = 32, 32, 8


def processor(image: int = IMAGE) -> Any:
    """Pictures in 16 tokens, words of `point_instructions` as one token each."""
    size = {"height": image, "width": image}
    pictures = SiglipImageProcessor(size=size)
    pictures.image_seq_length = (image // PATCH) ** 2
    return PaliGemmaProcessor(pictures, tokenizer())


def build(folder: Path, image: int = IMAGE, layers: int = 2, width: int = WIDTH) -> Path:
    """Write a PaliGemma with random weights and its processor into a folder."""
    prepared = processor(image)
    words = prepared.tokenizer
    both = {"hidden_size": width, "intermediate_size": 2 * width}
    loud = width**-0.5  # the usual .02 is for wide networks: small ones stay silent for long
    config = PaliGemmaConfig(
        image_token_index=prepared.image_token_id,
        projection_dim=width,
        hidden_size=width,
        vocab_size=len(words),
        vision_config={
            **both,
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": image,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            **both,
            "model_type": "gemma",
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": len(words),
            "pad_token_id": words.pad_token_id,
            "initializer_range": loud,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PaliGemmaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            # transformers draws the picture tower for its own width
            if parameter.ndim >= 2 and "vision" in name:
                parameter.data.normal_(std=loud)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    prepared.save_pretrained(folder)
    return folder


@functools.cache
def saved() -> Path:
    """The tiny PaliGemma on disk, once a test session."""
    return build(Path(tempfile.mkdtemp(prefix="tiny-paligemma-")))
