"""The policy's LoRA on a diffusers denoiser: added or started from the user's, and saved so that it
is the same change wherever it is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.models._diffusers_load import first_line

ADAPTER = "policy"
SUFFIX = ".safetensors"
WEIGHTS = f"pytorch_lora_weights{SUFFIX}"
SCALES = "genpolicy_scales"
"""Key of the file's metadata: module -> alpha/rank that its B learned with, as JSON."""
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
    alpha: 64 is Flow-GRPO's too, and with ``start`` it is its file's, or of a LoRA that genpolicy
        saved the one that it learned with.
    targets: endings of the names of the linear layers it changes; by default every attention
        projection, those of the text stream too. With ``start`` they are its file's.
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
    """Load the user's LoRA whole, in fp32; `ValueError` where a part of it fits nothing."""
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
    given: dict[str, Tensor] = {}
    load = denoiser.load_lora_adapter

    def watched(tensors: Mapping[str, Tensor], prefix: str = "transformer", **named: Any) -> None:
        # diffusers passes over what fits nothing, with a line in its log
        given.update(_by_module(tensors, prefix, denoiser))
        load(tensors, prefix=prefix, **named)

    try:
        vars(denoiser)["load_lora_adapter"] = watched
        pipeline.load_lora_weights(
            str(files[0].parent), weight_name=files[0].name, adapter_name=ADAPTER
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ValueError(f"lora.start {start} does not fit {kind}: {first_line(error)}") from error
    finally:
        del vars(denoiser)["load_lora_adapter"]
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
    config = denoiser.peft_config[ADAPTER]
    missing = [name for name in _adapter(denoiser) if name not in given] or [
        name
        for name, layer in denoiser.named_modules()
        if isinstance(layer, torch.nn.Linear) and check_target_module_exists(config, name)
    ]
    if missing:
        raise ValueError(
            f"lora.start {start} does not fit {kind}: {len(missing)} of the layers that it says it"
            f" changes are not in it, the first is {missing[0]}"
        )
    for name, parameter in _adapter(denoiser).items():
        parameter.data = given[name].to(parameter.device).float()  # not in the network's precision
    with safe_open(files[0], "pt") as file:
        scales = json.loads((file.metadata() or {}).get(SCALES, "{}"))
    _unfold(denoiser, scales)


def _by_module(
    tensors: Mapping[str, Tensor], prefix: str, denoiser: torch.nn.Module
) -> dict[str, Tensor]:
    """The tensors of a LoRA by the names that peft gives them in the denoiser, which its file calls
    ``prefix``.

    Raises `ValueError`, naming the first, where some fit no layer: there is none of that name, or
    it has another shape.
    """
    inner = {name.removeprefix(f"{prefix}."): value for name, value in tensors.items()}
    if not any("lora_A" in name for name in inner):
        inner = convert_unet_state_dict_to_peft(inner)
    modules = dict(denoiser.named_modules())
    unfit = [name for name, value in inner.items() if not _fits(name, value, modules)]
    if unfit:
        raise ValueError(
            f"{len(unfit)} of its {len(inner)} tensors fit no layer, the first is {unfit[0]}"
            f" {list(inner[unfit[0]].shape)}"
        )
    return inner


def _fits(name: str, value: Tensor, modules: Mapping[str, torch.nn.Module]) -> bool:
    """True where the layer that a tensor changes is there, and of its shape."""
    module = modules.get(name.partition(".lora_")[0])
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    if name.endswith(".lora_A.weight"):
        return value.shape[1:] == weight.shape[1:]
    return not name.endswith(".lora_B.weight") or value.shape[0] == weight.shape[0]


def _adapter(denoiser: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by the names that they have in a file."""
    inner = f".{ADAPTER}."
    return {n.replace(inner, "."): p for n, p in denoiser.named_parameters() if inner in n}


def _layers(denoiser: torch.nn.Module) -> dict[str, LoraLayer]:
    """The layers that the adapter changes, by name."""
    return {
        name: layer
        for name, layer in denoiser.named_modules()
        if isinstance(layer, LoraLayer) and ADAPTER in layer.scaling
    }


def _unfold(denoiser: torch.nn.Module, scales: Mapping[str, float]) -> None:
    """Give every layer the alpha/rank that it learned with, and its B without it: the same policy,
    for which a learning rate means the same as before it was saved.
    """
    for name, layer in _layers(denoiser).items():
        scale = scales.get(name, layer.scaling[ADAPTER])
        for parameter in layer.lora_B[ADAPTER].parameters():
            parameter.data = parameter.data * (layer.scaling[ADAPTER] / scale)
        layer.scaling[ADAPTER] = scale
        layer.lora_alpha[ADAPTER] = scale * layer.r[ADAPTER]


def save(pipeline: Any, name: str, denoiser: torch.nn.Module, directory: Path) -> None:
    """Write `WEIGHTS`, loadable by a plain ``pipe.load_lora_weights(directory, weight_name=...)``.

    B is written times alpha/rank, and alpha as the rank: who reads the tensors alone (ComfyUI, a
    dict) takes alpha for the rank, and who reads the metadata (diffusers) is told so. The metadata
    hold each layer's own alpha/rank too, with which genpolicy goes on.
    """
    scales = {module: layer.scaling[ADAPTER] for module, layer in _layers(denoiser).items()}
    weights = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    for key, value in weights.items():
        module, is_b, _ = key.partition(".lora_B.")
        if is_b:
            weights[key] = value * scales[module]
    if name == "unet":
        weights = convert_state_dict_to_diffusers(weights)
    config = denoiser.peft_config[ADAPTER].to_dict()
    folded = {"lora_alpha": config["r"], "alpha_pattern": config["rank_pattern"]}
    metadata = {**config, **folded, "use_rslora": False}
    layers = {f"{name}_lora_layers": weights, f"{name}_lora_adapter_metadata": metadata}
    type(pipeline).save_lora_weights(directory, **layers)
    file = directory / WEIGHTS
    with safe_open(file, "pt") as written:
        said = written.metadata()
    save_file(load_file(file), file, {**said, SCALES: json.dumps(scales)})


def fuse(pipeline: Any, name: str) -> None:
    """Add the change that the adapter is to the weights of the denoiser ``name``, and take it off.

    Raises `ValueError` where the sum is not finite.
    """
    pipeline.fuse_lora(components=[name], safe_fusing=True, adapter_names=[ADAPTER])
    pipeline.unload_lora_weights()


def kohya(denoiser: torch.nn.Module) -> dict[str, Tensor]:
    """The LoRA of a UNet under kohya's names: B as it learned, and each layer's own alpha, by which
    whoever reads them multiplies it, alpha/rank.
    """
    layers = _layers(denoiser)
    weights = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    named = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in weights.items()})
    for module, layer in layers.items():
        name = "lora_unet_" + module.replace(".", "_")
        named[f"{name}.alpha"] = torch.tensor(float(layer.scaling[ADAPTER] * layer.r[ADAPTER]))
    return {name: value.detach().cpu().contiguous() for name, value in named.items()}
