"""LeRobot's processors of a policy: observations and actions normalised as LeRobot does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.config.origin import Origin
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import Context
from genpolicy.models._lerobot import lerobot, require_steps
from genpolicy.models._observed import observed

STATISTICS = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99")}
"""The statistics that each of LeRobot's ways to normalise needs."""
STILL = 1e-4
"""A dim that moves less than this in the data stood still."""
REACH_FLOOR = 1e-3
"""Least half range of an action dim, in the environment's units."""


@dataclass(frozen=True)
class Processors:
    """LeRobot's own way from what is seen to what the network is shown, and from its actions to the
    environment's.
    """

    pre: Any
    post: Any

    def observe(
        self, context: Context, history: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any]:
        """The batch that LeRobot's policies are given: normalised observations [B,history,*shape],
        and what its other steps add (tokens of the instruction).
        """
        batch: dict[str, Any] = {"task": list(context.prompts)}
        for name, shape in shapes.items():
            batch[name] = observed(context, name, (history, *shape))
        with lerobot():
            return self.pre(batch)

    def observations(
        self, standard: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The observations [B,history,*shape] whose normalised values are ``standard``: every way
        to normalise a vector is affine, and is read off at 0 and at 1. Pictures are taken as they
        are.
        """
        ends = []
        for end in (0.0, 1.0):
            row = {name: torch.full((1, 1, *shape), end) for name, shape in shapes.items()}
            ends.append(self.observe(Context([""], row), 1, shapes))
        found = dict(standard)
        for name, shape in shapes.items():
            if name in standard and len(shape) == 1:
                low, high = (end[name].reshape(shape) for end in ends)
                found[name] = (standard[name] - low) / (high - low)
        return found

    def event(self, actions: Tensor) -> Tensor:
        """Actions [B,T,D] as the network is trained on them."""
        from lerobot.processor import NormalizerProcessorStep
        from lerobot.processor.converters import create_transition
        from lerobot.utils.constants import ACTION

        (step,) = (step for step in self.pre.steps if isinstance(step, NormalizerProcessorStep))
        return step(create_transition(action=actions))[ACTION]

    def actions(self, event: Tensor) -> Tensor:
        """The inverse: [B,T,D] in the environment's units, on the CPU."""
        return self.post(event.float())

    def require_statistics(self, pretrained: str) -> None:
        """Raise where statistics are missing: LeRobot then passes values through as they are, and
        says nothing.
        """
        for step in (*self.pre.steps, *self.post.steps):
            for name, feature in getattr(step, "features", {}).items():
                way = step.norm_map.get(feature.type)
                for statistic in STATISTICS.get(way.name if way is not None else "", ()):
                    if statistic not in (step.stats or {}).get(name, {}):
                        raise ValueError(
                            f"policy.pretrained {pretrained} has no statistic {statistic} of"
                            f" {name}, which it normalises by {way.name}; give the policy the"
                            " statistics of its data set"
                        )

    def save(self, directory: Path) -> None:
        """Beside the policy, where LeRobot's tools look for them."""
        self.pre.save_pretrained(directory)
        self.post.save_pretrained(directory)


def load_processors(
    config: Any, folder: Path, device: torch.device, origin: Origin, **overrides: Mapping[str, Any]
) -> Processors:
    """The processors saved beside a policy, on ``device``; ``overrides`` are settings of the
    preprocessor's steps by their registered names, ``origin`` says what they may import.
    """
    require_steps(folder, origin)
    with lerobot():
        from lerobot.policies.factory import make_pre_post_processors

        steps = {"device_processor": {"device": str(device)}, **overrides}
        pre, post = make_pre_post_processors(
            config, pretrained_path=str(folder), preprocessor_overrides=steps
        )
    processors = Processors(pre, post)
    processors.require_statistics(str(folder))
    return processors


def make_processors(config: Any, dataset: Dataset) -> Processors:
    """Fresh processors of a policy that is to learn from ``dataset``."""
    with lerobot():
        from lerobot.policies.factory import make_pre_post_processors

        names = (*config.input_features, *config.output_features)
        stats = {name: steady(name, dataset.stats[name]) for name in names}
        stats |= {name: _imagenet() for name in config.image_features}
        processors = Processors(*make_pre_post_processors(config, dataset_stats=stats))
    processors.require_statistics("(new)")
    return processors


def steady(name: str, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics by which a dim that stood still in the data is only shifted: LeRobot divides by
    1e-8 there, so that the slightest movement later becomes an enormous number. An action that
    never moved may hardly move.
    """
    reach = REACH_FLOOR if name == "action" else 1.0
    fixed = {statistic: value.float().clone() for statistic, value in stats.items()}
    for low, high in (("min", "max"), ("q01", "q99")):
        if low in fixed and high in fixed:
            still = fixed[high] - fixed[low] < STILL
            middle = (fixed[high] + fixed[low]) / 2
            fixed[low] = torch.where(still, middle - reach, fixed[low])
            fixed[high] = torch.where(still, middle + reach, fixed[high])
    if "std" in fixed:
        fixed["std"] = torch.where(fixed["std"] < STILL, reach, fixed["std"])
    return fixed


def _imagenet() -> dict[str, Tensor]:
    """The statistics by which lerobot-train normalises every camera, whatever the pictures."""
    from lerobot.utils.constants import IMAGENET_STATS

    return {statistic: torch.tensor(value) for statistic, value in IMAGENET_STATS.items()}
