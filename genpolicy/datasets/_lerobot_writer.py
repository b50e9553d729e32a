"""Writes episodes as a LeRobotDataset (v3), whole or not at all."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from genpolicy.config.seal import digests, sealed
from genpolicy.contracts.task import ControlTask, Demonstration
from genpolicy.datasets import _lerobot_files as files
from genpolicy.datasets._lerobot_import import quiet


@contextmanager
def recording(
    out: Path, task: ControlTask, made: Mapping[str, Any], columns: Mapping[str, Tensor]
) -> Iterator[Callable[[Demonstration], None]]:
    """Fills `genpolicy.contracts.dataset.DatasetWriter`; ``made`` becomes meta/genpolicy.json, with
    the checksums of all other files.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another folder, or delete it")
    staged = out.with_name(f".{out.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    staged.parent.mkdir(parents=True, exist_ok=True)
    try:
        with quiet():
            from lerobot.datasets.lerobot_dataset import LeRobotDataset as Theirs

            writing = Theirs.create(
                repo_id=f"local/{out.name}",
                fps=task.fps,
                features={**_features(task), **_described(columns)},
                root=staged,
                use_videos=False,
            )
            try:
                yield lambda episode: _add(writing, episode, task)
            finally:
                writing.finalize()
        told = sealed({**made, "files": digests(staged)}, indent=2)
        (staged / files.MADE).write_text(told + "\n", encoding="utf-8")
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _features(task: ControlTask) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {
        name: {"dtype": "image", "shape": shape, "names": ["channels", "height", "width"]}
        if _is_picture(name)
        else {"dtype": "float32", "shape": shape, "names": None}
        for name, shape in task.shapes.items()
    }
    features["action"] = {"dtype": "float32", "shape": (task.action_dim,), "names": None}
    features["next.reward"] = {"dtype": "float32", "shape": (1,), "names": None}
    if task.has_success:
        features["next.success"] = {"dtype": "bool", "shape": (1,), "names": None}
    return features


def _described(columns: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The features of further columns, [L,*shape] each."""
    return {
        name: {
            "dtype": str(value.numpy().dtype),
            "shape": tuple(value.shape[1:]),
            "names": None,
        }
        for name, value in columns.items()
    }


def _is_picture(name: str) -> bool:
    return name.startswith("observation.image")


def _add(writing: Any, episode: Demonstration, task: ControlTask) -> None:
    """Adds one episode; "next.success", where the task judges, comes true with the last action of
    one that succeeded.
    """
    seen = {name: _frames(name, value) for name, value in episode.observation.items()}
    seen |= {name: value.numpy() for name, value in episode.columns.items()}
    actions = episode.actions.numpy()
    rewards = episode.rewards.numpy()
    for h in range(len(actions)):
        success = np.array([episode.success and h == len(actions) - 1])
        writing.add_frame(
            {name: frames[h] for name, frames in seen.items()}
            | {
                "action": actions[h],
                "next.reward": rewards[h : h + 1],
                "task": episode.instruction or task.instruction,
            }
            | ({"next.success": success} if task.has_success else {})
        )
    writing.save_episode()


def _frames(name: str, value: Tensor) -> np.ndarray:
    """Converts pictures in [0,1] to bytes, rounded: LeRobot would round down."""
    numbers = _is_picture(name) and value.is_floating_point()
    return ((value * 255).round().byte() if numbers else value).numpy()
