"""A diffusers pipeline from a folder or the hub, and what can be said against its settings before
it runs.
"""

import difflib
import pkgutil
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
import transformers

from genpolicy.config.documents import json_file
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import Origin
from genpolicy.models._remote_code import unasked

INDEX = "model_index.json"
"""The file that says which pipeline a folder holds, and of which class each part is."""
LIBRARIES = ("diffusers", "transformers")
"""Libraries whose classes a pipeline's parts may be, beside the pipelines' own modules."""
UNREADABLE = (
    *(OSError, ValueError, AttributeError, ImportError),
    *(RecursionError, UnpicklingError),  # of files that are made to break the reader
)
"""Errors of diffusers for a pipeline that can't be loaded."""
NO_NAME = "None.py"
"""The file that diffusers takes for a pipeline's code where nobody has named one."""
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
    pretrained: str,
    revision: str | None,
    frozen: torch.dtype,
    learning: torch.dtype,
    origin: Origin,
) -> Any:
    """The pipeline with its denoisers in ``learning``, its VAE in fp32 and everything else in
    ``frozen``.

    origin: of the section that names it. The pipeline itself is somebody else's, and may import
    what its `INDEX` names only where the person trusts those.
    """
    folder = Path(pretrained)
    if folder.is_dir() and not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"policy.pretrained {pretrained} is no diffusers pipeline: it has no {INDEX}"
        )
    if not folder.is_dir() and (folder.is_absolute() or pretrained.count("/") != 1):
        raise FileNotFoundError(
            f"policy.pretrained {pretrained}: no such folder, and no hub id (owner/name) either"
        )
    # bars of loading and writing parts; those of downloads are the hub's
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    dtypes = {"default": frozen, "vae": torch.float32, **dict.fromkeys(DENOISERS, learning)}
    kind, trust = diffusers.DiffusionPipeline, origin.trust
    try:
        if folder.is_dir():
            files = folder
        else:
            files = Path(kind.download(pretrained, revision=revision, trust_remote_code=trust))
        for index in sorted(files.rglob(INDEX)):  # a part may be a pipeline, too
            _require_known(index, origin)
        with unasked():
            return kind.from_pretrained(files, torch_dtype=dtypes, trust_remote_code=trust)
    except ConfigError:
        raise
    except UNREADABLE as error:
        if folder.is_dir():
            raise ValueError(
                f"policy.pretrained {pretrained} can't be loaded: {first_line(error)}"
            ) from error
        raise OSError(
            f"policy.pretrained {pretrained}: no such folder, and the hub repository can't be read"
            " (it is unreachable, gated or misspelt); log in with a token (hf auth login) or give"
            " a local folder"
        ) from error


def _require_known(index: Path, origin: Origin) -> None:
    """Raises where an `INDEX` names what diffusers would import or run, and ``origin`` does not
    allow it: a class of another library, a file of Python beside it, or a pipeline that fetches
    others.
    """
    asks = origin.reached(index)
    document = json_file(index)
    if not isinstance(document, dict):
        raise ConfigError(f"{index} is damaged: it must hold the names of a pipeline's parts")
    kind = document.get("_class_name")
    pipeline = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    known = isinstance(pipeline, type) and issubclass(pipeline, diffusers.DiffusionPipeline)
    if not known or pipeline._load_connected_pipes:
        asks.admit(str(kind), "pipeline")
    if (index.parent / NO_NAME).is_file():
        asks.admit(NO_NAME, "pipeline")
    modules = [module.name for module in pkgutil.iter_modules(diffusers.pipelines.__path__)]
    for name, part in document.items():
        if name.startswith("_") or not isinstance(part, list) or not part or part[0] is None:
            continue
        library = str(part[0])
        own = index.parent / name / f"{library}.py"
        if library not in (*LIBRARIES, *modules) or own.is_file():
            asks.admit(library, f"library of {name}")


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
