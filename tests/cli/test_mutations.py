"""Three hundred mutations of the presets: each is one sentence that names the key, or a valid plan.

Each mutation is an option ``--key=value`` of `genpolicy train PRESET --plan`, and everything that
the experiment names is built as it is for a run; only the rehearsed iteration itself is left out.
"""

import dataclasses
import os
import random
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genpolicy.cli.main import main
from genpolicy.config import leaves, parse
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import Experiment
from genpolicy.training.experiment import _read
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import start_processes
from genpolicy.training.rehearsal import Rehearsal

MUTATIONS = 300
PRESETS = (
    "debug/flow_grpo_toy",
    "debug/dppo_toy",
    "debug/dppo_metaworld",
    "debug/flow_grpo_metaworld",
    "debug/grpo_guard_shapes",
    "debug/lora_shapes",
    "point_smolvla",
    "quickstart",
    "shapes_dppo",
    "shapes_flow_grpo_weighted",
)
"""The presets that are built from what ships alone; the small sizes of debug/ more than once."""
SHELVES = {"policy": "models", "task": "tasks", "method": "methods"}
MISSPELT = ("nope", "nope.deeper", "chain.stps", "method.gruop", "eval.sampler.stepps", "1", "é")
NESTED = (
    "chain.kernel.name",
    "chain.kernel.eta",
    "chain.kernel.a",
    "chain.kernel.kernel",
    "chain.kernel.kernel.eta",
    "eval.sampler.steps",
    "eval.sampler.kernel",
    "policy.call.max_sequence_length",
    "policy.lora.rank",
    "data.root",
    "reward.weight",
)
VALUES = (
    # of the wrong kind
    *("x", "''", "null", "true", "false", "2020-01-01", "!!binary aGk=", "!!set {a}"),
    *("[]", "[1]", "[1, 2]", "[[1, 2], [3]]", "[null]", "{}", "{a: 1}", "{1: 2}", "{null: 1}"),
    *("{name: 3}", "{name: null}", "{name: [a]}", "[1", "{[1]: 2}"),
    # extreme
    *("0", "-1", "1.5", "1e12", "4611686018427387904", "1e308", "-1e308", "9" * 50, "1e-320"),
    *(".nan", ".inf", "-.inf", "[1e400, 2]", "x" * 3000, "[" * 90 + "]" * 90, "[" * 500),
    *("{name: mean, kernel: " * 90 + "ddim" + "}" * 90, "é\U0001f600", '"a\\nb"', '"\\0"'),
    # names and paths that lead nowhere, or elsewhere
    *("a.b:c", "mod:", "':x'", "..:x", "os:getcwd", "builtins:dict", "genpolicy.methods.bc:BC"),
    *("nowhere/at/all", "assets/nope", "assets/shapes-sd3", "/", "~/x"),
)


def keys(preset: str) -> list[str]:
    """Every key that the preset's sections know, nested ones, and some that nothing knows."""
    raw = parse.read_yaml(preset)
    kinds: dict[str, Any] = {
        name: kind
        for name, kind in typing.get_type_hints(Experiment).items()
        if dataclasses.is_dataclass(kind)
    }
    for section, shelf in SHELVES.items():
        named = raw[section] if isinstance(raw[section], str) else raw[section]["name"]
        kinds[section] = leaves.leaf(shelf, named, PERSON)
    found = [f.name for f in dataclasses.fields(Experiment)]
    for section, kind in kinds.items():
        found += [f"{section}.{f.name}" for f in dataclasses.fields(kind) if f.init]
    return [*found, *(f"{section}.name" for section in SHELVES), *NESTED, *MISSPELT]


def mutations(seed: int, count: int) -> list[tuple[str, str, str]]:
    """Preset, key and value of each mutation; no two are the same."""
    draw = random.Random(seed)
    known = {preset: keys(preset) for preset in PRESETS}
    found: dict[tuple[str, str, str], None] = {}
    while len(found) < count:
        preset = draw.choice(PRESETS)
        found[preset, draw.choice(known[preset]), draw.choice(VALUES)] = None
    return list(found)


