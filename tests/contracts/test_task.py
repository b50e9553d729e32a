"""The two kinds of tasks are told apart by all that their contracts name."""

import pytest

from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import is_control
from genpolicy.tasks.prompts import Prompts
from tests.toy_control import Point


class HalfWritten:
    """A task of environments that does not say its shapes, its instruction and the rest."""

    def environments(self, count: int, history: int) -> None: ...


def test_a_task_is_of_prompts_or_of_environments(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n")
    assert is_control(Point())
    assert not is_control(Prompts(str(file)))


def test_a_task_that_lacks_a_part_of_both_kinds_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="HalfWritten is neither one of prompts"):
        is_control(HalfWritten())
