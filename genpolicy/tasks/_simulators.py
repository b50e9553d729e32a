"""Imports simulators late, and so that they can draw without a screen."""

import contextlib
import ctypes.util
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

from genpolicy.config.errors import ConfigError


def library(module: str, needed_by: str) -> ModuleType:
    """Imports a module of the extra `robots`; where it is missing, raises `ConfigError` with
    the command to run.

    Where there is no screen but EGL, MuJoCo is told to draw with it. It reads that once, when it is
    first imported, and fails to import where EGL is named but missing.
    """
    if "MUJOCO_GL" not in os.environ and _only_egl():
        os.environ["MUJOCO_GL"] = "egl"
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{needed_by} needs {module.partition('.')[0]}: "
            f"pip install 'genpolicy[robots]' ({error})"
        ) from error


@functools.cache
def _only_egl() -> bool:
    screen = "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return sys.platform == "linux" and not screen and ctypes.util.find_library("EGL") is not None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences pygame's greeting and its warning of its own imports."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")
        yield
