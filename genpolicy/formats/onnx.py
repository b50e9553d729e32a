"""One ONNX graph of a whole policy that acts: from observations and noise to the robot's actions.

The normaliser, the encoder, every step of the deployed sampler, best-of-N with its critic and the
un-normaliser are all in one graph, so that onnxruntime alone runs it (robots/genpolicy_runtime). A
policy with a warm start is two graphs: an episode's first decision, and the later ones, which go on
from the plan before. SmolVLA and pi0 have a graph before these, their prefix (`_pair`). Beside them
lie manifest.json, which says what goes in and comes out, parity.json and latency.json.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from genpolicy import __version__
from genpolicy.config.documents import json_file
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.model import ControlModel, PrefixModel, TokenModel
from genpolicy.contracts.task import ControlTask
from genpolicy.formats import _graph, _latency, _pair, _parity
from genpolicy.formats._capture import (
    FIRST,
    LATER,
    PLAN,
    PREVIOUS,
    Counting,
    acting,
    blank,
    captured,
    decide,
    no_plan,
    noise_shape,
    reads,
)
from genpolicy.formats._folder import fresh, require_free
from genpolicy.formats._half import precise
from genpolicy.policy.files import Saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.weights import digest

FORMAT, VERSION = "genpolicy-export", 1
"""The format that a manifest names, and the version of its keys."""
MANIFEST = "manifest.json"
POLICY = "policy"
"""The name of a policy's one graph."""


def onnx(
    found: Saved,
    out: Path,
    *,
    data: Dataset | None,
    task: ControlTask | None,
    instruction: str | None,
    precision: Literal["fp32", "fp16"] = "fp32",
) -> str:
    """Writes the folder ``out``: the graphs, manifest.json, parity.json and latency.json.

    precision: of the networks' products and convolutions and of their weights; the normaliser, the
    chain's steps, and what goes in and comes out are in fp32. Raises `ConfigError`, and leaves
    nothing, where the graph's actions are not the policy's.
    """
    if not found.acts:
        raise ConfigError(
            f"{found.where} draws: onnx is for policies that act; --format diffusers, lora and"
            " kohya are for those that draw"
        )
    _graph.require_packages()
    require_free(out, is_export)
    policy = _on_cpu(found)
    if precision == "fp16" and isinstance(policy.model, TokenModel):
        raise ConfigError(
            f"{found.where} is a policy of tokens, which half precision makes others of: export it"
            " in fp32, without --precision"
        )
    told = _told(policy, task, instruction)
    with fresh(out, is_export) as folder:
        manifest, parity, latency = exported(policy, found, folder, data, task, told, precision)
        for name, contents in (
            (MANIFEST, manifest),
            ("parity.json", parity.report()),
            ("latency.json", latency),
        ):
            (folder / name).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    times = ", ".join(
        f"{name} {latency[name]['median_ms']:.3g} ms (least {latency[name]['min_ms']:.3g})"
        for name in ("torch", "onnxruntime")
    )
    return (
        f"{parity.told()}\nlatency per decision, median on one thread: {times};"
        f" {manifest['evaluations']:g} network evaluations\n{out / MANIFEST}"
    )


def is_export(folder: Path) -> bool:
    """True for the folder of an export."""
    file = folder / MANIFEST
    if not file.is_file():
        return False
    document = json_file(file)
    return isinstance(document, dict) and document.get("format") == FORMAT


def exported(
    policy: ChainPolicy,
    found: Saved,
    folder: Path,
    data: Dataset | None,
    task: ControlTask | None,
    told: str | None,
    precision: str,
) -> tuple[dict[str, Any], _parity.Parity, dict[str, Any]]:
    """Writes the graphs and returns the manifest, the parity and the latency.

    told: the instruction, None where the policy reads none. Raises `ConfigError` where the parity
    does not hold.
    """
    model: ControlModel = policy.model  # type: ignore[assignment]  # the caller saw that it acts
    shape, words = noise_shape(policy), told or ""
    entries, sessions, tokens = written(policy, shape, folder, words, precision)
    parity = _parity.measure(sessions, policy, shape, data, words, precision)
    if not parity.holds:
        raise ConfigError(
            "the exported graph does not act as the policy: its actions differ by"
            f" {parity.largest:.1e} in normalised units, and {parity.bound:.1e} is the bound;"
            " nothing was written"
        )
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "made_with": {"genpolicy": __version__, **_graph.versions(), "precision": precision},
        "weights": weights_digest(policy),
        "graphs": entries,
        "observation": {
            name: {"kind": "image" if len(seen) == 3 else "vector", "shape": list(seen)}
            for name, seen in model.shapes.items()
        },
        "history": model.history,
        "noise": {"shape": list(shape)},
        "action": {
            "dim": model.action_dim,
            "planned": model.event_shape[0],
            "executed": policy.execute or model.executed,
            "low": None if task is None else limits(task.action_low),
            "high": None if task is None else limits(task.action_high),
            "units": "environment",
        },
        "rate_hz": None if task is None else task.fps,
        "instruction": None if told is None else {"text": told, "tokens": _described(tokens)},
        "state": None if policy.warm is None else state(policy),
        "sampler": asdict(found.sampler),
        "evaluations": evaluations(policy),
        "parity": {
            "largest": parity.largest,
            "bound": parity.bound,
            "observations": parity.observations - parity.ties,
            "units": "normalised",
        },
    }
    return manifest, parity, _latency.measure(sessions[-1], policy, shape, words)


