"""Keeps what a VAE has encoded on disk, so that it runs once per picture however often the picture
is learned from.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from genpolicy.config.whole_file import STAGED

EVENT, DIGEST = "event", "sha256"


@dataclass(frozen=True)
class KeptLatents:
    """Samples [B,*E] by the content of the outputs that they were encoded from.

    folder: a file per sample, below folders named like the first two letters of its name.
    encoder: a digest of all that the samples depend on besides (`digest`). shape: *E.
    """

    folder: Path
    encoder: str
    shape: tuple[int, ...]

    def __call__(self, outputs: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The samples [B,*E] of ``outputs``, on the CPU, of which those that are not kept, or whose
        file is damaged, are encoded now: ``encode`` [b,...] -> [b,*E], a function of each row
        alone.
        """
        names = [self._name(output) for output in outputs]
        found = {name: self._read(name) for name in names}
        missing = {name: row for row, name in enumerate(names) if found[name] is None}
        if missing:
            encoded = encode(outputs[list(missing.values())]).float().cpu()
            for name, sample in zip(missing, encoded, strict=True):
                self._write(name, sample.contiguous())
                found[name] = sample
        return torch.stack([found[name] for name in names])

    def _name(self, output: Tensor) -> str:
        kind = [self.encoder, str(output.dtype), list(output.shape)]
        return digest(kind, {"output": output})

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, name: str) -> Tensor | None:
        """The sample that is kept under a name; None where there is none that is whole."""
        try:
            with safe_open(self._path(name), "pt") as file:
                sample, known = file.get_tensor(EVENT), (file.metadata() or {}).get(DIGEST)
        except (OSError, SafetensorError):
            return None
        whole = tuple(sample.shape) == self.shape and known == digest(name, {EVENT: sample})
        return sample if whole else None

    def _write(self, name: str, sample: Tensor) -> None:
        """Writes a whole file or none. It need not reach the disk at once: one that a power cut has
        torn does not fit its digest.
        """
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # another process may write the same one
        staged = path.with_name(f"{STAGED}{os.getpid()}.{path.name}")
        try:
            # by ourselves: the library's own half-written files have names that no resumed run
            # knows, and its error of a full disk is none of the system's
            staged.write_bytes(save({EVENT: sample}, {DIGEST: digest(name, {EVENT: sample})}))
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)


def digest(settings: Any, tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of settings, written as JSON, and of tensors with their names, kinds and shapes,
    in hexadecimal digits.
    """
    hashed = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(tensors.items()):
        hashed.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()
