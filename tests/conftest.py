"""Every test draws from the same seed and runs on one thread, alone or in any order."""

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
