"""The verb list: what ships, with one line each."""

import ast
import re
from argparse import Namespace
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from genpolicy.config.shipped import configs

PACKAGE = Path(__file__).parents[1]


def run(args: Namespace) -> int:
    """Prints the names of a kind and their descriptions, in two columns."""
    rows = list(_listed(args.kind))
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())
    return 0


def _listed(kind: str) -> Iterator[tuple[str, str]]:
    """The (name, first paragraph or sentence of its description) of everything of a kind.

    Leaves are read, not imported: some bring half a minute of libraries. Kernels and samplers,
    which need torch, are imported when they are asked for.
    """
    if kind == "configs":
        for name, file in sorted(configs().items()):
            yield name, _first_sentence(file.read_text(encoding="utf-8"))
    elif kind == "kernels":
        from genpolicy.policy.sampler import kernels

        for name, entry in sorted(kernels().items()):
            yield name, _first_paragraph(entry.__doc__ or "")
    elif kind == "samplers":
        from genpolicy.evaluation.samplers import PRESETS

        yield from PRESETS.items()
    else:
        for file in sorted((PACKAGE / kind).glob("[!_]*.py")):
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            yield file.stem, _first_paragraph(text)


def _first_sentence(text: str) -> str:
    """The first sentence of the comment that a file begins with, in one line."""
    lines = takewhile(lambda line: line.startswith("#"), text.lstrip().splitlines())
    comment = " ".join(line.lstrip("#").strip() for line in lines)
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def _first_paragraph(text: str) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(text.strip().partition("\n\n")[0].split())
