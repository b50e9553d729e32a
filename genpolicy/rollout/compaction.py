"""Compacts a run's journal of episodes into one data set.

The journal has one file per episode, written whole when the episode ends (`EpisodeStore`): a kill
loses what is in flight and nothing else. A data set is a few large files, of which one that was
never closed is lost whole; it is made when nobody acts any more, and appears when it is complete.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf, make
from genpolicy.config.origin import PERSON, Origin
from genpolicy.contracts.dataset import DatasetWriter
from genpolicy.contracts.task import ControlTask, Demonstration, is_control
from genpolicy.rollout.columns import (
    DECISION,
    DONE,
    EXECUTED,
    INTERVENTION,
    ITERATION,
    START,
    TRUNCATED,
)
from genpolicy.rollout.demonstrations import WRITER
from genpolicy.rollout.recorder import FRAMES
from genpolicy.rollout.store import EpisodeStore

CONFIG = "config.yaml"
"""The experiment in a run's folder."""
SMALL = 1024
"""Numbers of a decision's initial noise up to which it is written beside each of its steps."""


@dataclass
class Compacted:
    """The counts of what `compact` wrote."""

    iterations: int = 0  # of which there are episodes
    episodes: int = 0
    successes: int = 0  # episodes
    frames: int = 0
    human: int = 0  # frames in which a person acted


def compact(
    run: Path,
    out: Path,
    *,
    trust: bool = False,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Compacted:
    """Writes all episodes of a run's journal as one data set into the new folder ``out``, in the
    order of iterations, groups and members.

    What is damaged or missing is said and left out. trust: the run's files may import the code that
    they name. Raises `ConfigError` where there is no episode, and where steps of an episode were
    not seen because the run kept only its decisions.
    """
    config = run / CONFIG
    if not config.is_file():
        raise ConfigError(f"{run} is no run's folder: it has no {CONFIG}")
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another folder, or delete it")
    experiment = parse.load(config)
    task = make("tasks", experiment.task, Origin(trust=trust).reached(config))
    store = EpisodeStore(run, say)
    iterations = store.iterations()
    if not is_control(task) or not iterations:
        raise ConfigError(
            f"{run} has kept no episode: a run of a robot keeps all of them with record: true in"
            " its experiment (docs/replay.md)"
        )
    done = Compacted()
    made: dict[str, Any] = {"run": str(run), "task": experiment.task}
    episodes = _recorded(store, iterations, task, done)
    first = next(episodes, None)
    if first is None:
        raise ConfigError(f"{run} has no whole episode")
    writer: DatasetWriter = leaf("datasets", WRITER, PERSON)
    with writer.recording(out, task, made, first.columns) as keep:
        for episode in chain([first], episodes):
            keep(episode)
            done.episodes += 1
            done.successes += episode.success
            done.frames += len(episode.actions)
            done.human += int(episode.columns[INTERVENTION].sum())
        made.update(asdict(done))
    return done


def _recorded(
    store: EpisodeStore, iterations: list[int], task: ControlTask, done: Compacted
) -> Iterator[Demonstration]:
    for iteration in iterations:
        seen = False
        for name, episode in store.whole(iteration):
            try:
                frames = as_frames(name, episode, iteration, task)
                _require_fit(frames, task)
            except ConfigError:
                raise
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                store.say(f"{name} holds no episode of the run's task: {reason}; it is left out")
                continue
            yield frames
            seen = True
        done.iterations += seen


def as_frames(
    name: Path, episode: Mapping[str, Any], iteration: int, task: ControlTask
) -> Demonstration:
    """An episode of the journal, H decisions of up to T steps, as its L frames. Raises
    `ConfigError`, calling it ``name``, where what was seen between decisions was not kept.
    """
    executed = episode["executed"]
    steps = torch.arange(episode["rewards"].shape[1])
    taken = steps < executed[:, None]
    decision = torch.arange(len(executed)).repeat_interleave(executed)
    last = torch.arange(len(decision)) == len(decision) - 1
    human = episode.get("human", torch.zeros_like(taken))
    columns = {
        DONE: last,
        TRUNCATED: last & episode["truncated"][-1],
        INTERVENTION: human[taken],
        ITERATION: torch.full_like(decision, iteration),
        DECISION: decision,
        EXECUTED: executed[decision],
    }
    columns = {column: value[:, None] for column, value in columns.items()}
    start = episode["start"].flatten(1)  # LeRobot's tools merge no columns of matrices
    if start.shape[1] <= SMALL:
        columns[START] = start[decision]
    low, high = torch.tensor(task.action_low), torch.tensor(task.action_high)
    return Demonstration(
        _frames(name, episode),
        episode["actions"][taken].clamp(low, high),
        episode["rewards"][taken].float(),
        bool(episode["success"][-1]),
        episode["prompts"][0],
        columns,
    )


def _require_fit(episode: Demonstration, task: ControlTask) -> None:
    """Raises `ValueError` for an episode without a step, or of other sizes than the task's."""
    length = len(episode.actions)
    sizes = {**task.shapes, "action": (task.action_dim,)}
    for name, value in {**episode.observation, "action": episode.actions}.items():
        if not length or tuple(value.shape) != (length, *sizes[name]):
            raise ValueError(f"{name} has the shape {tuple(value.shape)}")


def _frames(name: Path, episode: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """What was seen before each action: the frames, or where every decision was of one action what
    was seen at it.
    """
    if FRAMES in episode:
        return episode[FRAMES]
    if bool((episode["executed"] > 1).any()):
        raise ConfigError(
            f"{name} has only what was seen at its decisions, and a data set shows every step:"
            " collect with record: true in the experiment (docs/replay.md)"
        )
    return {key: value[:, -1] for key, value in episode["observation"].items()}
