"""The files of a token VLA: a PaliGemma of transformers, its processor, and a LoRA on it. Local
folders and safetensors alone are read, and no code that lies beside them.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor
from transformers.utils import logging as transformers_logging

from genpolicy.config.documents import json_file
from genpolicy.models._remote_code import unasked

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER = "policy"
"""The name of the adapter in the network."""
OUTER = "base_model.model."
"""The beginning of the names in an adapter's file."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Lora:
    """A low-rank change of the language model: W + alpha/rank B A (arXiv 2106.09685). Picture tower
    and vocabulary stay as they are.

    rank: the width of A and B; 32 is OpenVLA's (arXiv 2406.09246), and with ``start`` it is its
        file's.
    alpha: 16 is OpenVLA's, and with ``start`` it is its file's.
    targets: endings of the names of the linear layers it changes; by default all of the language
        model. With ``start`` they are its file's.
    start: folder of a saved token VLA that was trained with a LoRA, from which the policy starts.
    """

    rank: int = 32
    alpha: float = 16
    targets: tuple[str, ...] = LINEAR
    start: str | None = None


def load_model(folder: Path) -> Any:
    """The PaliGemma of a folder, fp32, in eval mode, every weight of it from the file."""
    settings = json_file(folder / CONFIG) if (folder / CONFIG).is_file() else None
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"policy.pretrained {folder} is a LoRA on a PaliGemma: name it as policy.lora.start,"
            " and the PaliGemma as policy.pretrained"
        )
    if kind != "paligemma":
        raise ValueError(
            f"policy.pretrained {folder} is no folder of a PaliGemma: it has"
            f" {'no ' + CONFIG if settings is None else f'a {CONFIG} of model_type {kind}'}"
        )
    with _explained(folder, "policy.pretrained"):
        loaded: Any = PaliGemmaForConditionalGeneration.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            dtype=torch.float32,
            output_loading_info=True,
        )
    model, found = loaded
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[key]:
            raise ValueError(
                f"policy.pretrained {folder} is damaged: {len(found[key])} of its weights are"
                f" {key.removesuffix('_keys')}, the first is {min(map(str, found[key]))}"
            )
    return model.eval()


def load_processor(folder: Path) -> Any:
    """The tokenizer and the preparation of pictures beside a PaliGemma."""
    with _explained(folder, "policy.pretrained"):
        return PaliGemmaProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


def add_lora(model: Any, lora: Lora) -> None:
    """Puts the adapter `ADAPTER` on the language model, fp32, and loads it where it has a start."""
    pattern = rf".*language_model\..*\.({'|'.join(map(re.escape, lora.targets))})"
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=pattern)
    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
        raise ValueError(
            f"policy.lora.targets {', '.join(lora.targets)} match no layer of the language model;"
            f" its linear layers are {', '.join(LINEAR)}"
        )
    with torch.random.fork_rng(devices=[]):
        # the same start on every process, whatever was drawn before
        torch.default_generator.manual_seed(0)
        model.add_adapter(config, adapter_name=ADAPTER)
    if lora.start is None:
        return
    with _explained(Path(lora.start), "policy.lora.start"):
        saved = load_file(Path(lora.start) / ADAPTER_WEIGHTS)
    given = {name.removeprefix(OUTER): value for name, value in saved.items()}
    own = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    wrong = [n for n in own if n not in given or own[n].shape != given[n].shape]
    wrong += [n for n in given if n not in own]
    if wrong:
        raise ValueError(
            f"policy.lora.start {lora.start} does not fit the PaliGemma of policy.pretrained:"
            f" {len(wrong)} of its tensors differ, the first is {wrong[0]}"
        )
    set_peft_model_state_dict(model, given, adapter_name=ADAPTER)


def save(model: Any, processor: Any, directory: Path) -> None:
    """The network, or its adapter alone where it has one, and its processor, as transformers and
    peft save them.
    """
    with _quiet():
        model.save_pretrained(directory)
        processor.save_pretrained(directory)


@contextmanager
def _explained(folder: Path, called: str) -> Iterator[None]:
    """Raises in one sentence what transformers and safetensors say about a folder."""
    try:
        with unasked(), _quiet():
            yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{called} {folder} can't be read: {said}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' warnings and progress bars to itself: what is wrong is raised."""
    before = logging.root.manager.disable
    bars = transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        if bars:
            transformers_logging.enable_progress_bar()
