"""A pipeline's own call, with a scheduler and an ``encode_prompt`` of ours in place of its two."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from genpolicy.models._diffusers_load import check_call
from genpolicy.models._diffusers_prompts import Entry
from genpolicy.models._diffusers_scheduler import Asked, OneStep, markov


@dataclass(frozen=True)
class PipelineCall:
    """The un-decorated ``__call__`` of a pipeline, unguided, through which gradients pass.

    settings: arguments of every call (``policy.call``).
    run: the call itself.
    scheduler: the Markov scheduler that takes the place of the pipeline's own one.
    """

    pipeline: Any
    settings: Mapping[str, Any]
    run: Callable[..., Any]
    scheduler: Any

    @classmethod
    def of(cls, pipeline: Any, settings: Mapping[str, Any], pretrained: str) -> "PipelineCall":
        """Returns the call of a loaded pipeline.

        Raises `ValueError` where it can't be run step by step, where it does not know one of
        ``settings``, and where its scheduler can't be scored.
        """
        kind = type(pipeline).__name__
        run = getattr(type(pipeline).__call__, "__wrapped__", None)
        if run is None or not hasattr(pipeline, "encode_prompt"):
            raise ValueError(
                f"policy.pretrained {pretrained}: {kind} can't be run step by step (it takes a"
                " call decorated by no_grad, and an encode_prompt); use a plain text-to-image or"
                " -video pipeline"
            )
        check_call(settings, inspect.signature(run).parameters, kind)
        return cls(pipeline, settings, run, markov(pipeline.scheduler))

    @cached_property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """The arguments that the call knows, by name."""
        return inspect.signature(self.run).parameters

    def stand_in(self, timesteps: Tensor | None = None) -> OneStep:
        """Returns a scheduler that shows the loop ``timesteps``; None: the loop does not run."""
        return OneStep(self.scheduler, torch.empty(0) if timesteps is None else timesteps)

    def __call__(self, scheduler: OneStep, encode: Callable[..., Any], **arguments: Any) -> Tensor:
        """Runs the call with ``scheduler`` and ``encode`` in place of the pipeline's own two."""
        unguided = {"guidance_scale": 1.0} if "guidance_scale" in self.arguments else {}
        # setattr would write the stand-in into the pipeline's config
        attributes = self.pipeline.__dict__
        own = attributes["scheduler"]
        try:
            attributes["scheduler"] = scheduler
            attributes["encode_prompt"] = encode
            settings = {"num_inference_steps": 1, **unguided, **self.settings, **arguments}
            return self.run(self.pipeline, return_dict=False, **settings)[0]
        finally:
            attributes["scheduler"] = own
            del attributes["encode_prompt"]

    @torch.no_grad()
    def dry(self, steps: int, rows: Entry) -> tuple[Tensor, Asked]:
        """Takes no step at all: returns the latents [1,*E] that the loop starts from, and what it
        asks of its scheduler. ``rows`` are the embeddings of one prompt.
        """
        scheduler = self.stand_in()
        latents = self(
            scheduler,
            handing(rows),
            prompt=[""],
            num_inference_steps=steps,
            output_type="latent",
        )
        return latents, scheduler.asked


def handing(rows: Entry) -> Callable[..., Entry]:
    """Returns an ``encode_prompt`` that hands ``rows`` back whatever it is asked."""
    return lambda *_, **__: rows
