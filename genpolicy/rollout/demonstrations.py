"""Records an expert's, or a policy's, episodes of a task as a data set."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf, make
from genpolicy.config.origin import PERSON, Origin
from genpolicy.contracts.dataset import DatasetWriter
from genpolicy.contracts.model import ControlModel, require_fit
from genpolicy.contracts.task import Context, ControlTask, Demonstration, TaskStep, is_control
from genpolicy.policy.files import saved
from genpolicy.rollout.episodes import play
from genpolicy.rollout.guard import guarded

WRITER = "lerobot_dataset"
"""The leaf of datasets/ that episodes are recorded as."""
PATIENCE = 5
"""Maximum expert attempts per requested episode."""
SIDE_BY_SIDE = 20
"""Episodes that a policy plays at once, at most."""


@dataclass
class Recorded:
    """The counts of what `demonstrate` wrote."""

    episodes: int = 0  # kept
    tried: int = 0  # played, kept or not
    successes: int = 0  # among the kept
    frames: int = 0  # of the kept


def demonstrate(
    task_section: Mapping[str, Any],
    out: Path,
    *,
    episodes: int,
    noise: float,
    seed: int,
    policy: str | None = None,
    origin: Origin = PERSON,
) -> Recorded:
    """Writes a data set of ``episodes`` to the new folder ``out``; they begin from the reset seeds
    ``seed``, ``seed`` + 1, ...

    Without ``policy`` the task's expert acts, with Gaussian ``noise`` (std, in actions) on what it
    does, and only what succeeds is kept; a policy (a run's or a policy's folder) acts with its
    deployed sampler, and everything is kept ("next.success" tells). The folder appears when it is
    complete; meta/genpolicy.json says how it was made.

    origin: of the task section; ``policy`` is a stranger's, unless the person trusts those.
    """
    if episodes < 1:
        raise ConfigError(f"episodes is {episodes}; it must be at least 1")
    if noise < 0 or (noise and policy is not None):
        raise ConfigError(
            f"noise is {noise}; it must be at least 0, "
            "and 0 for a policy, which acts with its own sampler"
        )
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another folder, or delete it")
    task = make("tasks", task_section, origin)
    if not is_control(task):
        raise ConfigError(f"task {task_section['name']} has no environments to act in")
    if policy is None:
        source = _by_expert(task, range(seed, seed + PATIENCE * episodes), noise)
    else:
        name, seeds = str(task_section["name"]), range(seed, seed + episodes)
        source = _by_policy(task, name, seeds, policy, seed, origin.trust)
    done = Recorded()
    made = {"task": dict(task_section), "policy": policy, "noise": noise, "seed": seed}
    writer: DatasetWriter = leaf("datasets", WRITER, PERSON)
    with (
        writer.recording(out, task, made) as keep,
        tqdm(total=episodes, desc="demonstrate", unit="episode", file=sys.stderr) as bar,
    ):
        while done.episodes < episodes and (episode := next(source, None)) is not None:
            done.tried += 1
            if policy is not None or episode.success:
                keep(episode)
                done.episodes += 1
                done.successes += episode.success
                done.frames += len(episode.actions)
                bar.update()
            bar.set_postfix_str(f"{done.tried} tried")
        if done.episodes < episodes:
            raise ConfigError(
                f"the expert succeeded in {done.episodes} of {done.tried} episodes, "
                f"{episodes} were asked for: lower noise, choose another seed, "
                "or raise the task's time limit"
            )
        made.update(asdict(done))
    return done


def _by_expert(task: ControlTask, seeds: Sequence[int], noise: float) -> Iterator[Demonstration]:
    for seed in seeds:
        try:
            yield task.demonstrate(seed, noise)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _by_policy(
    task: ControlTask, name: str, seeds: Sequence[int], policy: str, seed: int, trust: bool
) -> Iterator[Demonstration]:
    """Plays the policy's episodes, and yields them in the order of their seeds."""
    found = saved(policy, trust=trust)
    if not found.acts:
        raise ConfigError(f"{policy} draws, it does not act: it can't demonstrate anything")
    actor = found.load()
    model = cast(ControlModel, actor.model)  # it acts
    require_fit(model, task)
    logs = [_Log() for _ in seeds]

    def watch(
        _slots: Sequence[int], playing: Sequence[int], seen: Context, action: Tensor, step: TaskStep
    ) -> None:
        for row, episode in enumerate(playing):
            logs[episode].add(seen, action, step, row)

    environments = guarded(task, name, min(SIDE_BY_SIDE, len(seeds)), model.history)
    try:
        noise = Noise.rows(seed, 0, torch.arange(len(seeds)), 1)
        written = 0
        for _ in play(actor, environments, seeds, noise, keep=(0, 0), watch=watch):
            while written < len(seeds) and logs[written].over:
                yield logs[written].demonstration()
                logs[written] = _Log()  # its frames are not needed any more
                written += 1
    finally:
        environments.close()


class _Log:
    """One episode of a policy as it happens, environment step by environment step."""

    def __init__(self) -> None:
        self.over = False
        self._success = False
        self._frames: list[Mapping[str, Tensor]] = []
        self._actions: list[Tensor] = []
        self._rewards: list[Tensor] = []

    def add(self, seen: Context, action: Tensor, step: TaskStep, row: int) -> None:
        """Adds one environment step: what row ``row`` saw last, did and got."""
        self._frames.append({name: value[row, -1] for name, value in seen.observation.items()})
        self._actions.append(action[row, 0])
        self._rewards.append(step.rewards[row, 0])
        self._success = bool(step.success[row])
        self.over = bool(step.terminated[row] | step.truncated[row])

    def demonstration(self) -> Demonstration:
        observation = {
            name: torch.stack([frame[name] for frame in self._frames]) for name in self._frames[0]
        }
        return Demonstration(
            observation, torch.stack(self._actions), torch.stack(self._rewards), self._success
        )
