"""The wheel carries robots/, configs/ and assets/,
and works in an empty environment outside the checkout.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import genpolicy
from genpolicy.config.shipped import FOLDERS

ROOT = Path(__file__).parents[1]


def call(*command: str | Path, cwd: Path) -> str:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(target: str, folder: Path) -> Path:
    """A distribution, by the hatchling of this environment, so that no network is needed."""
    call(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder, cwd=ROOT)
    (built,) = folder.iterdir()
    return built


def shipped() -> set[str]:
    """The files that ship beside the package, by their names in the repository."""
    return {
        file.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def find_uv() -> str:
    """The uv that make brought, else one that runs."""
    for found in (ROOT / ".tools" / "uv", shutil.which("uv")):
        if (
            found
            and os.path.exists(found)
            and subprocess.run([found, "--version"], cwd=ROOT).returncode == 0
        ):
            return str(found)
    raise AssertionError("No uv that runs: `make setup` brings one.")


def test_wheel_carries_the_shipped_folders(tmp_path: Path):
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
    remapped = {
        name.removeprefix("genpolicy/_") for name in names if name.startswith("genpolicy/_")
    }
    carried = {name for name in remapped if name.split("/")[0] in FOLDERS}
    assert carried == shipped()
    assert {"assets", "configs"} <= {name.split("/")[0] for name in carried}
    info = f"genpolicy-{genpolicy.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"genpolicy", info}
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names


def test_sdist_builds_the_wheel_again(tmp_path: Path):
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    assert shipped() | {"pyproject.toml", "README.md", "LICENSE", "genpolicy/__init__.py"} <= names


def test_both_lists_of_pins_agree_and_name_no_host():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all("==" in pin and "://" not in pin for pin in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["uv"]["constraint-dependencies"] == pins


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(tmp_path: Path):
    uv, venv, outside = find_uv(), tmp_path / "venv", tmp_path / "outside"
    outside.mkdir()
    call(uv, "build", "--wheel", "--out-dir", tmp_path / "dist", cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    call(uv, "venv", "--python", sys.executable, venv, cwd=outside)
    pins = ROOT / "constraints.txt"
    call(uv, "pip", "install", "--python", venv / "bin" / "python", "-c", pins, wheel, cwd=outside)

    assert "quickstart" in call(venv / "bin" / "genpolicy", "--help", cwd=outside)
    listed = call(venv / "bin" / "genpolicy", "list", "configs", cwd=outside)
    names = [
        name.removeprefix("configs/").removesuffix(".yaml") for name in shipped() if ".yaml" in name
    ]
    assert names
    assert [name for name in names if name not in listed] == []
    where = "from genpolicy.config import shipped; print(shipped.path('assets'), shipped.__file__)"
    for place in call(venv / "bin" / "python", "-c", where, cwd=outside).split():
        assert Path(place).is_relative_to(venv)
