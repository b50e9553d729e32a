"""The files of our own small policies: weights and statistics as safetensors, settings and sizes of
what is seen and done as json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.config.documents import json_file
from genpolicy.config.parse import decode
from genpolicy.models._mlp_scaling import Scaling


@dataclass(frozen=True)
class _Sizes:
    """The sizes of what a saved one sees and does."""

    shapes: dict[str, list[int]]  # of observations, by name
    action_dim: int


@dataclass(frozen=True)
class Found:
    """The contents of a saved policy's folder.

    file: of its settings. settings: by name, not checked yet. shapes, action_dim: of what it sees
    and does. weights: the other file, read onto ``device`` when it is asked for.
    """

    file: Path
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    action_dim: int
    weights: Path
    device: torch.device

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Weights and statistics, by name."""
        return load_file(self.weights, device=str(self.device))

    def scaling(self, prefixes: tuple[str, ...]) -> Scaling:
        """The statistics: the tensors whose names begin with none of the weights' ``prefixes``."""
        return Scaling({n: v for n, v in self.tensors.items() if not n.startswith(prefixes)})

    def restore(self, modules: Mapping[str, torch.nn.Module]) -> None:
        """Gives modules, by the prefix of their weights' names, the weights that were saved."""
        for prefix, module in modules.items():
            mine = [name for name in self.tensors if name.startswith(prefix)]
            module.load_state_dict({name.removeprefix(prefix): self.tensors[name] for name in mine})


def read(folder: Path, kind: str, device: torch.device) -> Found:
    """Reads the folder of a saved policy of a kind (mlp, tokens).

    Raises `FileNotFoundError` where it is none, and `ValueError` where its settings are damaged.
    """
    file, weights = folder / f"{kind}.json", folder / f"{kind}.safetensors"
    if not file.is_file() or not weights.is_file():
        raise FileNotFoundError(
            f"policy.pretrained {folder} is no saved {kind}: it has no {file.name} and"
            f" {weights.name}"
        )
    document = json_file(file)
    if not isinstance(document, dict):
        raise ValueError(f"{file} is damaged: it must hold the settings of a policy {kind}")
    facts = {name: document.pop(name) for name in ("shapes", "action_dim") if name in document}
    sizes = decode(_Sizes, facts, str(file))
    shapes = {name: tuple(shape) for name, shape in sizes.shapes.items()}
    return Found(file, document, shapes, sizes.action_dim, weights, device)


def write(
    directory: Path,
    kind: str,
    settings: Mapping[str, Any],
    modules: Mapping[str, torch.nn.Module],
    scaling: Scaling,
) -> None:
    """Writes the two files that `read` reads; shapes and action_dim are among the settings."""
    (directory / f"{kind}.json").write_text(json.dumps(settings, indent=1) + "\n")
    weights = {
        prefix + name: value
        for prefix, module in modules.items()
        for name, value in module.state_dict().items()
    }
    save_file({**weights, **scaling.tensors}, directory / f"{kind}.safetensors")
