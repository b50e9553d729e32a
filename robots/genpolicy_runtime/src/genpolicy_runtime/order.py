"""The order in which a decision runs the graphs of a policy, and what each takes from where."""

from collections.abc import Mapping
from pathlib import Path

from genpolicy_runtime.errors import ExportError
from genpolicy_runtime.manifest import Array, Graph, Manifest

PREFIX, EXPERT, POLICY = "prefix", "expert", "policy"
"""Names of graphs: a policy of vision and language reads its observation in the prefix, whose
outputs go into its expert by name; any other policy is one graph.
"""
ACTIONS, NOISE = "actions", "noise"
"""Names of the output that is carried out, and of the input that is drawn."""
FLOATS = ("float32", "float16")
"""Numbers that are turned into one another at a graph's door."""


def order(manifest: Manifest, first: bool) -> list[Graph]:
    """The graphs that one decision runs, the one that gives the actions last.

    first: this is an episode's first decision.
    """
    before = [PREFIX] if PREFIX in manifest.graphs else []
    last = EXPERT if before else POLICY
    if manifest.state is not None:
        last = manifest.state.first if first else manifest.state.later
    return [manifest.graphs[name] for name in (*before, last)]


def require_fit(file: Path, manifest: Manifest) -> None:
    """Raises `ExportError` where a graph is not there, takes what nobody gives, or does not give
    what is carried out. file: the manifest's, for the sentence.
    """
    for first in (True, False):
        try:
            graphs = order(manifest, first)
        except KeyError as error:
            has = ", ".join(manifest.graphs) or "none"
            raise ExportError(
                f"{file}: graphs must have one called {error.args[0]}; it has {has}"
            ) from None
        given = _given(manifest, first)
        for graph in graphs:
            _require(file, f"graph {graph.name} takes", graph.inputs, given)
            given.update(graph.outputs)
        _require(file, "a decision needs", _needed(manifest), graphs[-1].outputs)


def _given(manifest: Manifest, first: bool) -> dict[str, Array]:
    """The arrays that the runtime makes for a decision, by name."""
    given = {
        name: Array((1, manifest.history, *one.shape), "float32")
        for name, one in manifest.observation.items()
    }
    given[NOISE] = Array((1, *manifest.noise), "float32")
    if manifest.instruction is not None:
        for name, value in manifest.instruction.tokens.items():
            given[name] = Array(value.shape, value.dtype.name)
    if manifest.state is not None and not first:
        given[manifest.state.input] = Array((1, *manifest.state.shape), "float32")
    return given


def _needed(manifest: Manifest) -> dict[str, Array]:
    """The outputs without which there is no decision, by name."""
    action, state = manifest.action, manifest.state
    needed = {ACTIONS: Array((1, action.executed, action.dim), "float32")}
    if state is not None:
        needed[state.output] = Array((1, *state.shape), "float32")
    return needed


def _require(file: Path, who: str, needed: Mapping[str, Array], given: Mapping[str, Array]) -> None:
    """Raises `ExportError` unless everything needed is given, in its shape."""
    for name, array in needed.items():
        if name not in given:
            raise ExportError(f"{file}: {who} {name}; there are {', '.join(given)}")
        alike = given[name].dtype == array.dtype or {given[name].dtype, array.dtype} <= {*FLOATS}
        if given[name].shape != array.shape or not alike:
            raise ExportError(f"{file}: {who} {name} as {array}; it is {given[name]}")
