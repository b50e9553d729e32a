"""A policy as one graph of functions of observations and noise.

The policy that acts is run once, and what it does to its inputs is written down. Everything that
does not depend on them (schedule coefficients, time embeddings, transposed weights) is computed on
the way, by the very operations that act, and enters the graph as a constant.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    has_proxy_slot,
    make_fx,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from genpolicy.chain import Condition
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.model import ControlModel
from genpolicy.contracts.task import Context
from genpolicy.formats._half import NORMS, picking
from genpolicy.policy.policy import ChainPolicy

FIRST, LATER = "first", "later"
"""Names of the graphs of a policy with a warm start."""
PREVIOUS, PLAN = "previous", "plan"
"""The input in which a later decision takes the plan before it, and the output that gives it."""
BACKWARD = (
    torch.ops.aten.silu_backward,
    torch.ops.aten.native_layer_norm_backward,
    torch.ops.aten._softmax_backward_data,
)
"""The gradients that a refiner takes of a critic: ONNX has no operators for them, so that they are
written down as what they are made of.
"""


@dataclass(eq=False)
class Draws:
    """The noise of B chains as it is handed in, [B,draws,*E], in the order in which a chain asks
    for it; of N samples per decision (`fan`) the draws of one stand together.

    It stands in the place of `genpolicy.chain.Noise`.
    """

    values: Tensor
    places: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    def fan(self, width: int) -> "Draws":
        """Each row's draws as those of ``width`` rows."""
        rows, draws, *event = self.values.shape
        return Draws(self.values.reshape(rows * width, draws // width, *event))

    def __call__(self, k: int, shape: tuple[int, ...], device: Any) -> Tensor:
        """The draw of step k, [B,*E]."""
        place = self.places.setdefault(k, len(self.places))
        return self.values[:, place].to(device)


@dataclass(eq=False)
class Counting:
    """Stands in the place of `Draws` to learn how many there are: it draws zeros for B rows."""

    rows: int
    width: int = 1
    asked: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return self.rows

    def fan(self, width: int) -> "Counting":
        self.width = width
        return Counting(self.rows * width, asked=self.asked)

    def __call__(self, k: int, shape: tuple[int, ...], device: Any) -> Tensor:
        self.asked.add(k)
        return torch.zeros(self.rows, *shape, device=device)


def decide(
    policy: ChainPolicy,
    observation: Mapping[str, Tensor],
    noise: Any,
    instruction: str = "",
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The decision of B rows, as it is played: observation name -> [B,history,*shape] and noise to
    the actions that are carried out, [B,n,D] in the environment's units, and the plan [B,T,D].

    previous [B,T,D]: the plan of the decision before, from which a warm start goes on.
    """
    condition = policy.model.encode(Context([instruction] * len(noise), observation))
    return decided(policy, condition, noise, previous)


def decided(
    policy: ChainPolicy, condition: Condition, noise: Any, previous: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The actions and the plan of `decide` from what is encoded already."""
    plan = policy.sample(condition, noise, previous=previous, keep=(0, 0)).x0
    return policy.actions(plan), plan


def acting(policy: ChainPolicy, instruction: str = "", later: bool = False) -> Callable[..., Any]:
    """The decision as a function of tensors: the observations in the model's order, of a decision
    that is ``later`` than an episode's first one the plan before, then noise. It returns the
    actions, and of a policy with a warm start the plan, too.
    """
    names = list(policy.model.shapes)  # type: ignore[attr-defined]  # it acts
    policy = picking(policy)

    def function(*values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        *seen, noise = values
        previous = seen.pop() if later else None
        observation = dict(zip(names, seen, strict=True))
        decided = decide(policy, observation, Draws(noise), instruction, previous)
        return decided[0] if policy.warm is None else decided

    return function


@torch.no_grad()
def noise_shape(policy: ChainPolicy) -> tuple[int, ...]:
    """The shape [draws,*E] of the noise of one decision: of the one that draws most."""
    draws, seen = 1, blank(policy.model, 1)  # type: ignore[arg-type]
    for previous in (None,) if policy.warm is None else (None, no_plan(policy, 1)):
        counting = Counting(1)
        decide(policy, seen, counting, previous=previous)
        draws = max(draws, counting.width * len(counting.asked))
    return (draws, *policy.model.event_shape)


@torch.no_grad()
def reads(policy: ChainPolicy) -> bool:
    """True for a policy that decides by its instruction, too."""
    seen = blank(policy.model, 1)  # type: ignore[arg-type]
    noise = torch.zeros(1, *noise_shape(policy))
    decisions = [decide(policy, seen, Draws(noise), words)[0] for words in ("left", "go right")]
    return not torch.equal(*decisions)


def no_plan(policy: ChainPolicy, rows: int) -> Tensor:
    """Plans of B rows that are all zero, [B,T,D]."""
    return torch.zeros(rows, *policy.model.event_shape, device=policy.model.device)


def blank(model: ControlModel, rows: int) -> dict[str, Tensor]:
    """Observations of B rows that are all zero, name -> [B,history,*shape]."""
    return {
        name: torch.zeros(rows, model.history, *shape, device=model.device)
        for name, shape in model.shapes.items()
    }


@torch.no_grad()
def captured(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """The graph of a function of tensors, for inputs of exactly these shapes; its constants are
    buffers.

    Raises `ConfigError` where the function leaves torch on the way from its inputs to its result:
    pi0.5 writes the robot's state into its prompt, as words.
    """

    def folding(*tensors: Tensor) -> Any:
        with _Folding():
            return function(*tensors)

    backward: Any = get_decompositions(BACKWARD)
    try:
        traced = make_fx(folding, decomposition_table={**backward, **NORMS}, tracing_mode="real")(
            *inputs
        )
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ConfigError(
            "the policy can't be written down as one graph: on its way from what it sees to its"
            " actions it does what is no operation on tensors, as pi0.5 does when it writes the"
            f" state into its prompt ({' '.join(str(error).split())[:200]})"
        ) from error
    return _tidied(traced).eval()


class _Folding(TorchDispatchMode):
    """Computes what does not depend on the traced inputs, each once, and keeps it out of the graph.

    Results are known by their operation and the memory of what it was given, so that a weight that
    is transposed in every step is one constant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done: dict[Any, tuple[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = tree_leaves((args, kwargs or {}))
        tracer = get_proxy_mode().tracer  # type: ignore[union-attr]

        def traced(value: Tensor) -> bool:
            return has_proxy_slot(value, tracer)

        def kept(value: Tensor) -> Tensor:
            # as it is now: a parameter may hold other values later (a policy's base)
            with disable_proxy_modes_tracing():
                return value if traced(value) else value.detach()

        if any(isinstance(value, Tensor) and traced(value) for value in given):
            return func(
                *tree_map_only(Tensor, kept, args), **tree_map_only(Tensor, kept, kwargs or {})
            )
        with disable_proxy_modes_tracing():
            if func._schema.is_mutable:
                return func(*args, **(kwargs or {}))
            key = (func, *(_identity(a) if isinstance(a, Tensor) else repr(a) for a in given))
            if key not in self.done:
                # what it was given is kept: its memory must not be given to another tensor
                self.done[key] = given, func(*args, **(kwargs or {}))
            return tree_map_only(Tensor, lambda made: made.detach(), self.done[key][1])


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype


def _tidied(traced: GraphModule) -> GraphModule:
    """The same graph with every constant, and every operation on the same inputs, in it once."""
    root, constants, seen = nn.Module(), {}, {}
    for node in list(traced.graph.nodes):
        if node.op == "get_attr":
            value: Tensor = getattr(traced, str(node.target))
            name = constants.setdefault(_identity(value), f"constant_{len(constants)}")
            root.register_buffer(name, value.detach())
            node.target = name
        elif node.op != "call_function" or _changes(node):
            continue
        key = (node.op, node.target, repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            traced.graph.erase_node(node)
        else:
            seen[key] = node
    tidy = GraphModule(root, traced.graph)
    tidy.graph.eliminate_dead_code()
    tidy.recompile()
    return tidy


def _changes(node: Node) -> bool:
    """True for an operation that writes into what it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def doubled(graph: GraphModule) -> GraphModule:
    """The same function in fp64, with the same (fp32) constants: the measure of rounding."""
    for node in graph.graph.nodes:
        if node.kwargs.get("dtype") is torch.float32:
            node.kwargs = {**node.kwargs, "dtype": torch.float64}
    graph.recompile()
    return graph.double()
