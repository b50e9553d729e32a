"""The modules that an import brings along, and the floors of the house."""

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import networkx
import pytest

import genpolicy

ROOT = Path(__file__).parents[1]
LINT = """
import sys
from importlinter.cli import lint_imports_command
sys.exit(lint_imports_command())
"""
CONTRACTS = [
    "Imports only go down the floors",
    "A method knows no model, no task and no reward",
    "No shelf knows a method",
    "Methods do not know each other",
    "A shelf imports contracts, the chain and the cellar",
    "A format knows policies, and not how they are trained or judged",
    "The mathematics imports torch only (and numpy, for its counter-based noise)",
    "Only leaves know an ecosystem",
    "Only training/processes.py knows accelerate",
]
TRESPASSES = {
    "chain/zz_up.py": "import genpolicy.learning",
    "formats/zz_trained.py": "import genpolicy.training",
    "chain/zz_wide.py": "import scipy",
    "learning/zz_ecosystem.py": "def late():\n    import diffusers",
    "methods/zz_one.py": "from genpolicy.methods import zz_two",
    "methods/zz_two.py": "def late():\n    import genpolicy.rewards",
    "models/zz_method.py": "import genpolicy.methods",
    "rewards/zz_high.py": "def late():\n    import genpolicy.rollout",
    "tasks/zz_launcher.py": "import accelerate",
}

CYCLES = {
    "chain/zz_a.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import genpolicy.chain.zz_b"
    ),
    "chain/zz_b.py": "from genpolicy.chain import zz_a",
    "config/zz_c.py": "def late():\n    from genpolicy.config import zz_d",
    "config/zz_d.py": "import genpolicy.config.zz_c",
}
SHELVES = {"models", "tasks", "rewards", "datasets", "formats"}
GRAPH = """
import json, grimp
graph = grimp.build_graph("genpolicy", cache_dir=None)
imported = graph.find_modules_directly_imported_by
found = {module: sorted(imported(module)) for module in graph.modules}
print(json.dumps(found))
"""


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `code`."""
    names = "[name for name in sys.modules if '.' not in name]"
    tell = f"import json, sys; print(); print(json.dumps({names}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def shared_names(folder: Path) -> dict[str, list[str]]:
    """Modules of different rooms with the same name, shelves aside."""
    rooms = defaultdict(set)
    for file in (folder / "genpolicy").rglob("*.py"):
        room, *rest = file.relative_to(folder / "genpolicy").parts
        if rest and room not in SHELVES and file.stem != "__init__":
            rooms[file.stem].add(room)
    return {name: sorted(among) for name, among in rooms.items() if len(among) > 1}


def cycles(folder: Path) -> list[set[str]]:
    """Modules that import each other, in types only included; packages' own files aside."""
    done = subprocess.run(
        [sys.executable, "-c", GRAPH],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    graph = networkx.DiGraph(json.loads(done.stdout))
    graph.remove_nodes_from(
        [
            ".".join(file.relative_to(folder).parent.parts)
            for file in folder.glob("genpolicy/**/__init__.py")
        ]
    )
    return [group for group in networkx.strongly_connected_components(graph) if len(group) > 1]


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the package and its contracts, to trespass in."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(
        ROOT / "genpolicy", tmp_path / "genpolicy", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


def test_import_genpolicy_loads_no_torch():
    loaded = loaded_by("import genpolicy")
    assert "genpolicy" in loaded
    assert not loaded & {"torch", "numpy", "draccus"}
    assert "torch" in loaded_by(
        "import genpolicy.chain"
    )  # the control: the probe does see what is loaded


def test_help_loads_no_ecosystem():
    help_ = """
import runpy, sys
sys.argv = ["genpolicy", "--help"]
try:
    runpy.run_module("genpolicy", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
"""
    assert not loaded_by(help_) & {"diffusers", "transformers", "lerobot", "gymnasium"}


def test_every_module_imports_without_what_windows_lacks():
    """Other packages have ways of their own there, and keep what this machine has. No more is
    claimed than that ours import: nothing was run there.
    """
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in sorted((ROOT / "genpolicy").rglob("*.py"))
        if file.stem not in ("__init__", "__main__")
    ]
    hide = """
import builtins, importlib, signal
there = builtins.__import__
def found(name, globals=None, *rest, **settings):
    ours = (globals or {}).get("__name__", "").startswith("genpolicy")
    if ours and name in ("fcntl", "grp", "pwd", "resource", "termios"):
        raise ModuleNotFoundError(f"Windows has no {name}")
    return there(name, globals, *rest, **settings)
builtins.__import__ = found
del signal.SIGUSR1
"""
    code = f"{hide}\nfor name in {names}:\n    importlib.import_module(name)"
    assert "genpolicy" in loaded_by(code)


@pytest.mark.parametrize("name", ["load", "train"])
def test_lazy_names_are_found(name: str):
    assert name in dir(genpolicy)
    assert callable(getattr(genpolicy, name))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = genpolicy.laod


def test_floors_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert [name for name in CONTRACTS if f"{name} KEPT" not in done.stdout] == []


def test_every_trespass_is_seen(house: Path):
    for file, code in TRESPASSES.items():
        (house / "genpolicy" / file).write_text(code + "\n")
    done = lint(house)
    assert done.returncode != 0
    assert [name for name in CONTRACTS if f"{name} BROKEN" not in done.stdout] == []
    modules = [f"genpolicy.{file.removesuffix('.py').replace('/', '.')} ->" for file in TRESPASSES]
    assert [module for module in modules if module not in done.stdout] == []


def test_a_module_without_a_floor_is_seen(house: Path):
    (house / "genpolicy" / "zz_new.py").touch()
    done = lint(house)
    assert done.returncode != 0
    assert "genpolicy.zz_new" in done.stdout


def test_no_two_rooms_have_a_module_of_one_name():
    assert shared_names(ROOT) == {}


def test_a_shared_name_is_seen(house: Path):
    (house / "genpolicy" / "methods" / "parts" / "kernel.py").touch()  # chain has one
    (house / "genpolicy" / "tasks" / "schedule.py").touch()  # a shelf: anything goes
    assert shared_names(house) == shared_names(ROOT) | {"kernel": ["chain", "methods"]}


def test_no_modules_import_each_other():
    assert cycles(ROOT) == []


def test_a_cycle_is_seen(house: Path):
    """One of types only, and one that is closed inside a function."""
    for file, code in CYCLES.items():
        (house / "genpolicy" / file).write_text(code + "\n")
    planted = {f"genpolicy.{file.removesuffix('.py').replace('/', '.')}" for file in CYCLES}
    assert planted <= set().union(*cycles(house))
