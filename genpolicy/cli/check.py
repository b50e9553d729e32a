"""The verb check: tries on small inputs the laws that a reward or a method must keep."""

import importlib
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from genpolicy.cli.method_laws import method_laws
from genpolicy.cli.reward_laws import Verdict, reward_laws
from genpolicy.config import leaves
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON

KINDS = {
    "method": ("train",),
    "kernel": ("coefficients",),
    "task": ("reset",),
    "task of environments": ("environments", "demonstrate"),
    "data set": ("rows",),
    "model": ("encode", "denoise", "decode"),
}


def run(args: Namespace) -> int:
    """Prints a verdict per law of ``args.leaf``; returns 0 if all hold, 1 if one does not. Raises
    `ConfigError` for what can't be checked.
    """
    dotted = _dotted(args.leaf)
    entry = leaves.leaf("leafs", dotted, PERSON)
    kind = _kind(entry)
    laws: dict[str, Callable[[str], Iterator[Verdict]]] = {
        "reward": reward_laws,
        "method": method_laws,
    }
    if kind not in laws:
        raise ConfigError(f"{dotted} is a {kind}; check knows the laws of rewards and methods")
    print(f"{dotted} is a {kind}")
    kept, tried = True, []
    for verdict in laws[kind](dotted):
        mark = "--  " if verdict.holds is None else "ok  " if verdict.holds else "FAIL"
        place = f", on {verdict.place}" if verdict.place else ""
        seen = f": {verdict.seen}" if verdict.seen else ""
        print(f"  {mark}  {verdict.law}{place}{seen}")
        kept = kept and verdict.holds is not False
        tried += [verdict.law] if verdict.holds is not None else []
    outcome = "keeps every law" if kept else "breaks a law"
    print(f"{dotted} {outcome}; tried were: {'; '.join(dict.fromkeys(tried))}")
    return 0 if kept else 1


def _dotted(name: str) -> str:
    """The name mypkg.mod:entry of a module mypkg.mod: its entry is named like the file, or else the
    only public one.
    """
    if ":" in name:
        return name
    PERSON.admit(name, "module")
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
