"""The files and features of LeRobot's policies, which their adapters share: finding a policy,
loading and verifying it, and describing to LeRobot what a data set has.

LeRobot is imported inside the functions: it takes seconds, and it is an extra.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from genpolicy.config.documents import json_file
from genpolicy.config.origin import Origin
from genpolicy.models._remote_code import unasked

STATE = "observation.state"
"""LeRobot's name of the robot's own state."""
WORLD = "observation.environment_state"
"""LeRobot's name of the state of everything else."""
CAMERA = "observation.image"
"""The beginning of LeRobot's name of every camera."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"

STEPS = (
    "absolute_actions_processor",
    "device_processor",
    "normalizer_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "pi0_new_line_processor",
    "relative_actions_processor",
    "rename_observations_processor",
    "smolvla_new_line_processor",
    "to_batch_processor",
    "tokenizer_processor",
    "unnormalizer_processor",
)
"""The steps, by their registered names, that LeRobot's processors of these policies are made of."""

Renamed = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]
"""(policy, a file's tensors) -> the same tensors under the policy's own names."""


@contextlib.contextmanager
def lerobot() -> Any:
    """Speak to LeRobot: without its prints, without a question whether to run the code that lies
    beside a tokenizer (the answer is no), and with one sentence where it is missing.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), unasked():
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
                f"policy.pretrained {pretrained} has no {file}: LeRobot before 0.4 made it;"
                " convert it with lerobot.processor.migrate_policy_normalization"
            )
    settings = json_file(folder / CONFIG)
    kind = settings.get("type") if isinstance(settings, dict) else None
    if kind not in kinds:
        raise ValueError(
            f"policy.pretrained {pretrained} is a LeRobot policy of type {kind}; valid here:"
            f" {', '.join(kinds)}"
        )
    return folder


def require_steps(folder: Path, origin: Origin) -> None:
    """Raises where a processor beside a policy has a step that is not one of `STEPS`, and the
    folder's ``origin`` may not import it: LeRobot calls any class that a step names, and some of
    its own steps run the code that they find beside a tokenizer.
    """
    for file in (PREPROCESSOR, POSTPROCESSOR):
        document = json_file(folder / file)
        steps = document.get("steps") if isinstance(document, dict) else None
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise ValueError(f"{folder / file} is damaged: it must hold a list of steps")
        for step in steps:
            if step.get("registry_name") not in STEPS:
                named = step.get("registry_name", step.get("class"))
                origin.reached(folder / file).admit(str(named), "step")


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
    # the hub's own errors are OSErrors, those of a missing cache ValueErrors
    except (OSError, ValueError) as error:
        raise OSError(
            f"policy.pretrained {pretrained}: no such folder, and the hub repository can't be read"
            " (it is unreachable, gated or misspelt); log in with a token (hf auth login) or give"
            " a local folder"
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
        name
        for name, value in saved.items()
        if name in state and not torch.equal(value.to(state[name].dtype), state[name].cpu())
    ]
    for names, what in (
        (lost, "are not in the file"),
        (foreign, "are unknown to the policy"),
        (wrong, "were not loaded"),
    ):
        if names:
            raise ValueError(
                f"policy.pretrained {folder}: {len(names)} of the weights ({names[0]}, ...)"
                f" {what}; LeRobot would act with random ones"
            )


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
