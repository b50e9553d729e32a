"""The parameters that a network's output is computed with."""

from typing import Any

from torch import Tensor


def reached(output: Tensor) -> set[Tensor]:
    """Returns the parameters that a gradient of ``output`` reaches."""
    found: set[Tensor] = set()
    visited: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [before for before, _ in node.next_functions]
    return found
