"""Imports LeRobot's data sets and what reads their files (`datasets`, pyarrow) without noise, when
they are needed: it takes seconds.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from genpolicy.config.errors import ConfigError


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the bars of `datasets`, and the traceback of pages that torchcodec prints where
    FFmpeg is missing (LeRobot then decodes videos with PyAV).
    """
    datasets = _needed("datasets")
    imports = logging.getLogger("lerobot.utils.import_utils")
    barred = datasets.is_progress_bar_enabled()
    level = imports.level
    imports.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        imports.setLevel(level)
        if barred:
            datasets.enable_progress_bars()


def arrow() -> Any:
    """The module pyarrow, with its parquet files and its functions."""
    return _needed("pyarrow.parquet") and _needed("pyarrow.compute") and _needed("pyarrow")


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            "data sets of parquet files need what lerobot brings: pip install genpolicy[robots]"
        ) from error
