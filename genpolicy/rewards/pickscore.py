"""PickScore: which picture people would pick for a prompt (Kirstain et al., arXiv 2305.01569).

    score = exp(logit_scale) * cos(E_picture(x), E_text(prompt))

with a CLIP ViT-H/14 that was trained on the choices of Pick-a-Pic's users. The unit is the logit,
as in the paper's own code (yuvalkirstain/PickScore): of two pictures for one prompt, the first is
picked with probability 1 / (1 + exp(score_2 - score_1)).

Flow-GRPO divides these logits by 26 (flow_grpo/pickscore_scorer.py:49) to bring them near 1. Here
they stay logits; the weight in `reward: {pickscore: 0.0384615}` gives its numbers.

The score is differentiable in the pictures: they are resized, cropped and normalised as float
tensors, with sizes, interpolation, mean and std from the processor. They differ from transformers'
PIL processor by its rounding: at most 1.1 of 255 levels, .3 on average, 0 where no resize is
needed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from genpolicy.config.errors import ConfigError, at_least
from genpolicy.contracts.task import Context
from genpolicy.rewards._pictures import centre_crop, normalise, resize, shortest_edge
from genpolicy.rewards.clip_score import brief, mean_cosine, require_repo


@dataclass
class PickScore:
    """PickScore in logits; see this file's header.

    Attributes:
        model: a repository or folder of a transformers CLIPModel. Default: the paper's weights,
            3.9 GB.
        processor: a repository or folder with its tokenizer and image processor. Default: the one
            that the paper's README names; PickScore is a fine-tune of that model.
        micro_batch: pictures (or frames, or prompts) in one forward pass; changes memory, not
            scores.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    micro_batch: int = 32

    def __post_init__(self) -> None:
        """Loads nothing yet."""
        at_least("pickscore", self, micro_batch=1)
        self._clip: torch.nn.Module | None = None
        self._device: torch.device | None = None

    def load(self) -> None:
        """Load weights and processor, once, in fp32."""
        if self._clip is not None:
            return
        from transformers import CLIPModel, CLIPProcessor

        for source in (self.processor, self.model):
            if not os.path.isdir(source):
                require_repo(source, "pickscore")
        try:
            processor = CLIPProcessor.from_pretrained(self.processor)
            # two values, because the report is asked for
            clip, report = CLIPModel.from_pretrained(  # type: ignore[misc]
                self.model, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:
            raise OSError(
                f"pickscore cannot load {self.model} with {self.processor}: {brief(error)}"
            ) from error
        if report["missing_keys"]:  # transformers only warns, and leaves them random
            missing = sorted(report["missing_keys"])
            raise ConfigError(
                f"{self.model} is no CLIPModel: it lacks {len(missing)} weights, such as"
                f" {missing[0]}."
            )
        self._images = processor.image_processor
        self._tokenize = processor.tokenizer
        self._clip = clip.eval().requires_grad_(False).to(self._device or "cpu")

    def to(self, device: torch.device | str) -> PickScore:
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
        like = self._images
        size = shortest_edge(pictures, like.size["shortest_edge"])
        sized = resize(pictures, size, Image.Resampling(like.resample).name.lower())
        cropped = centre_crop(
            sized, (like.crop_size["height"], like.crop_size["width"]), rounded=int
        )
        return normalise(cropped, like.image_mean, like.image_std)

    def __call__(self, outputs: Tensor, context: Context) -> Tensor:
        """exp(logit_scale) * cos for each picture and its prompt.

        Args:
            outputs: pictures [B, 3, H, W] or videos [B, F, 3, H, W], in [0, 1], on any device.
            context: `context.prompts`, B texts; those longer than the model's context (77 tokens)
                are cut.

        Returns:
            Float [B], in logits, on the device of `outputs`; differentiable in `outputs`.
        """
        if self._device is None:
            self.to(outputs.device)
        self.load()
        cosine = mean_cosine(
            outputs,
            context.prompts,
            self._encode_pictures,
            self._encode_texts,
            self._device,
            self.micro_batch,
        )
        return self._clip.logit_scale.exp().to(cosine.device) * cosine

    def _encode_pictures(self, pictures: Tensor) -> Tensor:
        return self._clip.get_image_features(self.preprocess(pictures)).pooler_output

    def _encode_texts(self, texts: list[str]) -> Tensor:
        tokens = self._tokenize(
            texts,
            padding=True,
            truncation=True,
            max_length=self._clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        return self._clip.get_text_features(**tokens).pooler_output
