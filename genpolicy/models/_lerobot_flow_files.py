"""A flow policy's files: the policy and its processors from a folder or the hub, and back into a
folder that moves.

SmolVLA's configuration names the VLM that its tokenizer and processor come from, and every
preprocessor names a tokenizer. Where such a name is a folder, what is in it is put beside the
weights, in `SHIPPED`, and found there on another machine.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from draccus.utils import DecodingError
from safetensors import SafetensorError
from torch import Tensor

from genpolicy.config.documents import json_file
from genpolicy.config.origin import Origin
from genpolicy.contracts.dataset import Dataset
from genpolicy.models import _lerobot as theirs
from genpolicy.models._lerobot_flow_families import FAMILIES
from genpolicy.models._lerobot_processors import Processors, load_processors, steady

SHIPPED = "vlm"
"""Folder inside a policy's: its tokenizer, of SmolVLA with the VLM's configuration and processor.
"""
UNSUPPORTED = ("use_relative_actions", "adapt_to_pi_aloha", "use_peft")
"""Settings that change what a chunk means, or what the weights are, behind the chain's back."""


@dataclass
class Files:
    """The place that a policy comes from.

    words: the tokenizer (of SmolVLA the VLM) to use instead of the one that the policy names.
    origin: of the section that names the folder.
    """

    folder: Path
    words: str | None
    device: torch.device
    origin: Origin

    @classmethod
    def find(
        cls,
        source: str,
        revision: str | None,
        tokenizer: str | None,
        device: torch.device,
        origin: Origin,
    ) -> "Files":
        """Raises with one sentence where there is no policy that lerobot_flow can be."""
        folder = theirs.find(source, revision, tuple(FAMILIES))
        settings = json_file(folder / theirs.CONFIG)
        for name in UNSUPPORTED:
            if settings.get(name):
                raise ValueError(
                    f"policy.pretrained {source} was trained with {name}, which lerobot_flow can't"
                    " undo; it needs absolute actions and whole weights"
                )
        shipped = folder / SHIPPED
        words = tokenizer or (str(shipped) if shipped.is_dir() else None)
        return cls(folder, words, device, origin)

    def policy(self) -> Any:
        """The policy in eval mode, verified. Its configuration is the file's; only while it is
        built, names are replaced, nothing is compiled and no other weights are fetched first.
        """
        settings: dict[str, Any] = {"compile_model": False}
        if json_file(self.folder / theirs.CONFIG)["type"] == "smolvla":
            settings["load_vlm_weights"] = False
            if self.words is not None:
                settings["vlm_model_name"] = self.words
        with self._explained(), _unwarned():
            return theirs.load(self.folder, self.device, renamed, **settings)

    def processors(self, config: Any) -> Processors:
        """The processors beside the policy."""
        with self._explained():
            processors = load_processors(
                config, self.folder, self.device, self.origin, **self._tokenizer()
            )
        return self._named(processors)

    def new_processors(self, config: Any, dataset: Dataset) -> Processors:
        """The processors beside the policy, with a data set's statistics in place of their own."""
        theirs.require_steps(self.folder, self.origin)
        with theirs.lerobot(), self._explained():
            from lerobot.policies.factory import make_pre_post_processors

            features = {**config.input_features, **config.output_features}
            names = [name for name in features if len(features[name].shape) == 1]
            normal = {
                "features": features,
                "norm_map": config.normalization_mapping,
                "stats": {name: steady(name, dataset.stats[name]) for name in names},
            }
            device = {"device_processor": {"device": str(self.device)}}
            pre, post = make_pre_post_processors(
                config,
                pretrained_path=str(self.folder),
                preprocessor_overrides={
                    **device,
                    "normalizer_processor": normal,
                    **self._tokenizer(),
                },
                postprocessor_overrides={"unnormalizer_processor": normal},
            )
        processors = Processors(pre, post)
        processors.require_statistics(str(self.folder))
        return self._named(processors)

    def _tokenizer(self) -> dict[str, Any]:
        return {} if self.words is None else {"tokenizer_processor": {"tokenizer_name": self.words}}

    def _named(self, processors: Processors) -> Processors:
        """Restores the tokenizer's name that the file has, under which the step is saved again."""
        step = tokenizer_step(processors)
        steps = json_file(self.folder / theirs.PREPROCESSOR)["steps"]
        self.local = Path(step.tokenizer_name).is_dir()
        (step.tokenizer_name,) = (
            saved["config"]["tokenizer_name"]
            for saved in steps
            if saved.get("registry_name") == "tokenizer_processor"
        )
        return processors

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raises in one sentence the errors of LeRobot and its libraries about files."""
        try:
            yield
        except (SafetensorError, RuntimeError, DecodingError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"policy.pretrained {self.folder} is damaged: {' '.join(str(error).split())}"
            ) from error
        except (OSError, ValueError) as error:
            # a step's error is wrapped
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            raise ValueError(
                f"policy.pretrained {self.folder}: the VLM or tokenizer it names can't be read; set"
                " policy.tokenizer to a local folder of it, or log in with a token (hf auth"
                f" login): {str(cause).strip().splitlines()[0]}"
            ) from error

    def save(self, policy: Any, processors: Processors, directory: Path) -> None:
        """Saves the policy as LeRobot does, with the names that it came with. What these name
        beside it is copied along if it came from a folder.
        """
        policy.save_pretrained(directory)
        processors.save(directory)
        if not self.local:
            return
        if policy.config.type == "smolvla":
            policy.model.vlm_with_expert.config.save_pretrained(directory / SHIPPED)
            policy.model.vlm_with_expert.processor.save_pretrained(directory / SHIPPED)
        else:
            tokenizer_step(processors).input_tokenizer.save_pretrained(directory / SHIPPED)


@contextmanager
def _unwarned() -> Iterator[None]:
    """LeRobot warns of names that it then handles."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def tokenizer_step(processors: Processors) -> Any:
    """The step that turns the instruction into tokens."""
    from lerobot.processor import TokenizerProcessorStep

    (step,) = (step for step in processors.pre.steps if isinstance(step, TokenizerProcessorStep))
    return step


def renamed(policy: Any, weights: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """A file's weights under the policy's names: the original pi checkpoints have other ones."""
    rename = getattr(policy, "_fix_pytorch_state_dict_keys", lambda weights, _: weights)
    fixed = rename(weights, policy.config)
    return {
        name if name.startswith("model.") else f"model.{name}": value
        for name, value in fixed.items()
    }
