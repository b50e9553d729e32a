"""The execution providers of onnxruntime: the CPU, CUDA or TensorRT."""

import os
import sys
from pathlib import Path
from typing import Any

import onnxruntime

from genpolicy_runtime.errors import ExportError, shown

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""Our names, and onnxruntime's."""


def providers(name: str, weights: str) -> list[tuple[str, dict[str, Any]]]:
    """The execution providers of a session, the asked one first, and their options.

    weights: checksum of the policy's weights, which names the folder of TensorRT's engines. The
    CPU computes what TensorRT and CUDA can't.
    """
    if name not in PROVIDERS:
        raise ExportError(f"provider is {shown(name)}; it must be one of {', '.join(PROVIDERS)}")
    available = onnxruntime.get_available_providers()
    if PROVIDERS[name] not in available:
        raise ExportError(
            f"provider {name} needs an onnxruntime with {PROVIDERS[name]}, and this one has"
            f" {', '.join(available)}: install onnxruntime-gpu in the place of onnxruntime"
        )
    options: dict[str, dict[str, Any]] = {"cpu": {}, "cuda": {}, "tensorrt": {}}
    if name == "tensorrt":
        options["tensorrt"] = _engines(_cache() / "tensorrt" / weights[:16])
    order = {"cpu": ["cpu"], "cuda": ["cuda", "cpu"], "tensorrt": ["tensorrt", "cuda", "cpu"]}
    return [(PROVIDERS[one], options[one]) for one in order[name] if PROVIDERS[one] in available]


def _engines(folder: Path) -> dict[str, Any]:
    """The options with which TensorRT keeps its engines, which take minutes to build.

    They are code of this machine: they lie in the user's cache and never in the exported folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(folder),
    }


def _cache() -> Path:
    """The user's folder for what can be made again."""
    if sys.platform == "win32":
        home = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "genpolicy-runtime"
