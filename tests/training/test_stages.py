"""The course of stages: in order, each so long, ended early or by the budget, and resumed where it stood."""

import pytest

from genpolicy.training.stages import Course

STAGES = [("imitate", 3), ("collect", 1), ("improve", 4), ("improve", 2), ("online", None)]


def walked(course, iterations):
    """(stage, progress) of so many iterations."""
    seen = []
    for _ in range(iterations):
        seen.append((course.stage, course.progress))
        assert course.advance()
    return seen


def test_every_stage_takes_its_iterations_in_order():
    seen = walked(Course(STAGES), 13)
    names = ["imitate"] * 3 + ["collect"] + ["improve"] * 6 + ["online"] * 3
    assert [stage for stage, _ in seen] == names
    assert [share for _, share in seen[:4]] == [0, pytest.approx(1 / 3), pytest.approx(2 / 3), 0]
    assert [share for _, share in seen[4:10]] == [0, 0.25, 0.5, 0.75, 0, 0.5], (
        "of its own stage, not of its name"
    )
    assert all(share is None for _, share in seen[10:]), "a stage without an end has no share"


def test_a_course_ends_with_its_last_stage():
    course = Course([("imitate", 2), ("collect", 1)])
    assert [course.advance() for _ in range(3)] == [True, True, False]


def test_a_stage_may_end_early_and_the_next_begins_at_its_beginning():
    course = Course(STAGES)
    walked(course, 5)
    assert (course.stage, course.done) == ("improve", 1)
    assert course.advance(through=True)
    assert (course.at, course.done, course.progress) == (3, 0, 0)
    assert course.advance(through=False)
    assert (course.at, course.done) == (3, 1)
    assert not Course([("improve", 9)]).advance(through=True), "early, and nothing comes after"


@pytest.mark.parametrize("stop", range(12))
def test_it_goes_on_where_it_stood(stop):
    whole, broken, resumed = Course(STAGES), Course(STAGES), Course(STAGES)
    walked(broken, stop)
    resumed.load_state_dict(broken.state_dict())
    assert walked(whole, 14)[stop:] == walked(resumed, 14 - stop)
    if stop:  # control: one that is not told begins at the beginning
        assert walked(Course(STAGES), 14 - stop) != walked(broken, 14 - stop)
