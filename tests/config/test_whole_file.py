"""A file is written whole or not at all."""

import pytest

from genpolicy.config.whole_file import replacing, write_text


def half_written(path):
    path.write_text("new, ha")
    raise KeyboardInterrupt


def test_a_write_that_is_cut_off_leaves_the_file_before_and_nothing_beside_it(tmp_path):
    file = tmp_path / "made" / "config.yaml"
    write_text(file, "old\n")
    with pytest.raises(KeyboardInterrupt), replacing(file) as staged:
        half_written(staged)
    assert file.read_text() == "old\n"
    assert list(file.parent.iterdir()) == [file]


def test_control_a_write_in_place_that_is_cut_off_leaves_half_a_file(tmp_path):
    file = tmp_path / "config.yaml"
    write_text(file, "old\n")
    with pytest.raises(KeyboardInterrupt):
        half_written(file)
    assert file.read_text() == "new, ha"


def test_the_last_write_stands_in_utf_8(tmp_path):
    file = tmp_path / "config.yaml"
    write_text(file, "old\n")
    write_text(file, "± 1\n")
    assert file.read_bytes() == "± 1\n".encode()
    assert list(tmp_path.iterdir()) == [file]
