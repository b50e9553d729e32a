"""Every test draws from the same seed and runs on one thread, alone or in any order."""

import os
import random
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

# Each process has a folder of its own, where diffusers copies a pipeline's Python files to run them.
_modules = TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = _modules.name


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
