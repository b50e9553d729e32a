"""The origin of a section: who wrote the file that it was read from, and so whose code it may
import.

What the person who runs genpolicy names themselves (their YAML, their options, their calls) is
theirs. What is reached through a policy or a data set is a stranger's.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from genpolicy.config.errors import ConfigError, shown


@dataclass(frozen=True)
class Origin:
    """The writer of a section, which all that imports by a name from it must ask (`admit`)."""

    # the stranger's file that the section was read from; None: the person wrote it
    file: str | None = None
    # the person said --trust: strangers' files may import what they name
    trust: bool = False
    # texts that the person gave in place of the file's own (an option's value)
    named: frozenset[str] = frozenset()
    # folder of the person's YAML, beside which their own modules may lie
    folder: str | None = None

    def reached(self, file: str | Path) -> Self:
        """The origin of what is read from a policy's or a data set's file."""
        return replace(self, file=str(file), folder=None)

    def naming(self, given: Any) -> Self:
        """The origin of the same section, in which the person has replaced values by ``given``."""
        return replace(self, named=self.named | frozenset(_texts(given)))

    def admit(self, path: str, what: str) -> None:
        """Raises `ConfigError` unless the code of ``path`` may be imported; call it just before.

        The person's own modules may lie in the current folder and beside their YAML: both are put
        last on Python's path. A stranger's file alone never puts a folder there.
        """
        if self.file is not None and not self.trust and path not in self.named:
            raise ConfigError(
                f"{self.file} names the {what} {shown(path)}, which is code: it is imported only"
                " with --trust (trust=True in Python), for files whose author you trust"
            )
        for folder in (os.getcwd(), self.folder):
            there = {os.path.abspath(entry) for entry in sys.path}
            if folder is not None and os.path.abspath(folder) not in there:
                sys.path.append(os.path.abspath(folder))


PERSON = Origin()
"""The origin of what the person wrote, where no YAML is involved."""
STRANGER = Origin(file="the file that names it")
"""The origin of what nobody has vouched for."""


def _texts(given: Any) -> Iterator[str]:
    """Every text in a value: keys, items, and itself."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, Mapping):
        for key, value in given.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(given, list | tuple):
        for value in given:
            yield from _texts(value)
