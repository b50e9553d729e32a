"""A pipeline's own text encoders, asked through its call, which knows their arguments."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from genpolicy.models._diffusers_call import PipelineCall
from genpolicy.models._diffusers_parts import Parts
from genpolicy.models._diffusers_prompts import Entry


@dataclass(frozen=True)
class TextEncoders:
    """The ``encode_prompt`` of a pipeline with the arguments that its own call passes."""

    call: PipelineCall
    parts: Parts

    def positive(self, prompts: list[str]) -> Entry:
        """Encodes prompts without guidance. Raises `ValueError` where the call asks for it."""
        entry = self._encode(prompts)
        if getattr(self.call.pipeline, "do_classifier_free_guidance", False):
            raise ValueError(
                "guidance is the chain's on this pipeline; set chain.guidance, not guidance_scale"
            )
        return entry

    def negative(self, prompt: str | None, without: Entry) -> Entry:
        """Encodes the negative ``prompt``: the embeddings that appear with guidance, in the places
        of those that are there ``without`` it.

        Raises `ValueError` where the pipeline has no negative branch.
        """
        pipeline = self.call.pipeline
        parameters = inspect.signature(pipeline.encode_prompt).parameters
        if "do_classifier_free_guidance" not in parameters:
            return without  # guided by a second prompt, if at all (Flux)
        # beside a list of prompts most families take a list alone
        said = None if prompt is None else [prompt]
        guided = self._encode([prompt or ""], guidance_scale=2.0, negative_prompt=said)
        others = [
            value
            for value, alone in zip(guided, without, strict=True)
            if alone is None and value is not None
        ]
        if len(others) != sum(value is not None for value in without):
            raise ValueError(
                f"{type(pipeline).__name__} has no negative branch; set chain.guidance to 1"
            )
        places = iter(others)
        return tuple(None if value is None else next(places) for value in without)

    @torch.no_grad()
    def _encode(self, prompts: list[str], **arguments: Any) -> Entry:
        """Returns the answer of ``encode_prompt`` to the pipeline's own call."""
        kept: list[Entry] = []
        own = self.call.pipeline.encode_prompt

        def keep(*args: Any, **kwargs: Any) -> Entry:
            kept.append(own(*args, **kwargs))
            return kept[-1]

        encoding = self.parts.visiting("text_encoder")
        with encoding, torch.autocast(self.parts.device.type, enabled=False):
            self.call(self.call.stand_in(), keep, prompt=prompts, output_type="latent", **arguments)
        return kept[0]
