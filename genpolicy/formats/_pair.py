"""A vision-language-action policy as two graphs: the prefix reads pictures, state and instruction
once, and its expert takes what the prefix made of them, and noise.

The instruction is an input, as tokens. What the expert does not need of the prefix, and what either
does not need of the observations, is no output and no input.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from genpolicy.chain import Condition
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.model import PrefixModel
from genpolicy.contracts.task import Context
from genpolicy.formats import _graph
from genpolicy.formats._capture import (
    LATER,
    PLAN,
    PREVIOUS,
    Draws,
    blank,
    captured,
    decided,
    no_plan,
)
from genpolicy.formats._half import picking, precise
from genpolicy.policy.policy import ChainPolicy

PREFIX, EXPERT = "prefix", "expert"
"""Names of the two graphs; of a policy with a warm start the expert is "first" and "later"."""
CACHE = "cache"
"""The beginning of the names of what goes from the prefix to its expert."""


@dataclass(frozen=True)
class Pair:
    """The sessions of a prefix and of its expert, run as one; words: the tokens that it is told, by
    the input's name.
    """

    prefix: Any
    expert: Any
    words: Mapping[str, np.ndarray]

    def run(self, _names: None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of the expert."""
        known = {**feed, **self.words}
        made = self.prefix.run(None, _taken(self.prefix, known))
        names = [one.name for one in self.prefix.get_outputs()]
        known.update(zip(names, made, strict=True))
        return self.expert.run(None, _taken(self.expert, known))


def _taken(session: Any, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {one.name: known[one.name] for one in session.get_inputs()}


def words(model: PrefixModel, instruction: str) -> dict[str, np.ndarray]:
    """The instruction as the prefix takes it, input's name -> [1,S]; raises `ConfigError` for
    pi0.5.
    """
    try:
        return {name: value.cpu().numpy() for name, value in model.words(instruction).items()}
    except ValueError as error:
        raise ConfigError(
            f"{error}, and the controller has no tokenizer that could write them; of LeRobot's flow"
            " policies SmolVLA and pi0 can be exported"
        ) from error


def write(
    policy: ChainPolicy,
    shape: tuple[int, ...],
    folder: Path,
    experts: Sequence[str],
    precision: str,
) -> dict[str, Any]:
    """Writes prefix.onnx and its ``experts``, and returns their entries of the manifest.

    shape: of the noise, [draws,*E].
    """
    model: PrefixModel = policy.model  # type: ignore[assignment]  # the caller saw so
    seen = blank(model, 1)
    told = {name: torch.from_numpy(value) for name, value in words(model, "").items()}
    reads = {**seen, **told}
    read = precise(_reading(model), precision)
    with torch.no_grad():
        cache = read(*reads.values())
    # the experts, and what they take of the prefix
    graphs: dict[str, tuple[GraphModule, dict[str, Tensor]]] = {}
    for name in experts:
        later = name == LATER
        plan = {PREVIOUS: no_plan(policy, 1)} if later else {}
        inputs = {**seen, **cache, **plan, "noise": torch.zeros(1, *shape)}
        function = precise(_attending(policy, list(cache), later), precision)
        graphs[name] = _needed(captured(function, *inputs.values()), inputs)
    taken = [name for name in cache if any(name in inputs for _, inputs in graphs.values())]

    def read_taken(*values: Tensor) -> tuple[Tensor, ...]:
        made = read(*values)
        return tuple(made[name] for name in taken)

    graph, inputs = _needed(captured(read_taken, *reads.values()), reads)
    entries = {PREFIX: _graph.write(graph, inputs, taken, folder / f"{PREFIX}.onnx")}
    outputs = ["actions"] if policy.warm is None else ["actions", PLAN]
    for name, (graph, inputs) in graphs.items():
        entries[name] = _graph.write(graph, inputs, outputs, folder / f"{name}.onnx")
    return entries


def _reading(model: PrefixModel) -> Callable[..., dict[str, Tensor]]:
    """The prefix as a function of the observations in the model's order and of the words, by the
    names that its tensors have between the graphs.
    """
    names, told = list(model.shapes), list(model.words(""))

    def function(*values: Tensor) -> dict[str, Tensor]:
        condition = _seen(model, dict(zip(names, values[: len(names)], strict=True)))
        spoken = dict(zip(told, values[len(names) :], strict=True))
        made = model.prefix(model.told(condition, spoken))
        return {f"{CACHE}.{name}": value for name, value in made.items()}

    return function


def _attending(policy: ChainPolicy, cache: Sequence[str], later: bool) -> Callable[..., Any]:
    """The decision as a function of the observations, of the prefix's tensors (``cache``), of a
    ``later`` decision the plan before, and of noise.
    """
    model: PrefixModel = policy.model  # type: ignore[assignment]  # the caller saw so
    names = list(model.shapes)
    policy = picking(policy)

    def function(*values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        *given, noise = values
        previous = given.pop() if later else None
        condition = _seen(model, dict(zip(names, given[: len(names)], strict=True)))
        short = [name.removeprefix(f"{CACHE}.") for name in cache]
        prefix = dict(zip(short, given[len(names) :], strict=True))
        condition = model.resumed(condition, prefix)
        made = decided(policy, condition, Draws(noise), previous)
        return made[0] if policy.warm is None else made

    return function


def _seen(model: PrefixModel, observation: Mapping[str, Tensor]) -> Condition:
    """A row as the model's preprocessor makes it, told nothing."""
    return model.encode(Context([""], observation))


def _needed(
    graph: GraphModule, inputs: Mapping[str, Tensor]
) -> tuple[GraphModule, dict[str, Tensor]]:
    """The graph without the inputs that nothing depends on, and those that are left."""
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    left = dict(inputs)
    for node, name in zip(places, inputs, strict=True):
        if not node.users:
            graph.graph.erase_node(node)
            del left[name]
    graph.recompile()
    return graph, left
