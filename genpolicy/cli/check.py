"""The verb check: tries on small inputs the laws that a reward or a method must keep."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.config import leaves, parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Context
from genpolicy.evaluation import metrics_file
from genpolicy.training.build import load_rewards
from genpolicy.training.experiment import train

PROMPTS = (
    "a red circle left of a blue square",
    "a green triangle above a yellow circle",
    "a blue square right of a red circle",
    "a yellow square below a green square",
    "a red triangle left of a green circle",
    "a blue circle above a yellow triangle",
)
SIZE = 64
"""Height and width of the pictures that rewards are tried on, in pixels."""
ALONE = 1e-4
"""Largest difference of a row scored alone to the same row in a batch, relative to the largest
score: fp32 networks differ by about that.
"""
KINDS = {
    "method": ("train",),
    "kernel": ("coefficients",),
    "task": ("reset",),
    "task of environments": ("environments", "demonstrate"),
    "data set": ("rows",),
    "model": ("encode", "denoise", "decode"),
}

Verdict = tuple[str, bool | None, str]
"""(law, holds, evidence): ``holds`` is None where the law does not apply."""


def run(args: Namespace) -> int:
    """Prints a verdict per law of ``args.leaf``; returns 0 if all hold, 1 if one does not. Raises
    `ConfigError` for what can't be checked.
    """
    dotted = _dotted(args.leaf)
    entry = leaves.leaf("leafs", dotted)
    kind = _kind(entry)
    laws: dict[str, Callable[[str], Iterator[Verdict]]] = {
        "reward": _reward_laws,
        "method": _method_laws,
    }
    if kind not in laws:
        raise ConfigError(f"{dotted} is a {kind}; check knows the laws of rewards and methods")
    print(f"{dotted} is a {kind}")
    kept = True
    for law, holds, seen in laws[kind](dotted):
        mark = "--  " if holds is None else "ok  " if holds else "FAIL"
        print(f"  {mark}  {law}{': ' if seen else ''}{seen}")
        kept = kept and holds is not False
    print(f"{dotted} {'keeps every law' if kept else 'breaks a law'}")
    return 0 if kept else 1


def _dotted(name: str) -> str:
    """The name mypkg.mod:entry of a module mypkg.mod: its entry is named like the file, or else the
    only public one.
    """
    if ":" in name:
        return name
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} can't be imported: {error}; give a module, mypkg.mod or mypkg.mod:entry"
        ) from None
    own = [
        attribute
        for attribute, value in vars(module).items()
        if callable(value)
        and not attribute.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]
    plain = name.rpartition(".")[2].replace("_", "")
    chosen = [attribute for attribute in own if attribute.lower().replace("_", "") == plain] or own
    if len(chosen) != 1:
        found = f"it has {', '.join(own)}" if own else "it has no public class or function"
        raise ConfigError(f"{name} does not say which entry is meant, {found}: give {name}:ENTRY")
    return f"{name}:{chosen[0]}"


def _kind(entry: Any) -> str:
    """The kind of a leaf, by what it can do."""
    for kind, methods in KINDS.items():
        if all(callable(getattr(entry, method, None)) for method in methods):
            return kind
    call = entry.__call__ if inspect.isclass(entry) else entry
    if not callable(call):
        raise ConfigError(f"{entry!r} is no leaf: it is neither a class nor a function")
    given = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
    if len([p for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]) == 2:
        return "reward"
    raise ConfigError(
        f"{getattr(entry, '__name__', entry)} is no leaf: a reward takes (outputs, context), "
        "a method has train(run), a model encode, denoise and decode, a task reset or "
        "environments, a data set rows, a kernel coefficients"
    )


# Rewards


def _pictures() -> Tensor:
    """Pictures [6,3,64,64] in [0, 1]: one plain, one noisy, the others smooth."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(len(PROMPTS), 3, 4, 4, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    pictures[1] = torch.rand(3, SIZE, SIZE, generator=generator)
    pictures[2] = 1.0
    return pictures


