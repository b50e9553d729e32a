"""A LeRobot flow policy and its processors from a folder or the hub, verified: what was loaded is what was saved.

LeRobot itself may print and go on with random weights (pi0, pi0.5), skips keys that do not fit (SmolVLA), and leaves an
observation without statistics as it is.
"""

import contextlib
import copy
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.processor import NormalizerProcessorStep, TokenizerProcessorStep, UnnormalizerProcessorStep
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genpolicy.models._lerobot_flow_families import FAMILIES

WEIGHTS, SETTINGS = "model.safetensors", "config.json"
SHIPPED = "vlm"
"""Folder inside a saved policy: the tokenizer (SmolVLA: and the VLM's configuration and processor) it was built with."""
STATISTICS = {
    NormalizationMode.IDENTITY: (),
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
SAMPLED = 64
"""Values compared of each weight, evenly spaced."""


@dataclass
class Loaded:
    """A policy, its two processors, and what its files say of where the VLM and the tokenizer come from.

    ``config`` is as it was saved; the policy's own runs on this device, from names that exist here.
    """

    policy: Any
    pre: Any
    post: Any
    config: Any
    shipped: bool

    def save(self, directory: Path) -> None:
        """As LeRobot saves it, with the names it came with; what came from a folder is put beside it."""
        live, self.policy.config = self.policy.config, self.config
        try:
            self.policy.save_pretrained(directory)
        finally:
            self.policy.config = live
        for processor in (self.pre, self.post):
            processor.save_pretrained(directory)
        if self.shipped and hasattr(self.policy.model, "vlm_with_expert"):
            self.policy.model.vlm_with_expert.config.save_pretrained(directory / SHIPPED)
            self.policy.model.vlm_with_expert.processor.save_pretrained(directory / SHIPPED)
        elif self.shipped:
            _tokenizer(self.pre).input_tokenizer.save_pretrained(directory / SHIPPED)


    def fit(self, inputs: Mapping[str, tuple[int, ...]], action: tuple[int, ...], stats: Mapping[str, Any]) -> None:
        """Take other shapes, and statistics to normalise states and actions with."""
        kinds = {name: FeatureType.VISUAL if len(shape) == 3 else FeatureType.STATE for name, shape in inputs.items()}
        seen = {name: PolicyFeature(kinds[name], shape) for name, shape in inputs.items()}
        done = {"action": PolicyFeature(FeatureType.ACTION, action)}
        for config in (self.config, self.policy.config):
            config.input_features, config.output_features = dict(seen), dict(done)
        vectors = {name: stats[name] for name, kind in {**kinds, "action": None}.items() if kind != FeatureType.VISUAL}
        norms = {FeatureType(name): mode for name, mode in self.config.normalization_mapping.items()}
        for processor, kind in ((self.pre, NormalizerProcessorStep), (self.post, UnnormalizerProcessorStep)):
            fresh = kind(features={**seen, **done}, norm_map=norms, stats=dict(vectors), device=self.policy.config.device)
            processor.steps = [fresh if isinstance(step, kind) else step for step in processor.steps]


def load(pretrained: str, revision: str | None, tokenizer: str | None, device: torch.device) -> Loaded:
    """The policy in ``pretrained`` on ``device``. Every complaint is one sentence."""
    folder = _folder(pretrained, revision)
    own = folder / SHIPPED if (folder / SHIPPED).is_dir() else None
    with _quiet(), _explained(pretrained):
        config = _config(folder, pretrained)
        recorded = copy.deepcopy(config)
        config.device, config.compile_model = str(device), False
        words = tokenizer or (None if own is None else str(own))
        if config.type == "smolvla":
            # its weights are in the checkpoint: the VLM is needed by name only for its configuration and processor
            config.vlm_model_name = words or config.vlm_model_name
            config.load_vlm_weights = False
        policy = get_policy_class(config.type).from_pretrained(folder, config=config)
        verify(policy, folder / WEIGHTS, pretrained)
        if hasattr(policy.model, "paligemma_with_expert"):  # as its own sampler does before it encodes a prefix
            vlm = policy.model.paligemma_with_expert.paligemma.model.language_model
            vlm.config._attn_implementation = "eager"
        steps: dict[str, Any] = {"device_processor": {"device": str(device)}}
        if words is not None:
            steps["tokenizer_processor"] = {"tokenizer_name": words}
        pre, post = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=steps)
    step = _tokenizer(pre)
    shipped = Path(step.tokenizer_name).is_dir()
    step.tokenizer_name = _recorded_tokenizer(folder)
    return Loaded(policy, pre, post, recorded, shipped)


