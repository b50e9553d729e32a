"""The device of a model whose settings name none."""

import os

import torch


def default_device() -> torch.device:
    """This process's accelerator (torchrun's LOCAL_RANK says which), or the CPU."""
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
