"""The README's five commands from demonstrations to a controller, on small sizes."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("metaworld")
pytest.importorskip("onnxruntime")

import genpolicy_runtime
from genpolicy_runtime.cli import main as runtime

from genpolicy.cli.main import main

README = Path(__file__).parents[1] / "README.md"
TITLE = "## From demonstrations to a controller: five commands"
SMALL = {
    "metaworld_bc": "--budget.iterations=2 --method.updates=10 --task.limit=20 --eval.episodes=2",
    "metaworld_consistency": "--budget.iterations=2 --method.updates=5 --method.batch=64"
    " --method.visits.episodes=2 --task.limit=20 --eval.episodes=2 --eval.every=0",
}
"""What makes the trainings of the README small."""


def commands() -> list[list[str]]:
    """The words of each command in the README's section."""
    text = README.read_text(encoding="utf-8").split(TITLE)[1]
    block = re.search(r"```\n(.*?)```", text, re.S)
    assert block is not None
    return [shlex.split(line.split(" #")[0]) for line in block.group(1).splitlines()]


@pytest.mark.slow
def test_five_commands_lead_from_demonstrations_to_a_controller(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = "demonstrate metaworld_bc --task.env=push-v3 --episodes 2 --noise 0.1"
    assert main([*made.split(), "--out", "runs/push/demonstrations"]) == 0
    train, distil, export, copy, bench = commands()
    for words in (train, distil):
        assert main([*words[1:], *SMALL[words[2]].split()]) == 0
    assert main(export[1:]) == 0
    manifest = json.loads(Path("runs/push/exported/manifest.json").read_text())
    assert manifest["evaluations"] == 1
    # the copy of the two folders, of which the second lies in the checkout
    assert copy[:5] == ["mkdir", "controller", "&&", "cp", "-r"]
    copy = copy[3:]
    for source in copy[2:4]:
        at = Path(source) if Path(source).exists() else README.parent / source
        shutil.copytree(at, Path(copy[4]) / at.name)
    shutil.rmtree("runs")
    assert runtime([*bench[1:], "--seconds", "0.5", "--threads", "1"]) == 0
    assert "Never late" in capsys.readouterr().out
    policy = genpolicy_runtime.Policy.load(Path(bench[2]))
    policy.reset(seed=0)
    seen = {
        name: np.zeros(one["shape"], np.float32) for name, one in manifest["observation"].items()
    }
    assert policy.act(seen).shape == (manifest["action"]["dim"],)


def test_the_section_has_five_commands():
    assert [words[0] for words in commands()] == [
        *("genpolicy", "genpolicy", "genpolicy", "mkdir", "genpolicy-runtime"),
    ]