def _reward_laws(dotted: str) -> Iterator[Verdict]:
    rewards = WeightedRewards({dotted: (leaves.make("rewards", {"name": dotted}), 1.0)})
    load_rewards(rewards)
    pictures, context = _pictures(), Context(PROMPTS)

    def score(pictures: Tensor, context: Context) -> Tensor:
        return (
            torch.as_tensor(rewards.rewards[dotted][0](pictures, context)).detach().double().cpu()
        )

    kept = pictures.clone()
    together = score(pictures, context)
    shape = tuple(together.shape)
    yield (
        "one number for every output",
        shape == (len(context),),
        f"shape {shape} for {len(context)} outputs",
    )
    if shape != (len(context),):
        return
    yield (
        "finite",
        bool(together.isfinite().all()),
        ", ".join(f"{value:.4g}" for value in together.tolist()),
    )
    yield "leaves the outputs as they are", torch.equal(pictures, kept), ""
    again = score(pictures, context)
    yield (
        "the same outputs get the same reward",
        torch.equal(together, again),
        _gap(together, again),
    )
    alone = torch.cat(
        [score(pictures[i : i + 1], context[i : i + 1]).reshape(-1) for i in range(len(context))]
    )
    largest = ALONE * together.abs().max().clamp_min(1e-12)
    close = alone.shape == together.shape and bool((together - alone).abs().max() <= largest)
    yield "a row's reward does not depend on the others in its batch", close, _gap(together, alone)


def _gap(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)}"
    return f"largest difference {float((a - b).abs().max()):.2g}"


# Methods


def constant(outputs: Tensor, context: Context) -> Tensor:
    """A reward that is the same for every output: there is nothing to learn."""
    return torch.ones(len(outputs))


def brightness(outputs: Tensor, context: Context) -> Tensor:
    """A reward that teaches something."""
    return outputs.flatten(1).mean(1)


def _method_laws(dotted: str) -> Iterator[Verdict]:
    """Trains one iteration on the toy, in one update: with a reward that teaches something, and
    with one that does not.
    """
    fields = {field.name for field in dataclasses.fields(leaves.leaf("methods", dotted))}
    small = {"groups": 4, "group": 4, "episodes": 16, "updates": 1, "epochs": 1, "warm_up": 0}
    section = {"name": dotted, **{name: value for name, value in small.items() if name in fields}}
    with tempfile.TemporaryDirectory() as folder:
        learned = _iterate(section, "genpolicy.cli.check:brightness", Path(folder) / "learned")
        still = _iterate(section, "genpolicy.cli.check:constant", Path(folder) / "still")
    yield (
        "trains on the toy",
        "grad_norm" in learned,
        f"{learned.get('nfe_per_sample', 0):.1f} evaluations a sample",
    )
    norm = learned.get("grad_norm")
    moves = None if norm is None else norm > 0
    yield "an advantage moves the policy", moves, f"gradient norm {norm}"
    norm = still.get("grad_norm")
    # a learned value finds advantages in equal rewards too
    idle = None if norm is None or "critic/loss" in still else norm < 1e-7
    yield "no advantage, no gradient", idle, f"gradient norm {norm}"
    ratio = learned.get("policy/ratio_mean")
    seen = "it logs no policy/ratio_mean" if ratio is None else f"mean {ratio:.7f}"
    yield "the ratio is 1 on the first pass", None if ratio is None else abs(ratio - 1) < 1e-5, seen
    clipped = learned.get("policy/clip_fraction")
    if clipped is not None:
        yield "nothing is clipped on the first pass", clipped == 0, f"share {clipped:.3f}"


def _iterate(section: dict[str, Any], reward: str, folder: Path) -> dict[str, Any]:
    """The metrics of one iteration on the toy."""
    prompts = folder.with_suffix(".txt")
    prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    experiment = parse.parse(
        {
            "policy": "toy",
            "chain": {"steps": 4},
            "task": {"name": "prompts", "prompts": str(prompts)},
            "reward": reward,
            "method": section,
            "budget": {"iterations": 1},
            "eval": {"every": 0, "samples": 4},
            "output": str(folder),
        }
    )
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar: nobody asked for this run
        train(experiment)
    return next(m for m in metrics_file.read(folder) if "grad_norm" in m or "nfe_per_sample" in m)
