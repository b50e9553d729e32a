"""The memory that a run of a published pipeline will need, computed without weights or device.

The denoiser is made on the device "meta", which knows shapes alone, and shown one row, so that what
autograd keeps for its backward is counted tensor by tensor. Attention keeps its queries, keys,
values and result, as flash attention does; the matrix of weights is never whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from genpolicy.models._diffusers_lora import ATTENTION, Lora
from genpolicy.models._diffusers_published import Published

GB = 1e9
ADAM = 8  # bytes per weight that learns: both moments in fp32
FULL = 4  # bytes of a number in fp32


@dataclass(frozen=True)
class Memory:
    """Bytes. denoiser: the network that acts. learned: what is beside it for what learns (fp32
    weights of a LoRA, gradients, Adam's moments, averages). others: text encoders and VAE.
    kept: of one row, for its backward, each branch of guidance that has one counted.
    event: the dims of one sample. visiting: the others come to the device one after the other.
    """

    denoiser: float
    learned: float
    text: float
    vae: float
    kept: float
    event: int
    visiting: bool

    @property
    def resident(self) -> float:
        """The bytes that are on the device while rows are learned from."""
        return self.denoiser + self.learned + (0.0 if self.visiting else self.text + self.vae)

    def rows(self, card: float, trajectories: float) -> int:
        """The rows at a time that fit on a card, of which a tenth is left free; 0 where none do,
        or where the text encoders find no room.
        """
        usable = 0.9 * card
        if self.visiting and self.denoiser + self.learned + self.text > usable:
            return 0
        return max(int((usable - self.resident - trajectories) // self.kept), 0)


def computed(
    published: Published,
    call: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    lora: Lora | None,
    checkpointing: bool,
    offload: bool,
    averaged: bool,
    branches: int,
) -> Memory:
    """The memory of a pipeline. lora: None where the whole denoiser learns. averaged: a moving
    average of what learns is kept. branches: evaluations per row that are differentiated.
    """
    with torch.device("meta"):
        denoiser: nn.Module = getattr(diffusers, published.denoiser)(**published.settings)
    _in(denoiser, dtype).requires_grad_(lora is None)
    weights = sum(p.numel() for p in denoiser.parameters())
    if lora is not None:
        targets = list(lora.targets or ATTENTION)
        with torch.device("meta"):
            denoiser.add_adapter(  # type: ignore[operator]  # diffusers' PeftAdapterMixin
                LoraConfig(r=lora.rank, init_lora_weights=False, target_modules=targets)
            )
        _in(denoiser, dtype)
    learning = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    copies = FULL + ADAM + (FULL if averaged else 0) + (FULL if lora is not None else 0)
    inputs = published.inputs(call, 1)
    seen = inputs.get("sample", inputs.get("hidden_states"))
    assert seen is not None
    return Memory(
        denoiser=weights * (dtype.itemsize if lora is not None else FULL),
        learned=learning * copies,
        text=published.text * dtype.itemsize,
        vae=published.vae * FULL,
        kept=branches * kept(denoiser, inputs, dtype, checkpointing),
        event=seen.numel(),
        visiting=offload,
    )


def _in(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in another precision; diffusers' own ``to`` warns of parts that stay in fp32."""
    return nn.Module.to(network, dtype)


def kept(
    denoiser: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype, checkpointing: bool
) -> float:
    """The bytes that autograd keeps of one evaluation. With checkpointing a block keeps what it was
    given, and the largest block is computed again whole.
    """
    outside, blocks = _Kept(denoiser), list[tuple[float, float]]()

    def block(function: Callable[..., Any], *given: Any) -> Any:
        inside = _Kept(denoiser)
        with inside:
            made = function(*given)
        blocks.append((_bytes(given), inside.bytes))
        return made

    denoiser.enable_gradient_checkpointing(block)  # type: ignore[operator]  # diffusers' ModelMixin
    denoiser.train()  # diffusers asks for it; there is no dropout to draw
    with outside, _FlashAttention(), torch.enable_grad():
        denoiser(**_cast(inputs, dtype), return_dict=False)
    if not checkpointing:
        return outside.bytes + sum(inside for _, inside in blocks)
    given = sum(before for before, _ in blocks)
    return outside.bytes + given + max((inside for _, inside in blocks), default=0.0)


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of what is saved for a backward, each memory once, weights not at all."""

    def __init__(self, network: nn.Module) -> None:
        self.bytes = 0.0
        self._known = {p.untyped_storage()._cdata for p in network.parameters()}
        self._alive: list[Tensor] = []  # or its memory might be given to another
        super().__init__(self._pack, lambda saved: saved)

    def _pack(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(saved)
            self.bytes += storage.nbytes()
        return saved


class _FlashAttention(TorchFunctionMode):
    """Puts `_Attention` in the place of torch's, which on "meta" would keep the whole matrix."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs or {}).values())[:3]
            return _Attention.apply(query, key, value)
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """The shapes of attention, queries [B,H,L,D] and values [B,H,S,D'] -> [B,H,L,D']."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        # in the order of memory of the kernel, whose result is joined over heads without a copy
        made = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, made, sums)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("shapes alone have no gradient")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return {name: _cast(inner, dtype) for name, inner in value.items()}


def _bytes(given: Any) -> float:
    if isinstance(given, Tensor):
        return given.untyped_storage().nbytes()
    if isinstance(given, tuple | list):
        return sum(map(_bytes, given))
    return sum(map(_bytes, given.values())) if isinstance(given, dict) else 0.0