def written(
    policy: ChainPolicy, shape: tuple[int, ...], folder: Path, words: str, precision: str
) -> tuple[dict[str, Any], list[Any], dict[str, np.ndarray]]:
    """Writes the graphs, and returns their entries of the manifest, what runs a decision (of a
    policy with a warm start the first and a later one), and the instruction as the inputs that take
    it: none where it is a constant of the graph.
    """
    if isinstance(policy.model, PrefixModel):
        told = _pair.words(policy.model, words)
        names = [_pair.EXPERT] if policy.warm is None else [FIRST, LATER]
        entries = _pair.write(policy, shape, folder, names, precision)
        prefix, *experts = (_graph.session(folder / f"{name}.onnx") for name in entries)
        return entries, [_pair.Pair(prefix, expert, told) for expert in experts], told
    names = [POLICY] if policy.warm is None else [FIRST, LATER]
    entries = {
        name: write_policy(policy, shape, folder / f"{name}.onnx", words, precision)
        for name in names
    }
    return entries, [_graph.session(folder / f"{name}.onnx") for name in names], {}


def tokens(policy: ChainPolicy, instruction: str) -> dict[str, np.ndarray]:
    """The instruction for an exported policy that takes it as an input: `genpolicy_runtime`'s
    ``policy.instruct(tokens(...))`` tells it that.

    Raises `ConfigError` for a policy whose instruction is no input.
    """
    if not isinstance(policy.model, PrefixModel):
        raise ConfigError("only SmolVLA and pi0 take their instruction as tokens once exported")
    return _pair.words(policy.model, instruction)


def _described(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The manifest's entries of arrays."""
    return {
        name: {"shape": list(value.shape), "dtype": value.dtype.name, "values": value.tolist()}
        for name, value in arrays.items()
    }


def limits(ends: Sequence[float]) -> list[float | None]:
    """The manifest's entry of one end of the actions' limits [D]; null is none."""
    return [end if math.isfinite(end) else None for end in ends]


def state(policy: ChainPolicy) -> dict[str, Any]:
    """The manifest's entry of the plan that a decision leaves to the next one."""
    plan = {"input": PREVIOUS, "output": PLAN, "shape": list(policy.model.event_shape)}
    return {**plan, "first": FIRST, "later": LATER}


def write_policy(
    policy: ChainPolicy,
    shape: tuple[int, ...],
    file: Path,
    instruction: str = "",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Writes the graph that the file is named after, (observations, noise [1,draws,*E]) -> actions
    [1,n,D], and returns its entry of the manifest. "later" takes the plan before, too; both it and
    "first" return the plan.
    """
    later = file.stem == LATER
    inputs = blank(policy.model, 1)  # type: ignore[arg-type]
    if later:
        inputs[PREVIOUS] = no_plan(policy, 1)
    inputs["noise"] = torch.zeros(1, *shape)
    function = precise(acting(policy, instruction, later), precision)
    graph = captured(function, *inputs.values())
    outputs = ["actions"] if policy.warm is None else ["actions", PLAN]
    return _graph.write(graph, inputs, outputs, file)


@torch.no_grad()
def evaluations(policy: ChainPolicy) -> float:
    """Network evaluations per decision, with a warm start per later one."""
    before = policy.model.evaluations
    previous = None if policy.warm is None else no_plan(policy, 1)
    seen = blank(policy.model, 1)  # type: ignore[arg-type]
    decide(policy, seen, Counting(1), previous=previous)
    return policy.model.evaluations - before


def weights_digest(policy: ChainPolicy) -> str:
    """The SHA-256 of all weights that learned, the network's and its parts', by name."""
    parts = {name: part.state_dict() for name, part in policy.parts.items()}
    return digest({"model": policy.model.trainable(), "parts": parts})


def _told(policy: ChainPolicy, task: ControlTask | None, instruction: str | None) -> str | None:
    """The instruction that is written into the graph, as tokens: the one that is asked for, or the
    task's; None for a policy that reads none.
    """
    if not reads(policy):
        if instruction is not None:
            raise ConfigError("--instruction does not apply: this policy reads no words")
        return None
    told = instruction if instruction is not None or task is None else task.instruction
    if told is None:
        raise ConfigError(
            "the policy does what it is told, and its instruction becomes a part of the graph:"
            " give --instruction TEXT"
        )
    return told


def _on_cpu(found: Saved) -> ChainPolicy:
    """The policy on the processor, where its graph is compared with it."""
    policy = found.load()
    if policy.model.device.type == "cpu":
        return policy
    return replace(found, policy={**found.policy, "device": "cpu"}).load()
