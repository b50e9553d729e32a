"""A pipeline's VAE: its samples decoded to pictures, and pictures encoded as its samples."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpolicy.models._diffusers_call import PipelineCall, handing
from genpolicy.models._diffusers_latents import Layout, VaeReachedError, mode
from genpolicy.models._diffusers_parts import Parts
from genpolicy.models._diffusers_prompts import Embeddings, Prompts
from genpolicy.models._kept_latents import KeptLatents, digest

DECODED_ELEMENTS = 2**17
"""Latent elements decoded, or encoded, at once: one 1024 x 1024 image of SD3, 512 images of 32 x
32.
"""


@dataclass(eq=False)
class Vae:
    """The VAE behind a pipeline's own tail.

    blank: the one prompt whose embeddings the call gets while it decodes.
    event_shape: *E of one sample.
    kept: what it has encoded, where that is kept on disk (`keep`).
    """

    call: PipelineCall
    parts: Parts
    embeddings: Embeddings
    blank: Prompts
    event_shape: tuple[int, ...]
    kept: KeptLatents | None = None

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Decodes samples [B,*E]: images Float[B,3,H,W], videos Float[B,F,3,H,W], in [0,1] fp32."""
        chunks = samples.split(max(1, DECODED_ELEMENTS // samples[0].numel()))
        with self.parts.visiting("vae", "safety_checker"):
            return torch.cat([self._decode(chunk) for chunk in chunks])

    def encode(self, outputs: Tensor) -> Tensor:
        """Encodes pictures or videos in [0,1] as the samples [B,*E] that `decode` turns into them
        up to the VAE's own loss. Raises `ValueError` where their size is not that of the samples.
        """
        if self.kept is None:
            together = max(1, DECODED_ELEMENTS // math.prod(self.event_shape))
            return self._encoded(outputs, together)
        # alone, so that what is kept is no function of what it was first learned beside
        return self.kept(outputs, partial(self._encoded, together=1)).to(self.parts.device)

    def keep(self, folder: Path) -> None:
        """Keeps in ``folder`` what is encoded from now on, by the content of the outputs, of the
        VAE's weights and settings, and of the way from its latents to samples.
        """
        vae = self.call.pipeline.vae
        weights = {f"vae.{name}": value for name, value in vae.state_dict().items()}
        layout = asdict(self._layout)
        way = {name: value for name, value in layout.items() if isinstance(value, Tensor)}
        settings = [type(vae).__name__, dict(vae.config), self._layout.shape, self._layout.sample]
        self.kept = KeptLatents(folder, digest(settings, weights | way), self.event_shape)

    @torch.no_grad()
    def _encoded(self, outputs: Tensor, together: int) -> Tensor:
        """Encodes so many outputs at once."""
        with self.parts.visiting("vae"):
            chunks = outputs.split(together)
            return torch.cat([self._encode(chunk.to(self.parts.device)) for chunk in chunks])

    def _encode(self, outputs: Tensor) -> Tensor:
        latents = mode(self.call.pipeline.vae, outputs)
        if latents.shape[1:] != self._layout.shape:
            raise ValueError(
                f"outputs of shape {list(outputs.shape[1:])} are latents"
                f" {list(latents.shape[1:])} of the VAE; those of this policy are"
                f" {list(self._layout.shape)}: set policy.call to their height, width and"
                " num_frames"
            )
        return self._layout.event(latents)

    @cached_property
    def _layout(self) -> Layout:
        return Layout.probe(self.tail, self.event_shape, self.parts.device)

    def tail(self, samples: Tensor) -> Tensor:
        """Returns the latents [B,*L] that the pipeline would have its VAE decode. A VAE that is
        told a noise level (LTX) is shown latents without noise.
        """

        def reached(latents: Tensor, *_: Any, **__: Any) -> None:
            raise VaeReachedError(latents)

        noiseless = {"decode_noise_scale": 0.0}
        settings = {n: value for n, value in noiseless.items() if n in self.call.arguments}
        own = vars(self.call.pipeline.vae)
        try:
            own["decode"] = reached
            self._decode(samples, **settings)
        except VaeReachedError as found:
            return found.latents
        finally:
            del own["decode"]
        raise ValueError(f"{type(self.call.pipeline).__name__} decodes without its VAE")

    def _decode(self, samples: Tensor, **settings: Any) -> Tensor:
        # pipelines decode in the dtype of the embeddings; the VAE is fp32
        rows = self.embeddings.rows(Prompts(self.blank.prompts * len(samples)))
        rows = tuple(
            value.float() if value is not None and value.is_floating_point() else value
            for value in rows
        )
        # a VAE that is told a noise level (LTX) draws noise: the same for every row, so that no
        # split of rows matters
        draws = {"generator": [torch.Generator().manual_seed(0) for _ in samples]}
        arguments = draws if "generator" in self.call.arguments else {}
        return self.call(
            self.call.stand_in(),
            handing(rows),
            prompt=[""] * len(samples),
            latents=samples,
            output_type="pt",
            **arguments,
            **settings,
        ).float()
