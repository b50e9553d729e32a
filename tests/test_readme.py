"""README.md's table of methods says what the methods themselves say."""

from pathlib import Path

import pytest

from genpolicy.config.leaves import make, names
from genpolicy.config.origin import PERSON
from genpolicy.training.prepare import required
from genpolicy.training.requirements import WORLDS

README = Path(__file__).parents[1] / "README.md"
HEADER = "| method | prompts (images, video) | robots |"


def matrix(text: str) -> list[tuple[str, tuple[str, str]]]:
    """The rows under `HEADER`: a method, and its cells in the order of `WORLDS`."""
    lines = text.split(HEADER)
    assert len(lines) == 2, "there is one table of methods"
    rows = []
    for line in lines[1].splitlines()[2:]:
        if not line.startswith("|"):
            break
        method, prompts, robots = (cell.strip() for cell in line.strip("|").split("|"))
        rows.append((method.strip("`"), (prompts, robots)))
    return rows


def disagreements(text: str) -> list[str]:
    """A sentence for each place where the table and the shipped methods differ."""
    rows = matrix(text)
    listed = [method for method, _ in rows]
    found = [f"{name} has {listed.count(name)} rows" for name in names("methods")]
    found = [sentence for sentence in found if not sentence.endswith(" 1 rows")]
    found += [f"{method} is not shipped" for method in listed if method not in names("methods")]
    for method, cells in rows:
        if method not in names("methods"):
            continue
        worlds = required(make("methods", {"name": method}, PERSON)).worlds
        for world, cell in zip(WORLDS, cells, strict=True):
            refused = cell == "no" or cell.startswith(("no:", "no "))
            if refused != (world not in worlds):
                found.append(f"{method} on {world}: the table says {cell!r}, needs says {worlds}")
    return found


def test_the_table_lists_every_method_once_and_refuses_what_it_cannot_train():
    assert disagreements(README.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("| `bc` | captioned pictures: toy |", "| `bc` | no: it acts |", "bc on prompts"),
        ("| `rl100` | no: ", "| `rl100` | images: ", "rl100 on prompts"),
        ("| `dppo` |", "| `dpoo` |", "dppo has 0 rows"),
        ("| `dppo` |", "| `dpoo` |", "dpoo is not shipped"),
        ("| `bc` |", "| `uni_o4` | no | toy |\n| `bc` |", "uni_o4 has 2 rows"),
    ],
)
def test_control_a_planted_disagreement_is_found(old: str, new: str, sentence: str):
    text = README.read_text(encoding="utf-8")
    assert old in text.split(HEADER)[1]
    before, after = text.split(HEADER)
    planted = disagreements(before + HEADER + after.replace(old, new, 1))
    assert any(found.startswith(sentence) for found in planted)
