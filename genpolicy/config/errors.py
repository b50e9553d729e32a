"""Errors that are one sentence to the user, and the checks of settings that raise them."""

import dataclasses
import difflib
import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN = 200
"""Characters of a value that an error repeats."""
GO_ON = "go on with "
"""The beginning of an error's note that ends with the command that resumes the run."""
OUTSIDE = "it came out of the task or a reward, and not out of what was asked"
"""The note of an `OSError` that is no mistake of the person's, and keeps its traceback."""


class ConfigError(ValueError):
    """The mistake in what the user asked for, in one sentence."""


class RenderError(RuntimeError):
    """The reason why there is no picture of an environment here, in one sentence.

    It stands here and not beside `genpolicy.contracts.task.Environments`, because processes that
    only simulate raise it and never import torch.
    """


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long: an error is one sentence."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def place(error: BaseException) -> str:
    """The file and the line that raised an error, as in toy.py:76."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def nearest(word: str, valid: Sequence[str]) -> str:
    """The end of an error message: '; did you mean a?', '; valid are ...' or '; there are none'."""
    if not valid:
        return "; there are none"
    close = difflib.get_close_matches(word, valid, n=3)
    return (
        f"; did you mean {', '.join(close)}?"
        if close
        else f"; valid are {', '.join(sorted(valid))}"
    )


def choice(what: str, value: Any, valid: Sequence[str]) -> None:
    """Raises unless ``value`` is one of ``valid``."""
    if value not in valid:
        raise ConfigError(f"{what} is {shown(value)}{nearest(str(value), valid)}")


def at_least(where: str, section: Any, **least: float) -> None:
    """Raises unless every named field of ``section`` is None or finite and at least that much."""
    for name, low in least.items():
        value = getattr(section, name)
        if value is not None and not low <= value < math.inf:
            raise ConfigError(f"{where}: {name} is {value}; it must be at least {low}")


def at_most(where: str, section: Any, **most: float) -> None:
    """Raises unless every named field of ``section`` is None or at most that much."""
    for name, high in most.items():
        value = getattr(section, name)
        if value is not None and not value <= high:
            raise ConfigError(f"{where}: {name} is {value}; it must be at most {high}")


def positive(where: str, section: Any, *names: str) -> None:
    """Raises unless every named field of ``section`` is None or a finite number above 0."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{where}: {name} is {value}; it must be above 0")


def share(where: str, section: Any, *names: str) -> None:
    """Raises unless every named field of ``section`` lies in [0, 1]."""
    for name in names:
        value = getattr(section, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{where}: {name} is {value}; it must lie in [0, 1]")


def unread(where: str, section: Any, why: str, *names: str) -> None:
    """Raises where a named field of ``section`` is not its default, and would be ignored: ``why``,
    as in "with length 1". Names: none for all fields.
    """
    for field in dataclasses.fields(section):
        if names and field.name not in names:
            continue
        made = field.default_factory
        usual = field.default if made is dataclasses.MISSING else made()
        if (value := getattr(section, field.name)) != usual:
            raise ConfigError(
                f"{where}: {field.name} is {shown(value)}, and {why} nothing reads it: leave it out"
            )


def divides(where: str, section: Any, part: str, whole: str) -> None:
    """Raises unless the field ``part`` divides the field ``whole``."""
    small, large = getattr(section, part), getattr(section, whole)
    if large % small:
        raise ConfigError(
            f"{where}: {whole} is {large} and can't be split evenly into {part} = {small}; "
            "choose a multiple of it"
        )
