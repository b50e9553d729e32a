"""SmolVLA, pi0 and pi0.5 of LeRobot's own classes, tiny: offline, deterministic, under a second
each.

pi0 and pi0.5 take their sizes from two named variants of 300 million and 2 billion parameters and
nothing else, so inside `sizes` those names mean something small. Their processor names a gated
tokenizer of the hub; `build` saves exactly what a hub folder has, and whoever loads it says which
tokenizer to use instead.
"""

import functools
import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from assets.make_tiny_smolvla import tokenizer, write_vlm

FAMILIES = ("smolvla", "pi0", "pi05")
STATE, ACTION, CHUNK, EXECUTED = 3, 2, 4, 3
"""Dims of the state, dims of an action (both padded by the networks, to 4 and 5),
actions of a chunk, executed ones.
"""
MAX_STATE, MAX_ACTION = 4, 5
CAMERAS = ("observation.images.top", "observation.images.wrist")
IMAGE = 32
STEPS = 5
PROMPTS = ["go to the red circle", "go to the blue square"]


@functools.cache
def words() -> str:
    """A folder with the tiny tokenizer alone."""
    folder = tempfile.mkdtemp(prefix="tiny-words-")
    tokenizer().save_pretrained(folder)
    return folder


def stats() -> dict[str, dict[str, torch.Tensor]]:
    """Statistics in which no number is the identity: normalising twice or never would show."""

    def of(dim: int, shift: float) -> dict[str, torch.Tensor]:
        middle, reach = shift + 0.1 * torch.arange(dim), 0.5 + 0.25 * torch.arange(dim)
        edges = {
            "min": middle - reach,
            "max": middle + reach,
            "q01": middle - reach,
            "q99": middle + reach,
        }
        return {"mean": middle, "std": reach, **edges}

    return {"observation.state": of(STATE, 0.2), "action": of(ACTION, -0.3)}


@contextmanager
def sizes() -> Iterator[None]:
    """Makes pi0 and pi0.5 tiny for the block; 512 tokens are all they know."""
    with pytest.MonkeyPatch.context() as patch:
        for family in ("pi0", "pi05"):
            _shrink(importlib.import_module(f"lerobot.policies.{family}.modeling_{family}"), patch)
        yield


def _shrink(module: Any, patch: pytest.MonkeyPatch) -> None:
    mapping, vlm, expert = (
        module.CONFIG_MAPPING,
        module.PaliGemmaForConditionalGenerationWithPiGemma,
        module.PiGemmaForCausalLM,
    )

    def gemma(variant: str) -> Any:
        width = 64 if variant == "gemma_2b" else 32
        return module.GemmaConfig(
            width=width, depth=2, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=8
        )

    class Mapping:
        def __getitem__(self, name: str) -> Any:
            return small_vision if name == "paligemma" else mapping[name]

    def small_vision() -> Any:
        config = mapping["paligemma"]()
        vision = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 16,
        }
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        return config

    def small_vlm(config: Any) -> Any:
        config.vision_config.projection_dim = config.projection_dim = config.text_config.hidden_size
        config.vision_config.intermediate_size = 64
        config.text_config.vocab_size = config._vocab_size = 512
        config.image_token_index = 511
        return vlm(config=config)

    def small_expert(config: Any) -> Any:
        config.vocab_size = 512
        return expert(config=config)

    patch.setattr(module, "get_gemma_config", gemma)
    patch.setattr(module, "CONFIG_MAPPING", Mapping())
    patch.setattr(module, "PaliGemmaForConditionalGenerationWithPiGemma", small_vlm)
    patch.setattr(module, "PiGemmaForCausalLM", small_expert)


def features() -> dict[str, Any]:
    from lerobot.configs import FeatureType, PolicyFeature

    images = {camera: PolicyFeature(FeatureType.VISUAL, (3, IMAGE, IMAGE)) for camera in CAMERAS}
    state = {"observation.state": PolicyFeature(FeatureType.STATE, (STATE,))}
    action = {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))}
    return {"input_features": {**images, **state}, "output_features": action}


def build(family: str, folder: Path, **settings: Any) -> Path:
    """A policy of the family with random weights and its processors,
    saved as LeRobot saves them. Needs `sizes`.
    """
    from lerobot.policies.factory import (
        get_policy_class,
        make_policy_config,
        make_pre_post_processors,
    )

    common = {
        **features(),
        "chunk_size": CHUNK,
        "n_action_steps": EXECUTED,
        "max_state_dim": MAX_STATE,
        "max_action_dim": MAX_ACTION,
        "tokenizer_max_length": 72,
        "device": "cpu",
        "push_to_hub": False,
    }
    if family == "smolvla":
        write_vlm(folder / "vlm", image=IMAGE, patch=8, width=32, layers=2)
        own = {
            "vlm_model_name": str(folder / "vlm"),
            "load_vlm_weights": False,
            "num_vlm_layers": 2,
        }
        own |= {"resize_imgs_with_padding": (IMAGE, IMAGE), "num_steps": STEPS}
    else:
        own = {"image_resolution": (IMAGE, IMAGE), "num_inference_steps": STEPS}
    config = make_policy_config(family, **{**common, **own, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = get_policy_class(family)(config)
        if family != "smolvla":  # whose tiny folder already asks for wider weights
            loud(policy)
    with pytest.MonkeyPatch.context() as patch:
        real = AutoTokenizer.from_pretrained
        mine = words() if family != "smolvla" else str(folder / "vlm")
        patch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: real(mine))
        processors = make_pre_post_processors(config, dataset_stats=stats())
    policy.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return folder


def loud(policy: torch.nn.Module) -> None:
    """Spread the weights: as initialised, what is seen and asked hardly moves what is done."""
    for name, parameter in policy.named_parameters():
        if parameter.ndim >= 2 and "action_out" not in name:
            parameter.data.mul_(3.0 if "embed" in name else 1.5)
        if "dense.bias" in name or "dense.weight" in name:
            parameter.data.normal_(std=0.2)


@functools.cache
def saved(family: str) -> Path:
    """The family's tiny policy on disk, once a test session."""
    with sizes():
        return build(family, Path(tempfile.mkdtemp(prefix=f"tiny-{family}-")))


def observation(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random frames [rows,1,*shape] in the environment's units."""
    generator = torch.Generator().manual_seed(seed)
    images = {
        camera: torch.rand(rows, 1, 3, IMAGE, IMAGE, generator=generator) for camera in CAMERAS
    }
    return {**images, "observation.state": torch.rand(rows, 1, STATE, generator=generator)}
