"""What the adapters of LeRobot's policies share: finding and verifying them, their processors, and
their observations.

LeRobot is imported inside the functions: it takes seconds, and it is an extra.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import Context

STATE, WORLD, CAMERA = "observation.state", "observation.environment_state", "observation.image"
"""LeRobot's names: the robot, everything else, and how every camera's begins."""
CONFIG, WEIGHTS, PREPROCESSOR, POSTPROCESSOR = (
    "config.json",
    "model.safetensors",
    "policy_preprocessor.json",
    "policy_postprocessor.json",
)
STATISTICS = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99")}
"""What each of LeRobot's ways to normalise needs to know."""
STILL = 1e-4
"""A dim that moves less than this in the data stood still."""
REACH_FLOOR = 1e-3
"""Least half range of an action dim, in the environment's units."""

Renamed = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]
"""(policy, a file's tensors) -> the same tensors under the policy's own names."""


@contextlib.contextmanager
def lerobot() -> Any:
    """Speak to LeRobot: without its prints, and with one sentence where it is missing."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ImportError as error:
        raise ValueError(
            f"LeRobot policies need lerobot ({error}): pip install genpolicy[robots]"
        ) from error


def find(pretrained: str, revision: str | None, kinds: Sequence[str]) -> Path:
    """The folder of a saved LeRobot policy of one of ``kinds``; a hub id is downloaded."""
    folder = Path(pretrained)
    if not folder.is_dir():
        folder = _download(pretrained, revision)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"policy.pretrained {pretrained} is no saved LeRobot policy: it has no {file}"
            )
    for file in (PREPROCESSOR, POSTPROCESSOR):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"policy.pretrained {pretrained} has no {file}: LeRobot before 0.4 made it; convert it with "
                "lerobot.processor.migrate_policy_normalization"
            )
    kind = json.loads((folder / CONFIG).read_text()).get("type")
    if kind not in kinds:
        raise ValueError(
            f"policy.pretrained {pretrained} is a LeRobot policy of type {kind}; valid here: {', '.join(kinds)}"
        )
    return folder


def _download(pretrained: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    if Path(pretrained).is_absolute() or pretrained.count("/") != 1:
        raise FileNotFoundError(
            f"policy.pretrained {pretrained}: no such folder, and no hub id (owner/name) either"
        )
    try:
        return Path(
            snapshot_download(
                pretrained, revision=revision, allow_patterns=["*.json", "*.safetensors"]
            )
        )
    except (
        OSError,
        ValueError,
    ) as error:  # the hub's own errors are OSErrors, those of a missing cache ValueErrors
        raise OSError(
            f"policy.pretrained {pretrained}: no such folder, and the hub repository can't be read (it is unreachable,"
            " gated or misspelt); log in with a token (hf auth login) or give a local folder"
        ) from error


def load(
    folder: Path, device: torch.device, renamed: Renamed | None = None, **settings: Any
) -> Any:
    """The policy of a folder, in eval mode, its weights compared with the file's.

    ``settings`` replace fields of its config while it is built (what would download something, for
    example); it keeps its own ones after.
    """
    with lerobot():
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class

        config = PreTrainedConfig.from_pretrained(folder, cli_overrides=[f"--device={device}"])
        own = {name: getattr(config, name) for name in settings}
        for name, value in settings.items():
            setattr(config, name, value)
        policy = get_policy_class(config.type).from_pretrained(folder, config=config)
        for name, value in own.items():
            setattr(policy.config, name, value)
    saved = load_file(folder / WEIGHTS)
    verify(policy, saved if renamed is None else renamed(policy, saved), folder)
    return policy.to(device).eval()


def verify(policy: torch.nn.Module, saved: Mapping[str, Tensor], folder: Path) -> None:
    """Raise unless the policy's weights are the saved ones: LeRobot prints what fails to load and
    goes on with random weights. Weights that share their memory are saved under one of their names.
    """
    state = policy.state_dict()
    there = {state[name].data_ptr() for name in saved if name in state}
    lost = [
        name for name, value in state.items() if name not in saved and value.data_ptr() not in there
    ]
    foreign = [name for name in saved if name not in state]
    wrong = [
        n
        for n, v in saved.items()
        if n in state and not torch.equal(v.to(state[n].dtype), state[n].cpu())
    ]
    for names, what in (
        (lost, "are not in the file"),
        (foreign, "are unknown to the policy"),
        (wrong, "were not loaded"),
    ):
        if names:
            raise ValueError(
                f"policy.pretrained {folder}: {len(names)} of the weights ({names[0]}, ...) {what}; LeRobot would act with"
                " random ones"
            )


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
            seen = context.observation.get(name)
            if seen is None or seen.shape[1:] != (history, *shape):
                got = "is missing" if seen is None else f"comes as {list(seen.shape[1:])}"
                raise ValueError(
                    f"observation {name} {got}; this policy needs {[history, *shape]} of every row"
                )
            batch[name] = seen
        with lerobot():
            return self.pre(batch)

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
                            f"policy.pretrained {pretrained} has no statistic {statistic} of {name}, which it normalises by"
                            f" {way.name}; give the policy the statistics of its data set"
                        )

    def save(self, directory: Path) -> None:
        """Beside the policy, where LeRobot's tools look for them."""
        self.pre.save_pretrained(directory)
        self.post.save_pretrained(directory)


def load_processors(
    config: Any, folder: Path, device: torch.device, **overrides: Mapping[str, Any]
) -> Processors:
    """The processors saved beside a policy, on ``device``; ``overrides`` are settings of the
    preprocessor's steps by their registered names.
    """
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
    """What lerobot-train normalises every camera by, whatever the pictures."""
    from lerobot.utils.constants import IMAGENET_STATS

    return {statistic: torch.tensor(value) for statistic, value in IMAGENET_STATS.items()}


def features(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> dict[str, Any]:
    """LeRobot's description of what a policy sees or does."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    def kind(name: str) -> FeatureType:
        if name == "action":
            return FeatureType.ACTION
        if name == WORLD:
            return FeatureType.ENV
        return FeatureType.VISUAL if name.startswith(CAMERA) else FeatureType.STATE

    return {name: PolicyFeature(type=kind(name), shape=tuple(shapes[name])) for name in names}
