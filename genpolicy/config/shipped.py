"""Finds what ships with genpolicy, by its name in the repository: `assets/…`, `configs/…`,
`robots/…`.

A user's own file in the current directory comes first, then the checkout, then the installed wheel,
which carries the same folders inside the package as `_assets`, `_configs` and `_robots`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path

FOLDERS = ("assets", "configs", "robots")
SUFFIXES = (".yaml", ".yml")

_PACKAGE = Path(__file__).resolve().parents[1]


def path(name: str | Path) -> Path:
    """Returns the existing file or folder called `name`, for example `assets/shapes-sd3`.

    Raises:
        FileNotFoundError: in one sentence, with the nearest names that do exist.
    """
    asked = Path(name).expanduser()
    if asked.exists():
        return asked
    folder, *rest = asked.parts
    if folder not in FOLDERS:
        raise FileNotFoundError(f"There is no file or folder '{name}'.")
    homes = list(_homes(folder))
    for home in homes:
        if (found := home.joinpath(*rest)).exists():
            return found
    beside = [
        f"{folder}/{found.relative_to(home).as_posix()}"
        for home in homes
        for found in (*home.glob("*"), *home.joinpath(*rest).parent.glob("*"))
    ]
    raise FileNotFoundError(
        f"There is no '{name}', here or among what ships{_nearest(name, beside)}."
    )


def code(name: str) -> Path | None:
    """The shipped folder of Python files called `name`, such as `robots/genpolicy_runtime/src`;
    never one of the current folder, whose code is not ours.
    """
    folder, *rest = Path(name).parts
    found = (_PACKAGE.parent.joinpath(folder, *rest), _PACKAGE.joinpath(f"_{folder}", *rest))
    return next((place for place in found if place.is_dir()), None)


def configs() -> dict[str, Path]:
    """The YAMLs below `configs/`, by its path there without the suffix, such as
    `debug/grpo_guard`.
    """
    found: dict[str, Path] = {}
    for home in _homes("configs"):
        for file in sorted(home.rglob("*")):
            if file.suffix in SUFFIXES:
                found.setdefault(file.relative_to(home).with_suffix("").as_posix(), file)
    return found


def find_config(name: str | Path) -> Path:
    """Returns the YAML called `name`: a path, a name below `configs/`, or the last part of one.

    Raises:
        FileNotFoundError: in one sentence, with the nearest names, or with all that fit where
            several do.
    """
    asked = Path(name).expanduser()
    if asked.is_file():
        return asked
    known = configs()
    key = (
        (asked.with_suffix("") if asked.suffix in SUFFIXES else asked)
        .as_posix()
        .removeprefix("configs/")
    )
    if key in known:
        return known[key]
    stems = Counter(_stem(full) for full in known)
    same_stem = [full for full in known if _stem(full) == key]
    if len(same_stem) == 1:
        return known[same_stem[0]]
    if same_stem:
        raise FileNotFoundError(
            f"Several configs are called '{name}': {', '.join(sorted(same_stem))}."
        )
    names = {*known, *(stem for stem, count in stems.items() if count == 1)}
    nearest = _nearest(key, names) or "; `genpolicy list configs` shows all"
    raise FileNotFoundError(
        f"There is no config '{name}', neither a file nor one that ships{nearest}."
    )


def _homes(folder: str) -> Iterator[Path]:
    """The places that may hold one of `FOLDERS`, in the order in which they are asked."""
    checkout = _PACKAGE.parent
    candidates = [Path.cwd() / folder]
    # without it the folder is site-packages, with other packages' folders
    if (checkout / "pyproject.toml").is_file():
        candidates.append(checkout / folder)
    candidates.append(_PACKAGE / f"_{folder}")
    return (home for home in dict.fromkeys(candidates) if home.is_dir())


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _nearest(name: str | Path, names: Iterable[str]) -> str:
    """The end of a sentence that names what may have been meant, or nothing."""
    close = get_close_matches(str(name), sorted(set(names)), n=3, cutoff=0.5)
    return f"; the nearest: {', '.join(close)}" if close else ""
