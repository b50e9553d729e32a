"""Episodes on disk: each is written whole when it ends, so that what a robot has done is never
done, or counted, twice.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genpolicy.config.errors import ConfigError
from genpolicy.rollout import tensor_file

FOLDER = "episodes"
"""The folder of episodes in a run's folder: episodes/ITERATION/GROUP-MEMBER-ORIGIN.pt."""
EPISODES = "[0-9]*.pt"
"""The names of whole episodes: one that is being written begins with a dot."""
NAME = re.compile(r"\d+-\d+(-\w+)?")
"""The name of an episode without its ending; what else lies beside is not the run's."""
COLLECTED = "collected"
"""The key of an episode for how many groups and members were collected with it, [2]."""
LOST = (
    "it was collected by weights that have learned since and can't be played again: put it back"
    " from a copy, or begin the run anew in another output"
)
"""The end of a sentence about an episode that is gone."""


class EpisodeStore:
    """The episodes of one run, by iteration and name. A run that was killed while it collected
    plays only what is missing: an episode is a function of the weights, its seed and its noise, and
    those are the same again after a resume. Where they are not, because somebody has edited the
    experiment meanwhile, the name's last part tells: the origin.
    """

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], None] = lambda text: None,
        for_good: bool = False,
    ) -> None:
        self.folder, self.say = folder / FOLDER, say
        self.for_good = for_good  # nothing is deleted that a run may have learned from
        self.pinned: set[int] = set()  # iterations whose episodes are learned from for longer

    def read(self, iteration: int, name: str) -> dict[str, Any] | None:
        """Returns the episode that was written under this name, if there is one; a damaged one is
        none, and is played again.
        """
        path = self._path(iteration, name)
        if not path.is_file():
            return None
        try:
            return _read(path)
        except ValueError as error:
            self.say(f"{error}; it is played again")
            return None

    def write(self, iteration: int, name: str, episode: dict[str, Any]) -> None:
        """Write an episode: tensors, texts, and lists and mappings of them."""
        tensor_file.write(self._path(iteration, name), episode)

    def forget_others(self, iteration: int, origin: str) -> None:
        """Delete an iteration's episodes of any other origin."""
        for path in (self.folder / str(iteration)).glob(EPISODES):
            if not path.stem.endswith(f"-{origin}"):
                path.unlink(missing_ok=True)

    def trim(self, iteration: int) -> None:
        """Delete the episodes up to this iteration, from which a run may be resumed, but for those
        that are pinned; none of a run that keeps them for good.
        """
        if self.for_good:
            return
        for number in self.iterations():
            if number <= iteration and number not in self.pinned:
                shutil.rmtree(self.folder / str(number))

    def episodes(self, iteration: int) -> list[dict[str, Any]]:
        """All of an iteration, of whatever process, by group and member.

        Raises `ConfigError` where one is damaged, or missing of as many as were collected: the
        others alone would teach something else.
        """
        folder = self.folder / str(iteration)
        ordered = self._names(iteration)
        try:
            found = [_read(self._path(iteration, name)) for name in ordered]
        except ValueError as error:
            raise ConfigError(f"{error}; {LOST}") from None
        missing = _missing(ordered, found)
        if missing:
            raise ConfigError(f"{folder} has lost the episode {missing} (GROUP-MEMBER); {LOST}")
        return found

    def kept(self, iteration: int) -> list[dict[str, Any]]:
        """`episodes` of an iteration; `ConfigError` where there are none."""
        found = self.episodes(iteration)
        if not found:
            raise ConfigError(
                f"no episode of iteration {iteration} was kept: collect with keep=True, and pin the"
                " iteration for as long as its episodes are read"
            )
        return found

    def iterations(self) -> list[int]:
        """The iterations of which there are episodes, in order."""
        folders = (folder for folder in self.folder.glob("[0-9]*") if folder.is_dir())
        return sorted(int(folder.name) for folder in folders if folder.name.isdecimal())

    def whole(self, iteration: int) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yields the episodes of an iteration, by group and member, with their files; says which
        file is damaged, and which episode is missing, and leaves them out.
        """
        names, found = self._names(iteration), []
        for name in names:
            path = self._path(iteration, name)
            try:
                episode = _read(path)
            except ValueError as error:
                self.say(f"{error}; it is left out")
                continue
            found.append({COLLECTED: episode[COLLECTED]} if COLLECTED in episode else {})
            yield path, episode
        missing = _missing(names, found)
        if missing:
            self.say(
                f"iteration {iteration}: {len(found)} of its episodes are there, and {missing}"
                " (GROUP-MEMBER) is not: it had not ended, or is lost"
            )

    def _names(self, iteration: int) -> list[str]:
        """The names of an iteration's episodes, by group and member."""
        found = (path.stem for path in (self.folder / str(iteration)).glob(EPISODES))
        names = [name for name in found if NAME.fullmatch(name)]
        return sorted(names, key=lambda name: [int(number) for number in name.split("-")[:2]])

    def _path(self, iteration: int, name: str) -> Path:
        return self.folder / str(iteration) / f"{name}.pt"


def _read(path: Path) -> dict[str, Any]:
    """The episode of a file. Raises `ValueError` for one that is damaged or holds none."""
    episode = tensor_file.read(path)
    if not isinstance(episode, dict):
        raise ValueError(f"{path} is damaged: it holds no episode")
    return episode


def _missing(names: Sequence[str], episodes: Sequence[Mapping[str, Any]]) -> str:
    """The first GROUP-MEMBER that was collected with these episodes and is not one of them."""
    there = {tuple(name.split("-")[:2]) for name in names}
    # episodes of older runs do not say how many they were
    counts = [episode[COLLECTED].tolist() for episode in episodes if COLLECTED in episode]
    groups, members = max(counts, default=(0, 0))
    asked = ((str(group), str(member)) for group in range(groups) for member in range(members))
    return next(("-".join(pair) for pair in asked if pair not in there), "")
