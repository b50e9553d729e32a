"""The command genpolicy-runtime: the manifest in words, and the latency at a rate."""

import re
import time

import numpy as np
import pytest
from genpolicy_runtime import bench, cli, providers
from genpolicy_runtime.policy import Policy

from tests.tiny_export import LANGUAGE, STATEFUL, vision_language, with_state, written


def test_check_says_what_the_policy_sees_and_does(tmp_path, capsys):
    assert cli.main(["check", str(written(tmp_path / "a", with_state(), state=STATEFUL))]) == 0
    said = capsys.readouterr().out
    for words in (
        "is whole, and onnxruntime reads it",
        "sees         observation.state: 2 numbers",
        "history      2 frames, one per tick",
        "acts         2 numbers per tick in the units of the environment, at 30 Hz",
        "clipped      least not known, most not known",
        "plans        3 actions, of which 3 are executed",
        "state        a plan begins from the one before",
    ):
        assert words in said
    cli.main(["check", str(written(tmp_path / "b", vision_language(), **LANGUAGE))])
    said = capsys.readouterr().out
    assert "observation.images.top: a picture of 2 x 4 pixels" in said
    assert "instruction  'go on', unless it is told other tokens" in said


def test_a_damaged_folder_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    (written(tmp_path) / "policy.onnx").write_bytes(b"")
    assert cli.main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"genpolicy-runtime: .*policy.onnx is damaged.*\n", said.err)


def test_bench_says_which_settings_meet_the_rate(tmp_path, capsys):
    folder = str(written(tmp_path))
    assert cli.main(["bench", folder, "--hz", "50", "--seconds", ".2", "--threads", "1", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("50 Hz: an action every 20.000 ms, on cpu")
    numbers = [line.split() for line in said[2:6]]
    assert [(row[0], row[1]) for row in numbers] == [
        ("1", "chunks"),
        ("1", "every"),
        ("2", "chunks"),
        ("2", "every"),
    ]
    assert all(" of 10" in line for line in said[2:6])
    assert said[-1].startswith("Never late: ")


def test_a_rate_that_nobody_names_is_asked_for(tmp_path, capsys):
    assert cli.main(["bench", str(written(tmp_path, rate_hz=None))]) == 2
    assert "names no rate of its own: say --hz RATE" in capsys.readouterr().err


@pytest.mark.parametrize("argument", [["--hz", "0"], ["--threads", "0"], ["--seconds", "nan"]])
def test_numbers_that_are_no_rate(tmp_path, capsys, argument):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", str(written(tmp_path)), *argument])
    assert end.value.code == 2
    assert argument[0] in capsys.readouterr().err


def test_late_ticks_are_counted_and_early_ones_are_not(tmp_path, monkeypatch):
    policy = Policy.load(written(tmp_path))
    plans = iter(range(10**6))

    def slow(policy, observation):
        if next(plans) % 2:
            time.sleep(0.06)

    monkeypatch.setitem(bench.MODES, "chunks", slow)
    timing = bench.measure(policy, 1, "chunks", hz=25, seconds=0.4)
    assert len(timing.milliseconds) == 10
    assert timing.misses >= 5
    prompt = bench.measure(policy, 1, "every tick", hz=2, seconds=1)
    assert prompt.misses == 0


def test_ticks_are_paced_in_real_time(tmp_path):
    policy = Policy.load(written(tmp_path))
    began = time.perf_counter()
    timing = bench.measure(policy, 1, "chunks", hz=40, seconds=0.25)
    assert time.perf_counter() - began > 0.2
    assert np.median(timing.milliseconds) < 20


def test_tensorrt_keeps_its_engines_in_the_users_cache(tmp_path, monkeypatch):
    every = [*providers.PROVIDERS.values()]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: every)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    (first, options), *others = providers.providers("tensorrt", "ab" * 32)
    assert first == "TensorrtExecutionProvider"
    assert [name for name, _ in others] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert options["trt_engine_cache_path"] == str(
        tmp_path / "genpolicy-runtime" / "tensorrt" / ("ab" * 8)
    )
    assert [name for name, _ in providers.providers("cpu", "")] == ["CPUExecutionProvider"]
