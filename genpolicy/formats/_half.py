"""Half precision: the networks' products and convolutions, as torch's autocast chooses them; all
else that a policy does stays in single precision.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from genpolicy.policy.policy import ChainPolicy


def _of_one_type(norm: Callable[..., Any]) -> Callable[..., Any]:
    """A normalisation whose weights have the type of what it normalises: torch takes half precision
    with weights in single precision, and ONNX does not.
    """

    def same(value: Tensor, *arguments: Any) -> Any:
        cast = [
            given.to(value.dtype) if isinstance(given, Tensor) else given for given in arguments
        ]
        changed = any(new is not old for new, old in zip(cast, arguments, strict=True))
        return norm(value, *cast) if changed else NotImplemented

    return same


NORMS = {
    norm: _of_one_type(norm)
    for norm in (
        torch.ops.aten.native_layer_norm.default,
        torch.ops.aten.native_group_norm.default,
    )
}
"""The normalisations as they are written down."""


def picking(policy: ChainPolicy) -> ChainPolicy:
    """The same policy whose critic and refiner stay in single precision inside `halved`: which
    sample is picked is not left to its rounding.
    """

    def single(function: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
        if function is None:
            return None

        def run(*given: Any) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return function(*tree_map_only(Tensor, Tensor.float, given))

        return run

    return replace(policy, judge=single(policy.judge), refiner=single(policy.refiner))


def halved(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with the networks' products and convolutions in half precision; what
    normalises, the chain's steps and what goes in and comes out stay in single precision.
    """

    def half(*values: Tensor) -> Any:
        with torch.autocast("cpu", torch.float16):
            return function(*values)

    return half


def precise(function: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """The function in "fp32", as it is, or `halved` in "fp16"."""
    return halved(function) if precision == "fp16" else function
