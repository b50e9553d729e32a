"""genpolicy: improve diffusion and flow policies by reinforcement learning.

Importing this package loads nothing else: `genpolicy.load` and `genpolicy.train` are found when
first used (PEP 562), so that the command line answers at once and `genpolicy.deploy.runtime` needs
no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genpolicy.policy.files import load
    from genpolicy.training.experiment import train

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]

_HOME = {"load": "genpolicy.policy.files", "train": "genpolicy.training.experiment"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'genpolicy' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
