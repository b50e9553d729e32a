"""The folder of an export: it never takes the place of anything but an older export."""

from pathlib import Path

import pytest

from genpolicy.config.errors import ConfigError
from genpolicy.formats._folder import fresh, require_free


def ours(folder: Path) -> bool:
    return (folder / "mark").exists()


def precious(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "thesis").write_text("years")
    return folder


def test_a_path_through_a_folder_that_is_not_there_is_looked_at_where_it_leads(tmp_path: Path):
    kept = precious(tmp_path / "kept")
    around = tmp_path / "new" / ".." / "kept"
    with pytest.raises(ConfigError, match="is no older export"):
        require_free(around, ours)
    with pytest.raises(ConfigError, match="is no older export"), fresh(around, ours):
        pass
    assert (kept / "thesis").read_text() == "years"


def test_a_folder_that_comes_while_the_export_is_written_stays(tmp_path: Path):
    out = tmp_path / "out"

    def write() -> None:
        with fresh(out, ours) as folder:
            (folder / "mark").touch()
            precious(out)

    with pytest.raises(ConfigError, match="is no older export"):
        write()
    assert (out / "thesis").read_text() == "years"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left"


def test_an_older_export_is_replaced(tmp_path: Path):
    out = tmp_path / "out"
    for text in ("older", "newer"):
        with fresh(out, ours) as folder:
            (folder / "mark").write_text(text)
    assert (out / "mark").read_text() == "newer"
