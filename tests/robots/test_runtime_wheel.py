"""The runtime's wheel: any Python from 3.10 on, any processor, numpy and onnxruntime alone; and in
an environment of just that an exported policy acts as it does here, to the bit under the same
versions.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from genpolicy_runtime import Policy, __version__

from genpolicy.cli.main import main
from tests.test_wheel import ROOT, call, find_uv
from tests.tiny_export import written

SOURCE = ROOT / "robots" / "genpolicy_runtime"
LEAST = (3, 10)

ACT = """
import json, sys
import numpy, onnxruntime
from genpolicy_runtime import Policy

folder, given, out = sys.argv[1:]
policy = Policy.load(folder)
policy.reset(seed=11)
seen = numpy.load(given)
acted = [policy.act({name: seen[name][tick] for name in seen.files}) for tick in range(TICKS)]
numpy.save(out, numpy.stack(acted))
heavy = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "genpolicy", "lerobot"})
print(json.dumps([list(sys.version_info[:2]), onnxruntime.__version__, numpy.__version__, heavy]))
"""
TICKS = 12


def wheel(folder: Path) -> Path:
    """The wheel, by the hatchling of this environment, so that no network is needed."""
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=SOURCE)
    (built,) = folder.iterdir()
    return built


def test_the_wheel_is_for_any_machine_with_numpy_and_onnxruntime(tmp_path: Path):
    built = wheel(tmp_path)
    assert built.name == f"genpolicy_runtime-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(built) as opened:
        names = opened.namelist()
        info = f"genpolicy_runtime-{__version__}.dist-info"
        metadata = Parser().parsestr(opened.read(f"{info}/METADATA").decode())
        commands = opened.read(f"{info}/entry_points.txt").decode()
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [re.split(r"[<>=!~; ]", one)[0] for one in metadata.get_all("Requires-Dist")]
    assert sorted(needed) == ["numpy", "onnxruntime"]
    assert "genpolicy-runtime = genpolicy_runtime.cli:main" in commands
    package = {name for name in names if not name.startswith(info)}
    assert package == {
        f"genpolicy_runtime/{file.name}" for file in (SOURCE / "src/genpolicy_runtime").glob("*.*")
    }


def test_the_runtime_imports_neither_torch_nor_genpolicy():
    heavy = "{'torch', 'genpolicy', 'onnx'} & {name.split('.')[0] for name in sys.modules}"
    code = f"import sys, genpolicy_runtime.cli; print(sorted({heavy}))"
    environment = {"PYTHONPATH": str(SOURCE / "src"), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def old_python() -> str:
    """Python 3.10 where there is one that runs, else the oldest newer one."""
    for minor in range(LEAST[1], sys.version_info[1]):
        found = shutil.which(f"python{LEAST[0]}.{minor}")
        shims = [Path(found)] if found else []
        # a version manager's command may be a stand-in, with the versions in a folder beside it
        versions = [
            python
            for shim in shims
            for python in shim.parent.parent.glob(f"versions/*/bin/{shim.name}")
        ]
        for python in (*shims, *versions):
            if subprocess.run([python, "-c", ""], cwd="/", capture_output=True).returncode == 0:
                return str(python)
    return sys.executable


@pytest.fixture(scope="module", params=["tiny", "assets/assembly-clone"])
def exported(request: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("export") / "folder"
    if request.param == "tiny":
        return written(folder)
    assert main(["export", request.param, "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("python", ["oldest", "this"])
def test_an_environment_of_two_packages_acts_as_this_one(
    tmp_path: Path, python: str, exported: Path
):
    """ "oldest": Python 3.10 and the newest onnxruntime for it; "this": the versions of here."""
    uv, venv, outside = find_uv(), tmp_path / "venv", tmp_path / "outside"
    outside.mkdir()
    interpreter = old_python() if python == "oldest" else sys.executable
    call(uv, "venv", "--python", interpreter, venv, cwd=outside)
    inside = venv / "bin" / "python"
    pins = [f"onnxruntime=={onnxruntime.__version__}", f"numpy=={np.__version__}"]
    call(
        *(uv, "pip", "install", "--python", inside, wheel(tmp_path / "dist")),
        *(pins if python == "this" else ()),
        cwd=outside,
    )
    folder, policy = exported, Policy.load(exported)
    draw = np.random.Generator(np.random.Philox(key=4)).standard_normal
    seen = {
        name: draw((TICKS, *one.shape), dtype=np.float32)
        for name, one in policy.manifest.observation.items()
    }
    np.savez(outside / "seen.npz", **seen)
    copy = shutil.copytree(folder, outside / "copied")
    script = ACT.replace("TICKS", str(TICKS))
    said = call(inside, "-c", script, copy, "seen.npz", "acted.npy", cwd=outside)
    version, runtime, numbers, heavy = json.loads(said)
    print(f"Python {version[0]}.{version[1]}, onnxruntime {runtime}")
    assert heavy == []
    assert tuple(version) >= LEAST

    policy.reset(seed=11)
    here = [policy.act({name: seen[name][tick] for name in seen}) for tick in range(TICKS)]
    there = np.load(outside / "acted.npy")
    same = runtime == onnxruntime.__version__ and numbers == np.__version__
    assert python != "this" or same
    np.testing.assert_allclose(there, here, rtol=0, atol=0 if same else 1e-3)  # it rounds otherwise
    policy.reset(seed=12)  # the control: another seed's actions are others
    others = [policy.act({name: seen[name][tick] for name in seen}) for tick in range(TICKS)]
    assert np.abs(there - others).max() > 5e-3
    assert "is whole" in call(venv / "bin" / "genpolicy-runtime", "check", copy, cwd=outside)
