"""Clone a tiny PaliGemma that says actions as tokens, on one CPU thread, and write its folder.

    python assets/make_tiny_paligemma.py --out runs/point/token_vla

A `PaliGemmaForConditionalGeneration` of transformers' own class with some 150 thousand random
weights learns from the demonstrations of `make_tiny_smolvla`, of which a share goes to another goal
than the one that was named, to go to a goal. Its folder is one of transformers, with the statistics
of the demonstrations beside it: `policy: {name: token_vla, pretrained: FOLDER}` takes it.

Words of the task are one token each. PaliGemma's own processor adds its 1152 names of places and
shapes to the vocabulary; there a token VLA finds its actions, in the real model as here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
)
from transformers.utils import logging

from assets.make_tiny_smolvla import CHUNK, SEEDS, Demonstrations, clone, examine, say, tokenizer
from genpolicy.chain import DDIM, Chain
from genpolicy.models.token_vla import TokenVLA
from genpolicy.policy.policy import ChainPolicy
from genpolicy.tasks.point_instructions import CAMERA, PIXELS, STATE, PointInstructions

WORDS = 40  # tokens of the longest prompt of the task


def processor(patch: int) -> Any:
    """The tokenizer, and the preparation of pictures of the task."""
    pictures = SiglipImageProcessor(size={"height": PIXELS, "width": PIXELS})
    pictures.image_seq_length = (PIXELS // patch) ** 2
    return PaliGemmaProcessor(pictures, tokenizer())


def write_paligemma(
    folder: Path, *, width: int, layers: int, patch: int = 8, seed: int = 0
) -> None:
    """Write a PaliGemma with random weights and its processor."""
    prepared = processor(patch)
    words = prepared.tokenizer
    sizes = {"hidden_size": width, "intermediate_size": 2 * width}
    loud = width**-0.5  # the usual .02 is for wide networks: small ones stay silent for long
    config = PaliGemmaConfig(
        image_token_index=prepared.image_token_id,
        projection_dim=width,
        hidden_size=width,
        vocab_size=len(words),
        vision_config={
            **sizes,
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": PIXELS,
            "patch_size": patch,
            "vision_use_head": False,
        },
        text_config={
            **sizes,
            "model_type": "gemma",
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": width // 4,
            "vocab_size": len(words),
            "pad_token_id": words.pad_token_id,
            "initializer_range": loud,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = PaliGemmaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            # transformers draws the vision tower for its own width
            if parameter.ndim >= 2 and "vision" in name:
                parameter.data.normal_(std=loud)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    prepared.save_pretrained(folder)


def statistics(data: Demonstrations) -> Any:
    """The shapes and statistics of demonstrations, as `TokenVLA.initialise` asks a data set."""
    both = {STATE: data.state, "action": data.action}
    return SimpleNamespace(
        shapes={STATE: (2,), CAMERA: (3, PIXELS, PIXELS), "action": (2,)},
        stats={
            name: {"mean": v.mean(0), "std": v.std(0), "min": v.amin(0), "max": v.amax(0)}
            for name, v in both.items()
        },
    )


def main() -> None:
    """Record, build, clone, save, examine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--episodes", type=int, default=800, help="demonstrations")
    add("--mistaken", type=float, default=0.45, help="share of them that go to another goal")
    add("--noise", type=float, default=0.3, help="std on their actions")
    add("--steps", type=int, default=800, help="optimiser steps")
    add("--batch", type=int, default=64, help="frames of a step")
    add("--lr", type=float, default=2e-3, help="learning rate at its peak")
    add("--ema", type=float, default=0.99, help="decay of the averaged weights, a step")
    add("--width", type=int, default=48, help="of both towers")
    add("--layers", type=int, default=2, help="of the language model")
    add("--bins", type=int, default=32, help="of each dim of an action")
    add("--every", type=int, default=100, help="steps between lines")
    add("--examine", type=int, default=400, help="episodes of an examination")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already: choose another folder, or delete it")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data = Demonstrations.record(
        PointInstructions(mistaken=args.mistaken), args.episodes, args.noise, SEEDS
    )
    say(f"{args.episodes} demonstrations, {len(data.state)} frames")
    with tempfile.TemporaryDirectory() as staged:
        write_paligemma(Path(staged), width=args.width, layers=args.layers, seed=args.seed)
        model = TokenVLA(
            staged, train="full", chunk=CHUNK, bins=args.bins, words=WORDS, device="cpu"
        )
    model.initialise(statistics(data))
    say(f"{sum(p.numel() for p in model.trainable().values())} parameters")
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(1), DDIM(0.0)))
    clone(policy, data, args)
    args.out.mkdir(parents=True)
    model.save(args.out)
    say(examine(policy, args.examine))


if __name__ == "__main__":
    main()
