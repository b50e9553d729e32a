"""Errors that are one sentence to whoever runs the robot."""

from typing import Any

SHOWN = 80
"""Characters of a value that an error repeats."""


class ExportError(ValueError):
    """The fault of an exported folder, or of the machine that shall run it, in one sentence."""


class ObservationError(ValueError):
    """The fault of an observation, in one sentence; the policy is as it was before."""


def plain(text: str) -> str:
    """A text for one line of a terminal: what can't be printed is written as Python escapes it."""
    escaped = (
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text
    )
    return "".join(escaped)


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
