"""Records an expert's episode, with noise on what it does."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from genpolicy.contracts.task import Demonstration, TaskError
from genpolicy.tasks._environments import raw
from genpolicy.tasks._slots import Frame, Simulation


def record(
    simulation: Simulation,
    expert: Callable[[Frame], np.ndarray],
    seed: int,
    limit: int,
    std: Any = 0.0,
) -> Demonstration:
    """Plays ``expert`` from this seed until success, the episode's end or ``limit`` steps. Raises
    `TaskError` where the simulation's reward or observation is not finite.

    Its action is clipped to the action space, given Gaussian noise of ``std`` (a number, or one
    per action dimension; a pure function of the seed), clipped again, and recorded as executed.
    """
    low, high = simulation.action_space.low, simulation.action_space.high
    noise = np.random.Generator(np.random.Philox(key=seed))
    frame, _ = simulation.reset(seed=seed)
    frames, actions, rewards = [], [], []
    over = success = False
    while not over and not success and len(actions) < limit:
        wanted = np.clip(expert(frame), low, high) + std * noise.standard_normal(low.shape)
        frames.append(frame)
        actions.append(wanted.clip(low, high).astype(np.float32))
        frame, reward, terminated, truncated, info = simulation.step(actions[-1])
        rewards.append(reward)
        for name, value in {"its reward": reward, **frame}.items():
            if not np.isfinite(value).all():
                raise TaskError(
                    f"step {len(actions)} of the episode from reset seed {seed}: {name} is not"
                    " finite; rewards and observations must be"
                )
        over = terminated or truncated
        success = bool(info["success"])
    return Demonstration(
        {name: raw(np.array([seen[name] for seen in frames])) for name in frames[0]},
        torch.from_numpy(np.array(actions)),
        torch.tensor(rewards, dtype=torch.float32),
        success,
    )
