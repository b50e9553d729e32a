"""A reward that depends on the prompt alone."""

import torch
from torch import Tensor

from genpolicy.contracts.task import Context


def offset(outputs: Tensor, context: Context) -> Tensor:
    """3 for bright prompts, -3 for others."""
    return torch.tensor([3.0 if "bright" in prompt else -3.0 for prompt in context.prompts])
