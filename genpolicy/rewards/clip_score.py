"""CLIPScore: how well a picture fits its prompt (Hessel et al., arXiv 2104.08718), with open_clip's
models.

    score = scale * cos(E_picture(x), E_text(prompt))

where E is a CLIP embedding, L2-normalised. The unit is the cosine, in [-1, 1] at scale 1. Others'
numbers:

- Hessel et al.: 2.5 * max(cos, 0), ViT-B/32, prefix "A photo depicts"; `scale: 2.5`, here neither
clipped
  (where it clips there is no gradient) nor prefixed.
- Flow-GRPO: logits / 30, which is 3.33 cos, with OpenAI's ViT-L/14;
  `model: ViT-L-14, pretrained: openai, scale: 3.3333`.

The score is differentiable in the pictures: they are resized, cropped and normalised as float
tensors, with size, interpolation, mean and std from open_clip's own configuration of the
checkpoint. They differ from its transform of an 8-bit PIL picture by that one's rounding: at most
1.1 of 255 levels, .3 on average, 0 where no resize is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from genpolicy.config.documents import json_file
from genpolicy.config.errors import ConfigError, at_least, choice
from genpolicy.contracts.task import Context
from genpolicy.models._remote_code import unasked
from genpolicy.rewards._pictures import centre_crop, normalise, resize, shortest_edge


def mean_cosine(
    outputs: Tensor,
    prompts: Sequence[str],
    encode_pictures: Callable[[Tensor], Tensor],
    encode_texts: Callable[[list[str]], Tensor],
    device: torch.device | str,
    micro_batch: int,
) -> Tensor:
    """Cosine of each picture's and its prompt's embedding; for a video the mean over its frames.

    In fp32, also under autocast. A prompt that a whole group shares is encoded once.

    Args:
        outputs: pictures [B, 3, H, W] or videos [B, F, 3, H, W], in [0, 1], on any device.
        prompts: B texts.
        encode_pictures: [M, 3, H, W] -> embeddings [M, D], not yet normalised.
        encode_texts: M texts -> embeddings [M, D], not yet normalised.
        device: where the encoders are.
        micro_batch: largest M in one call of an encoder.

    Returns:
        Float [B] in [-1, 1], on the device of `outputs`.
    """
    if outputs.ndim not in (4, 5) or outputs.shape[-3] != 3:
        raise ValueError(
            f"pictures must be [B, 3, H, W] or [B, F, 3, H, W], not {list(outputs.shape)}."
        )
    if len(prompts) != len(outputs):
        raise ValueError(
            f"{len(outputs)} pictures but {len(prompts)} prompts: one prompt per picture is needed."
        )
    texts = list(dict.fromkeys(prompts))
    rows = [texts.index(prompt) for prompt in prompts]
    chunks = [texts[i : i + micro_batch] for i in range(0, len(texts), micro_batch)]
    frames = outputs.flatten(0, -4)
    with torch.autocast(torch.device(device).type, enabled=False):
        text = torch.cat([functional.normalize(encode_texts(chunk), dim=-1) for chunk in chunks])[
            rows
        ]
        picture = torch.cat(
            [
                functional.normalize(encode_pictures(chunk.to(device).float()), dim=-1)
                for chunk in frames.split(micro_batch)
            ]
        )
        cosine = (picture.view(len(text), -1, text.shape[-1]) * text[:, None]).sum(-1)
    return cosine.mean(1).to(outputs.device)


def require_repo(repo: str, needed_by: str) -> None:
    """Raises `OSError` with the reason unless `repo` is in the local cache or the model hub answers
    for it.

    Asked first, because the libraries themselves retry for minutes, file by file, before they give
    up.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        snapshot_download(repo, local_files_only=True)
    # not in the cache; no name of a repository, but of a missing path
    except (FileNotFoundError, ValueError):
        try:
            HfApi().model_info(repo, timeout=10)
        # httpx's own or the hub's: no network, offline mode, no such repository
        except Exception as error:
            raise OSError(
                f"{needed_by} needs {repo}, which is not on this machine and cannot be fetched;"
                " fetch it where there is a network, or give a local path"
                f" ({type(error).__name__}: {brief(error)})"
            ) from error


