"""A diffusers pipeline from a folder or the hub, and what can be said against its settings before
it runs.
"""

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

DENOISERS = ("transformer", "transformer_2", "unet")
"""The names that pipelines give the networks that they denoise with."""
OURS = {
    "prompt": "task.prompts",
    "negative_prompt": "policy.negative_prompt",
    "num_inference_steps": "chain.steps",
    **dict.fromkeys(("timesteps", "sigmas", "latents", "generator", "eta"), "the chain"),
    **dict.fromkeys(("output_type", "return_dict"), "the adapter"),
    **dict.fromkeys(("num_images_per_prompt", "num_videos_per_prompt"), "the method's group"),
}
"""Arguments of a pipeline's call that are passed by the adapter, and what decides them."""


def load_pipeline(
    pretrained: str, revision: str | None, frozen: torch.dtype, learning: torch.dtype
) -> Any:
    """The pipeline with its denoisers in ``learning``, its VAE in fp32 and everything else in
    ``frozen``.
    """
    folder = Path(pretrained)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"policy.pretrained {pretrained} is no diffusers pipeline: it has no model_index.json"
        )
    if not folder.is_dir() and (folder.is_absolute() or pretrained.count("/") != 1):
        raise FileNotFoundError(
            f"policy.pretrained {pretrained}: no such folder, and no hub id (owner/name) either"
        )
    # bars of loading and writing parts; those of downloads are the hub's
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    dtypes = {"default": frozen, "vae": torch.float32, **dict.fromkeys(DENOISERS, learning)}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            pretrained, revision=revision, torch_dtype=dtypes
        )
    except (OSError, ValueError, AttributeError, ImportError) as error:
        if folder.is_dir():
            raise ValueError(
                f"policy.pretrained {pretrained} can't be loaded: {first_line(error)}"
            ) from error
        raise OSError(
            f"policy.pretrained {pretrained}: no such folder, and the hub repository can't be read"
            " (it is unreachable, gated or misspelt); log in with a token (hf auth login) or give"
            " a local folder"
        ) from error


def check_call(call: Mapping[str, Any], arguments: Collection[str], pipeline: str) -> None:
    """Refuse what ``pipeline``'s call does not know, and what is not the user's to set there."""
    for name in call:
        if name in OURS:
            raise ValueError(
                f"policy.call.{name} can't be set there: it is decided by {OURS[name]}"
            )
        if name not in arguments:
            near = difflib.get_close_matches(
                name, sorted(set(arguments) - set(OURS)), n=3, cutoff=0.4
            )
            nearest = f"; the nearest are {', '.join(near)}" if near else ""
            raise ValueError(f"policy.call.{name}: {pipeline} has no such argument{nearest}")


def first_line(error: Exception) -> str:
    """The first line of what an exception says, which is the sentence of most."""
    return str(error).strip().partition("\n")[0]
