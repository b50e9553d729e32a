"""Python files beside a tokenizer or a network of transformers: they are not run, and nobody is
asked.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import dynamic_module_utils as transformers_code


@contextmanager
def unasked() -> Iterator[None]:
    """Lets transformers refuse such files where it would ask on the terminal to run them."""
    seconds = transformers_code.TIME_OUT_REMOTE_CODE
    transformers_code.TIME_OUT_REMOTE_CODE = 0  # its own way to ask nobody
    try:
        yield
    finally:
        transformers_code.TIME_OUT_REMOTE_CODE = seconds