def _folder(pretrained: str, revision: str | None) -> Path:
    """A local policy's folder; of the hub's, a download of all that is not an optimizer's."""
    folder = Path(pretrained)
    if folder.is_dir():
        for name in (SETTINGS, WEIGHTS, "policy_preprocessor.json", "policy_postprocessor.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"policy.pretrained {pretrained} is no LeRobot policy: it has no {name}")
        return folder
    if folder.is_absolute() or pretrained.count("/") != 1:
        raise FileNotFoundError(f"policy.pretrained {pretrained}: no such folder, and no hub id (owner/name) either")
    try:
        return Path(snapshot_download(pretrained, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise OSError(
            f"policy.pretrained {pretrained}: no such folder, and the hub repository can't be read (it is"
            " unreachable, gated or misspelt); log in with a token (hf auth login) or give a local folder"
        ) from error


def _config(folder: Path, pretrained: str) -> Any:
    """The policy's configuration, refused where its chain would not be the one that is sampled here."""
    kind = json.loads((folder / SETTINGS).read_text()).get("type")
    if kind not in FAMILIES:
        raise ValueError(
            f"policy.pretrained {pretrained} is a LeRobot policy of type {kind!r};"
            f" lerobot_flow takes {', '.join(FAMILIES)}"
        )
    config = PreTrainedConfig.from_pretrained(folder)
    for name in ("use_relative_actions", "adapt_to_pi_aloha", "use_peft"):
        if getattr(config, name, False):
            raise ValueError(
                f"policy.pretrained {pretrained} was trained with {name}, which lerobot_flow can't undo;"
                " use a checkpoint of absolute actions and whole weights"
            )
    return config


def verify(policy: torch.nn.Module, file: Path, pretrained: str) -> None:
    """Raise unless every weight of ``policy`` is in ``file`` with the value it has (`SAMPLED` numbers of each)."""
    own = policy.state_dict()
    held: set[int] = set()
    wrong: list[str] = []
    for name, stored in _stored(policy, file):
        known = next((key for key in (name, f"model.{name}") if key in own), None)
        if known is None:
            continue
        held.add(own[known].data_ptr())
        if not _same(own[known], stored):
            wrong.append(known)
    wrong += [name for name, value in own.items() if value.numel() and value.data_ptr() not in held]
    if wrong:
        raise ValueError(
            f"policy.pretrained {pretrained}: {len(wrong)} of {len(own)} weights are not what its {WEIGHTS} holds"
            f" (the first is {wrong[0]}): file and {SETTINGS} do not fit"
        )


def _stored(policy: Any, file: Path) -> Iterator[tuple[str, Tensor]]:
    """The file's weights, one at a time, by the names that LeRobot gives those of the original pi checkpoints."""
    rename = getattr(policy, "_fix_pytorch_state_dict_keys", lambda weights, _: weights)
    with safe_open(file, "pt") as weights:
        for name in weights.keys():
            yield from rename({name: weights.get_tensor(name)}, policy.config).items()


def _same(own: Tensor, stored: Tensor) -> bool:
    if own.shape != stored.shape:
        return False
    stride = max(1, own.numel() // SAMPLED)
    picked, expected = own.flatten()[::stride].cpu(), stored.flatten()[::stride]
    return torch.equal(picked, expected.to(picked.dtype))


def check_statistics(loaded: Loaded, pretrained: str) -> None:
    """Raise unless both processors have the statistics that their normalisation needs."""
    seen, done = loaded.config.input_features, loaded.config.output_features
    for processor, kind, needed in (
        (loaded.pre, NormalizerProcessorStep, {**seen, **done}),
        (loaded.post, UnnormalizerProcessorStep, done),
    ):
        step = next((s for s in processor.steps if isinstance(s, kind)), None)
        if step is None:
            raise ValueError(f"policy.pretrained {pretrained}: its processors have no {kind.__name__}")
        held = step.state_dict()
        for name, feature in needed.items():
            mode = step.norm_map.get(feature.type, NormalizationMode.IDENTITY)
            missing = [statistic for statistic in STATISTICS[mode] if f"{name}.{statistic}" not in held]
            if missing:
                raise ValueError(
                    f"policy.pretrained {pretrained} has no {' and '.join(missing)} of {name}: it was saved before it"
                    " saw data; fine-tune it with lerobot-train, or give it as policy.base and clone a data set"
                )


def _tokenizer(pre: Any) -> Any:
    return next(step for step in pre.steps if isinstance(step, TokenizerProcessorStep))


def _recorded_tokenizer(folder: Path) -> str:
    steps = json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
    return next(s["config"]["tokenizer_name"] for s in steps if s.get("registry_name") == "tokenizer_processor")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LeRobot and its networks print what they do."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _explained(pretrained: str) -> Iterator[None]:
    """What goes wrong inside LeRobot, as one sentence; our own sentences pass."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"policy.pretrained {pretrained}: its {WEIGHTS} is damaged: {_first_line(error)}") from error
    except OSError as error:
        raise ValueError(
            f"policy.pretrained {pretrained}: its VLM or tokenizer can't be read; log in with a token (hf auth login)"
            f" or set policy.tokenizer to a local folder: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
