"""The settings of a part, which a stranger may have written."""

from pathlib import Path

from genpolicy.config.documents import json_value
from genpolicy.config.parse import decode


def read[T](kind: type[T], file: Path) -> T:
    """The dataclass ``kind`` from a file of json, strictly: `ConfigError` names the key that is
    wrong.
    """
    return decode(kind, json_value(file.read_text(encoding="utf-8"), file.name), file.name)
