"""The stages of a method: in order, each so long, ended early, and resumed where they stood."""

import pytest

from genpolicy.config.schema import OptimizerConfig
from genpolicy.training.stages import Stage, Stages

LENGTHS = [("imitate", 3), ("collect", 1), ("improve", 4), ("improve", 2), ("online", None)]


def stages(lengths=LENGTHS):
    return Stages([Stage(name, length, OptimizerConfig()) for name, length in lengths])


def walked(course, iterations):
    """(stage, progress) of so many iterations; `advance` says where a stage is left."""
    seen = []
    for _ in range(iterations):
        seen.append((course.now.name, course.progress))
        before = course.at
        assert course.advance() is (course.at == before + 1)
        assert not course.over
    return seen


def test_every_stage_takes_its_iterations_in_order():
    seen = walked(stages(), 13)
    names = ["imitate"] * 3 + ["collect"] + ["improve"] * 6 + ["online"] * 3
    assert [stage for stage, _ in seen] == names
    assert [share for _, share in seen[:4]] == [0, pytest.approx(1 / 3), pytest.approx(2 / 3), 0]
    assert [share for _, share in seen[4:10]] == [0, 0.25, 0.5, 0.75, 0, 0.5], (
        "of its own stage, not of its name"
    )
    assert all(share is None for _, share in seen[10:]), "a stage without an end has no share"


def test_they_end_with_the_last_one():
    course = stages([("imitate", 2), ("collect", 1)])
    found = [(course.advance(), course.over) for _ in range(3)]
    assert found == [(False, False), (True, False), (True, True)]
    assert course.progress is None, "when all are done nothing is begun"


def test_a_stage_may_end_early_and_the_next_begins_at_its_beginning():
    course = stages()
    walked(course, 5)
    assert (course.now.name, course.done) == ("improve", 1)
    assert course.advance(through=True)
    assert (course.at, course.done, course.progress) == (3, 0, 0)
    assert not course.advance(through=False)
    assert (course.at, course.done) == (3, 1)
    last = stages([("improve", 9)])
    assert last.advance(through=True)
    assert last.over, "early, and nothing comes after"


def test_a_hurry_gives_one_iteration_to_each_and_leaves_no_last_one_without_an_end():
    course = stages()
    course.hurried = True
    names = []
    for _ in range(6):
        names.append(course.now.name)
        course.advance()
    assert names == ["imitate", "collect", "improve", "improve", "online", "online"]
    calm = stages()
    calm.advance()
    assert calm.now.name == "imitate", "control: without it the first goes on"


@pytest.mark.parametrize("stop", range(12))
def test_it_goes_on_where_it_stood(stop):
    whole, broken, resumed = stages(), stages(), stages()
    walked(broken, stop)
    resumed.load_state_dict(broken.state_dict())
    assert walked(whole, 14)[stop:] == walked(resumed, 14 - stop)
    if stop:  # control: one that is not told begins at the beginning
        assert walked(stages(), 14 - stop) != walked(broken, 14 - stop)
