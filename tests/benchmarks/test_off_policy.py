"""The runs that a table is of are kept in a small file, and come back as they were measured."""

from pathlib import Path

import pytest

from benchmarks import off_policy
from benchmarks.off_policy import Run, keep, kept, of, reached, table

STEPS = 500.0


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    monkeypatch.setattr(off_policy, "KEPT", tmp_path / "measured" / "off_policy.json")
    better = [(STEPS, 0.5), (2 * STEPS, 0.92), (3 * STEPS, 0.9)]
    return {
        "pa_rl-0": Run(better, [True, False, True, True], 12.5),
        "pa_rl-1": Run(better[:2], [False, False, True, True], 7.5),
        "q_chunking_long-0": Run(better, [True] * 4, 1.0),
        "q_chunking-0": Run(better, [False] * 4, 1.0),
    }


def test_runs_come_back_as_they_were(runs: dict[str, Run]) -> None:
    keep("shelf-place-v3", runs)
    keep("assembly-v3", {"pa_rl-0": runs["pa_rl-1"]})
    assert kept("shelf-place-v3") == runs
    assert kept("assembly-v3") == {"pa_rl-0": runs["pa_rl-1"]}
    assert kept("peg-insert-side-v3") == {}


def test_a_method_has_its_own_runs_alone(runs: dict[str, Run]) -> None:
    assert of("q_chunking", runs) == [runs["q_chunking-0"]]
    assert of("pa_rl", runs) == [runs["pa_rl-0"], runs["pa_rl-1"]]


def test_a_level_needs_a_second_evaluation() -> None:
    assert reached([(STEPS, 0.5), (2 * STEPS, 0.92), (3 * STEPS, 0.9)]) == 2 * STEPS
    assert reached([(STEPS, 0.95), (2 * STEPS, 0.89), (3 * STEPS, 0.91)]) is None


def test_a_line_tells_each_seed(runs: dict[str, Run]) -> None:
    line = next(one for one in table(runs).splitlines() if "`pa_rl`" in one)
    assert line == "| `pa_rl` | 0.750, 0.500 | 0.625 | 1,000, not | 10 |"