def brief(error: Exception) -> str:
    """A library's message on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]


@dataclass
class ClipScore:
    """Cosine of the CLIP embeddings of picture and prompt, times `scale`; see this file's header.

    Attributes:
        model: an architecture of `open_clip.list_models()`, or open_clip's "hf-hub:ORG/REPO" or
            "local-dir:FOLDER" (a folder with open_clip_config.json and weights). Default: LAION's
            ViT-B/32.
        pretrained: a tag of `open_clip.list_pretrained()` for that model, or the path of a
            checkpoint file; unused with "hf-hub:" and "local-dir:", which bring their weights. A
            bare file does not say how its pictures were normalised: open_clip then takes OpenAI's
            mean and std, which are LAION's too; for a model with others (SigLIP) use "local-dir:".
        scale: factor on the cosine; 1 leaves it in [-1, 1].
        micro_batch: pictures (or frames, or prompts) in one forward pass; changes memory, not
            scores.
    """

    model: str = "ViT-B-32"
    pretrained: str = "laion2b_s34b_b79k"
    scale: float = 1.0
    micro_batch: int = 64

    def __post_init__(self) -> None:
        """Loads nothing yet."""
        at_least("clip_score", self, micro_batch=1)
        self._clip: torch.nn.Module | None = None
        self._device: torch.device | None = None

    def load(self) -> None:
        """Load weights, tokenizer and transform, once."""
        if self._clip is not None:
            return
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError(
                "clip_score needs open_clip: pip install genpolicy[rewards]"
            ) from error
        schema, repo = open_clip.factory.parse_model_name(self.model)
        tag = _tag(open_clip, self.model, self.pretrained) if schema is None else {}
        if schema is None:
            repo = tag.get("hf_hub", "").rpartition("/")[0]
        if repo and schema != "local-dir":
            require_repo(repo, "clip_score")
        try:
            _require_no_code(open_clip, self.model)
            with unasked():
                clip = open_clip.create_model_from_pretrained(
                    self.model,
                    pretrained=self.pretrained if schema is None else None,
                    # open_clip itself only warns of the wrong one
                    force_quick_gelu=tag.get("quick_gelu", False),
                    return_transform=False,
                )
                self._tokenize = open_clip.get_tokenizer(self.model)
        except Exception as error:
            source = self.model if schema else f"{self.model} from {self.pretrained}"
            raise OSError(f"clip_score cannot load {source}: {brief(error)}") from error
        self._config = clip.visual.preprocess_cfg
        size = self._config["size"]
        fit = self._config["resize_mode"]
        self._size = (size, size) if isinstance(size, int) else tuple(size)
        if fit != "squash" and (fit != "shortest" or self._size[0] != self._size[1]):
            raise ConfigError(
                f"clip_score cannot fit pictures as {self.model} asks: {fit} edge to {self._size}."
            )
        self._clip = clip.eval().requires_grad_(False).to(self._device or "cpu")

    def to(self, device: torch.device | str) -> ClipScore:
        """Move the weights, now or when they are loaded; without it they go where the first
        pictures are.
        """
        self._device = torch.device(device)
        if self._clip is not None:
            self._clip.to(device)
        return self

    def preprocess(self, pictures: Tensor) -> Tensor:
        """Pictures [M, 3, H, W] in [0, 1] as the model takes them: resized, cropped, normalised."""
        self.load()
        squash = self._config["resize_mode"] == "squash"
        size = self._size if squash else shortest_edge(pictures, self._size[0])
        pictures = centre_crop(resize(pictures, size, self._config["interpolation"]), self._size)
        return normalise(pictures, self._config["mean"], self._config["std"])

    def __call__(self, outputs: Tensor, context: Context) -> Tensor:
        """scale * cos for each picture and its prompt.

        Args:
            outputs: pictures [B, 3, H, W] or videos [B, F, 3, H, W], in [0, 1], on any device.
            context: `context.prompts`, B texts; those longer than the model's context are cut.

        Returns:
            Float [B] on the device of `outputs`; differentiable in `outputs`.
        """
        if self._device is None:
            self.to(outputs.device)
        self.load()
        cosine = mean_cosine(
            outputs,
            context.prompts,
            lambda pictures: self._clip.encode_image(self.preprocess(pictures)),
            lambda texts: self._clip.encode_text(self._tokenize(texts).to(self._device)),
            self._device,
            self.micro_batch,
        )
        return self.scale * cosine


def _require_no_code(open_clip: Any, model: str) -> None:
    """Raises where the configuration of a folder or a hub repository asks that the code beside its
    tokenizer be run.
    """
    schema, name = open_clip.factory.parse_model_name(model)
    if schema == "local-dir":
        config = json_file(Path(name) / "open_clip_config.json")
    elif schema is not None:
        config = open_clip.factory._get_hf_config(name)
    else:
        return
    asked = config["model_cfg"].get("text_cfg", {}).get("tokenizer_kwargs", {})
    if asked.get("trust_remote_code"):
        raise ConfigError("its tokenizer comes with code (trust_remote_code), which is never run")


def _tag(open_clip: Any, model: str, pretrained: str) -> dict[str, Any]:
    """open_clip's entry for a tag, {} for a checkpoint file; for anything else an error with the
    nearest.
    """
    choice("clip_score: model", model, open_clip.list_models())
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if not tag and not os.path.isfile(pretrained):
        choice(
            "clip_score: pretrained (a tag or a file)",
            pretrained,
            open_clip.list_pretrained_tags_by_model(model),
        )
    return tag
