"""Errors that are one sentence to whoever runs the robot."""

from typing import Any

SHOWN = 80
"""Characters of a value that an error repeats."""


class ExportError(ValueError):
    """The fault of an exported folder, or of the machine that shall run it, in one sentence."""


class ObservationError(ValueError):
    """The fault of an observation, in one sentence; the policy is as it was before."""


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
