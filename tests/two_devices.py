"""A second device on a machine that has none: tensors on the device "meta" that have values.

While `TwoDevices` is entered, `Tensor.to("meta")` and every factory with device="meta" make a
`Remote`, whose numbers lie on the CPU but which the rest of torch takes for a tensor elsewhere. An
operation that meets tensors of both places raises, as it would on a GPU: only scalars of the host
mix with the device's tensors, indices of the host may pick its rows, and copies cross.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from genpolicy.models._diffusers_load import load_pipeline

DEVICE = torch.device("meta")
"""The pretended device."""
AUTOCAST = torch.autocast
paused: list[bool] = []
"""Not empty while a library loads."""
aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._to_copy.default}
"""The operations that carry values from one place to the other."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._unsafe_index.Tensor, aten._index_put_impl_.default}
"""The operations whose second argument, the indices, may lie on the host."""
JOINING = {aten.cat.default, aten.stack.default}
"""The operations that take no scalars of another place."""


class Remote(Tensor):
    """A tensor of the pretended device; ``inner`` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Remote":
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert a tensor of {self.device} to numpy: copy it to the CPU")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files hold numbers: what is saved from the device is read on the CPU."""
        return self.inner.__reduce_ex__(protocol)


class _Dispatched(TorchDispatchMode):
    """Carries out every operation where its tensors are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if paused:
            return func(*args, **(kwargs or {}))
        return _carried_out(func, args, kwargs or {})


class _Called(TorchFunctionMode):
    """Lets numbers reach the device, which torch would drop on the way to "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _remote(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": None}).to(DEVICE)
        return func(*args, **kwargs)


class TwoDevices(AbstractContextManager):
    """While it is entered, "meta" is a device with numbers of its own."""

    def __enter__(self) -> None:
        self._modes = ExitStack()
        self._modes.enter_context(_Called())
        self._modes.enter_context(_Dispatched())
        for name, replacement in REPLACED.items():
            self._modes.enter_context(mock.patch(name, replacement))

    def __exit__(self, *error: Any) -> None:
        self._modes.close()


@contextmanager
def _opened(name: Any, framework: str, device: str, **settings: Any) -> Iterator[Any]:
    """The part of safetensors' `safe_open` that its `load_file` needs."""
    with safe_open(name, framework, device="cpu", **settings) as file:
        tensors = {name: tensor.to(device) for name, tensor in file.get_tensors().items()}
        yield SimpleNamespace(get_tensors=lambda: tensors)


def _pausing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a library that loads to the CPU by way of its own empty "meta" tensors."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        paused.append(True)
        try:
            return function(*args, **kwargs)
        finally:
            paused.pop()

    return called


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    """Autocast on the device that carries out the operations."""
    return AUTOCAST("cpu", *args, **kwargs)


def _lerobot_knows(device: str) -> bool:
    return device in ("cpu", str(DEVICE))


REPLACED: dict[str, Any] = {
    "safetensors.torch.safe_open": _opened,
    "torch.autocast": _autocast,
    "genpolicy.models.diffusers_pipeline.load_pipeline": _pausing(load_pipeline),
    "lerobot.configs.policies.is_torch_device_available": _lerobot_knows,
    "lerobot.configs.policies.is_amp_available": _lerobot_knows,
}
"""Functions of libraries that know which devices there are, or that use "meta" themselves."""


def _remote(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _carried_out(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation, on the device of what went in, or on the one that it names."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, Remote) for tensor in tensors)
    if there and func not in CROSSING:
        _require_one_place(func, args, kwargs)
    generator = kwargs.get("generator")
    if there and generator is not None:
        raise RuntimeError(f"{func}: a generator of {generator.device} draws for {DEVICE}")
    if kwargs.get("device") is not None:
        there = _remote(kwargs["device"])
        kwargs = {**kwargs, "device": "cpu"}
    elif func in CROSSING:
        there = isinstance(args[0], Remote)
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not there:
        return found
    # what was changed in place is itself again
    known = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, Remote)}
    return tree_map(lambda value: _wrapped(value, known), found)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Remote) else value


def _wrapped(value: Any, known: Mapping[int, Remote]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else Remote(value)


def _require_one_place(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises `RuntimeError` where the device's tensors meet the host's."""
    placed = list(args)
    if func in INDEXING and isinstance(args[0], Remote):
        del placed[1]
    leaves = [leaf for leaf in tree_leaves((placed, kwargs)) if isinstance(leaf, Tensor)]
    host = [leaf for leaf in leaves if not isinstance(leaf, Remote)]
    changed = [
        argument
        for argument, declared in zip(args, func._schema.arguments, strict=False)
        if declared.alias_info is not None and declared.alias_info.is_write
    ]
    written = [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]
    if any(tensor.ndim or func in JOINING for tensor in host) or any(
        not isinstance(tensor, Remote) for tensor in written
    ):
        shapes = [(str(tensor.device), tuple(tensor.shape)) for tensor in leaves]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device: {shapes}")