def built(path: str, overrides: Any = (), *, trust: bool = False) -> tuple[Experiment, Rehearsal]:
    """`genpolicy.training.experiment.rehearse` up to the method's first iteration."""
    asked, origin = _read(path, overrides, trust)
    cost = Rehearsal()
    with tempfile.TemporaryDirectory() as nowhere:
        run, _ = prepare(asked, Path(nowhere), start_processes(asked, None), cost, origin)
        with run:
            return asked, cost


def names_it(sentence: str, key: str) -> bool:
    """True where a sentence names the key, one of its sections, or the kind of leaf it stands for."""
    words = {*key.split("."), key.split(".")[0]}
    aliases = {"policy": {"model"}, "data": {"dataset"}}
    return any(word in sentence for word in words | aliases.get(key.split(".")[0], set()))


def test_every_mutation_is_one_sentence_or_a_plan(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("genpolicy.cli.train.rehearse", built)
    asked = mutations(0, MUTATIONS)
    for preset in PRESETS:  # warm: libraries are imported, and each preset itself is accepted
        assert main(["train", preset, "--plan"]) == 0
    capsys.readouterr()
    seconds: list[float] = []
    accepted = 0
    wrong: list[str] = []
    for preset, key, value in asked:
        begun = time.process_time()
        try:
            code = main(["train", preset, f"--{key}={value}", "--plan"])
        except Exception as error:
            wrong.append(f"{preset} --{key}={value[:60]}: {type(error).__name__} {error}"[:300])
            continue
        finally:
            seconds.append(time.process_time() - begun)
            said = capsys.readouterr().err.strip()
        accepted += code == 0
        lines = said.splitlines()
        if code != 0 and (code != 2 or len(lines) != 1 or not names_it(said, key)):
            wrong.append(f"{preset} --{key}={value[:60]}: exit code {code}: {said[:300]}")
    with capsys.disabled():
        print(
            f"\n{accepted / len(asked):.1%} of {len(asked)} mutations are accepted;"
            f" 95 of 100 take at most {np.percentile(seconds, 95):.2f} s of CPU time"
        )
    assert not wrong, "\n".join([f"{len(wrong)} of {len(asked)}", *wrong])
    assert list(tmp_path.iterdir()) == []


def test_a_mutation_that_nothing_decodes_would_be_found(tmp_path: Path, monkeypatch):
    """The negative control: where a class may raise what it likes, the sentence is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("genpolicy.cli.train.rehearse", built)
    monkeypatch.setattr("genpolicy.config.parse.MISUSE", ())
    with pytest.raises(RuntimeError):
        main(["train", "debug/dppo_metaworld", "--policy.device=nowhere", "--plan"])


@pytest.mark.slow
def test_ten_mutations_are_refused_by_a_process_of_their_own(tmp_path: Path):
    """Each of these was a traceback, or took all memory."""
    refused = [
        ("debug/flow_grpo_toy", "policy.hidden", "0"),
        ("debug/flow_grpo_toy", "policy", "os:getcwd"),
        ("debug/flow_grpo_toy", "method", "..:x"),
        ("debug/flow_grpo_toy", "chain.kernel", "builtins:dict"),
        ("debug/flow_grpo_toy", "chain.steps", "4611686018427387904"),
        ("debug/flow_grpo_toy", "eval.samples", "1e308"),
        ("debug/dppo_toy", "seed", "1e308"),
        ("debug/dppo_toy", "reward", "{null: 1}"),
        ("debug/dppo_toy", "eval.prompts", "[1, 2]"),
        ("debug/dppo_metaworld", "policy.device", "nowhere"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for preset, key, value in refused:
        ended = subprocess.run(
            [sys.executable, "-m", "genpolicy", "train", preset, f"--{key}={value}", "--plan"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2, ended.stderr
        assert "Traceback" not in ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
        assert names_it(ended.stderr, key), ended.stderr
    assert list(tmp_path.iterdir()) == []
