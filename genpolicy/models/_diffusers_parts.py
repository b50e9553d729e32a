"""The networks of a pipeline, and the device that each of them is on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from genpolicy.models._diffusers_load import DENOISERS


@dataclass(frozen=True)
class Parts:
    """The networks of ``pipeline`` on ``device``; with ``offload`` the denoisers alone."""

    pipeline: Any
    device: torch.device
    offload: bool

    def modules(self) -> dict[str, torch.nn.Module]:
        """Returns the networks by the names that the pipeline gives them."""
        return {
            name: part
            for name, part in self.pipeline.components.items()
            if isinstance(part, torch.nn.Module)
        }

    def place(self) -> None:
        """Moves the parts (with ``offload`` the denoisers) to the device, and makes it the
        pipeline's.
        """
        device = self.device
        plain = type(self.pipeline)
        # a pipeline takes its device from whichever part comes first, which may be one that is
        # offloaded
        self.pipeline.__class__ = type(
            plain.__name__, (plain,), {"_execution_device": property(lambda _: device)}
        )
        self.pipeline.set_progress_bar_config(disable=True)
        for name, part in self.modules().items():
            part.to("cpu" if self.offload and name not in DENOISERS else device)

    @contextmanager
    def visiting(self, *prefixes: str) -> Iterator[None]:
        """Moves the parts whose names start with one of ``prefixes`` to the device for the block,
        and to the CPU after it. Without ``offload`` it moves nothing.
        """
        visitors = [
            part
            for name, part in self.modules().items()
            if self.offload and name.startswith(prefixes)
        ]
        try:
            for part in visitors:
                part.to(self.device)
            yield
        finally:
            for part in visitors:
                part.to("cpu")
