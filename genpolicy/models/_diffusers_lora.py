"""The policy's LoRA on a diffusers denoiser: added or started from the user's, and saved with its
alpha.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from genpolicy.models._diffusers_load import first_line

ADAPTER = "policy"
SUFFIX = ".safetensors"
WEIGHTS = f"pytorch_lora_weights{SUFFIX}"
ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *(
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    ),  # the text stream of joint attention (SD3, Flux)
)


@dataclass
class Lora:
    """A low-rank change of the denoiser (arXiv 2106.09685): W + alpha/rank B A.

    rank: the width of A and B; 32 is Flow-GRPO's (flow_grpo scripts/train_sd3.py), and with
        ``start`` it is its file's.
    alpha: 64 is Flow-GRPO's too, and with ``start`` it is its file's.
    targets: endings of the names of the linear layers it changes; by default every attention
        projection, those of the text stream too.
    start: folder or .safetensors file with the user's own LoRA, from which the policy starts.
    """

    rank: int = 32
    alpha: float = 64
    targets: list[str] | None = None
    start: str | None = None


def add(pipeline: Any, denoiser: torch.nn.Module, lora: Lora) -> None:
    """Put the adapter `ADAPTER` on the denoiser: fp32, and the only thing that learns."""
    if not (hasattr(pipeline, "save_lora_weights") and hasattr(denoiser, "add_adapter")):
        raise ValueError(
            f"diffusers has no LoRA for {type(pipeline).__name__}; set policy.train to full"
        )
    if lora.start is not None:
        _start(pipeline, denoiser, Path(lora.start))
    else:
        targets = list(lora.targets or ATTENTION)
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=targets
        )
        try:
            with torch.random.fork_rng(devices=[]):
                # the same start on every process, whatever was drawn before
                torch.default_generator.manual_seed(0)
                denoiser.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            linear = {
                name.split(".")[-1]
                for name, module in denoiser.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
            raise ValueError(
                f"lora.targets {targets} match no layer of {type(denoiser).__name__}; its linear"
                f" layers are {', '.join(sorted(linear))}"
            ) from error
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _start(pipeline: Any, denoiser: torch.nn.Module, start: Path) -> None:
    # a pickle is no LoRA, whatever it is called
    alone = start.is_file() and start.suffix == SUFFIX
    files = [start] if alone else sorted(start.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        files = [file for file in files if file.name == WEIGHTS]
    if len(files) != 1:
        raise FileNotFoundError(
            f"lora.start {start} is neither a {SUFFIX} file nor a folder with {WEIGHTS}"
        )
    kind = type(denoiser).__name__
    try:
        pipeline.load_lora_weights(
            str(files[0].parent), weight_name=files[0].name, adapter_name=ADAPTER
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ValueError(f"lora.start {start} does not fit {kind}: {first_line(error)}") from error
    changed = [
        name
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module) and ADAPTER in getattr(part, "peft_config", {})
    ]
    others = [name for name in changed if getattr(pipeline, name) is not denoiser]
    if others or not changed:
        raise ValueError(
            f"lora.start {start} changes {', '.join(others) or 'nothing here'}; only {kind} may"
            " change"
        )


def save(pipeline: Any, name: str, denoiser: torch.nn.Module, directory: Path) -> None:
    """Write `WEIGHTS`, loadable by a plain ``pipe.load_lora_weights(directory, weight_name=...)``.

    The metadata carries alpha: without it diffusers reloads with alpha = rank, silently another
    policy.
    """
    weights = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    if name == "unet":
        weights = convert_state_dict_to_diffusers(weights)
    metadata = denoiser.peft_config[ADAPTER].to_dict()
    layers = {f"{name}_lora_layers": weights, f"{name}_lora_adapter_metadata": metadata}
    type(pipeline).save_lora_weights(directory, **layers)
