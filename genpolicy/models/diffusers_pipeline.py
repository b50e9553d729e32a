"""Any diffusers pipeline (SD1.5, SDXL, SD3, Flux, Wan, LTX, CogVideoX, ...): encode, denoise,
decode.

Nothing here knows a family. One network evaluation is the pipeline's own un-decorated ``__call__``
for one step, with a scheduler in its own one's place that shows the loop one time and keeps the
network's output (`OneStep`), and with an ``encode_prompt`` that hands back cached embeddings:
packing, ids, masks, rotary embeddings and micro-conditions stay the pipeline's. Encoding and
decoding are the same call with no step at all. Guidance is the chain's: the pipeline itself runs
unguided.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from genpolicy.chain import Prediction
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation
from genpolicy.config.origin import PERSON, Origin
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Context
from genpolicy.models import _diffusers_lora as lora_files
from genpolicy.models import _head
from genpolicy.models._device import default_device
from genpolicy.models._diffusers_call import PipelineCall, handing
from genpolicy.models._diffusers_load import DENOISERS, load_pipeline
from genpolicy.models._diffusers_lora import Lora
from genpolicy.models._diffusers_parts import Parts
from genpolicy.models._diffusers_prompts import Embeddings, Entry, Prompts
from genpolicy.models._diffusers_scheduler import Times
from genpolicy.models._diffusers_stock import CARD, CONSISTENCY, Stock, card, without_noise
from genpolicy.models._diffusers_text import TextEncoders
from genpolicy.models._diffusers_vae import Vae

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class DiffusersPipeline:
    """A diffusers pipeline as a `genpolicy.contracts.model.Model`.

    pretrained: hub id or folder of a pipeline.
    revision: the hub's branch, tag or commit.
    train: "full" trains the denoiser (transformer or unet; of Wan 2.2's two the first), "lora" a
        LoRA on it.
    prediction_type: meaning of the network's output; None: what the pipeline's scheduler says. With
        train "full" a student on a variance-preserving table may get another one ("epsilon",
        "sample", "v_prediction"; its weights stay as they are, and learn to say it), which is saved
        in the scheduler's config, where plain diffusers reads it. Flows say a velocity, and a LoRA
        what its pipeline says.
    lora: the LoRA, where that is what learns.
    precision: dtype that what is frozen is stored in, and that the network runs in (autocast). What
        learns and the VAE are fp32, and so is the kernel algebra.
    call: arguments of the pipeline's own call: height, width (pixels), num_frames,
        max_sequence_length (tokens), ...; guidance_scale only where it is an input of the network
        (Flux).
    negative_prompt: for guidance; None is the pipeline's own idea of none ("", or zeros for SDXL).
    gradient_checkpointing: less memory for about a third more time where gradients are taken.
    offload: the denoiser alone stays on the device; text encoders and VAE visit it when they work.
    device: None takes this process's accelerator if there is one.
    origin: of this section.
    """

    pretrained: str
    revision: str | None = None
    train: Literal["full", "lora"] = "lora"
    prediction_type: Parametrisation | None = None
    lora: Lora = field(default_factory=Lora)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    call: dict[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = None
    gradient_checkpointing: bool = False
    offload: bool = False
    device: Any = None
    origin: Origin = field(default=PERSON, repr=False)

    acts: ClassVar[bool] = False
    draws: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.train not in ("full", "lora"):
            raise ValueError(f"policy.train is {self.train!r}; valid are 'full', 'lora'")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"policy.precision is {self.precision!r}; valid are {', '.join(PRECISIONS)}"
            )
        if not isinstance(self.negative_prompt, str | None):
            raise ValueError(
                f"policy.negative_prompt is {self.negative_prompt!r}; it must be one text or null,"
                " for every prompt the same"
            )
        if isinstance(self.lora, Mapping):
            self.lora = Lora(**self.lora)
        if self.train == "full" and self.lora.start is not None:
            raise ValueError(
                f"policy.lora.start is {self.lora.start}, and policy.train is full, which starts"
                " from policy.pretrained alone; set policy.train to lora, or leave start out"
            )
        self.device = default_device() if self.device is None else torch.device(self.device)
        self.evaluations = 0.0
        self._mixes_times: bool | None = None
        self.load()

    def load(self) -> None:
        """Load the pipeline, freeze all but what learns, and run it dry: wrong settings are told
        now.
        """
        frozen = PRECISIONS[self.precision]
        learning = torch.float32 if self.train == "full" else frozen
        self.pipeline = load_pipeline(self.pretrained, self.revision, frozen, learning, self.origin)
        kind = type(self.pipeline).__name__
        self._call = PipelineCall.of(self.pipeline, self.call, self.pretrained)
        self._times = Times(self._call.scheduler, mu=None)
        self._choose_head(kind)
        self._name = (
            "transformer" if getattr(self.pipeline, "transformer", None) is not None else "unet"
        )
        self.denoiser: torch.nn.Module = getattr(self.pipeline, self._name)
        self._parts = Parts(self.pipeline, self.device, self.offload)
        self._parts.place()
        self._choose_what_learns()
        home = torch.device("cpu") if self.offload else self.device
        self._text = TextEncoders(self._call, self._parts)
        self._embeddings = Embeddings(self._text.positive, self._negative, self.device, home)
        try:
            self._blank = self._embeddings.encode([self.negative_prompt or ""])
            latents, asked = self._call.dry(1, self._embeddings.rows(self._blank))
        except (ValueError, TypeError) as error:
            raise ValueError(f"policy.call {self.call} does not fit {kind}: {error}") from error
        self.event_shape: tuple[int, ...] = tuple(latents.shape[1:])
        self._vae = Vae(self._call, self._parts, self._embeddings, self._blank, self.event_shape)
        self._times = replace(self._times, mu=asked[1].get("mu"))
        self.schedule: Schedule = self._times.schedule()
        self.parametrisation: Parametrisation = self._times.parametrisation
        self.clip: tuple[float, bool] | None = self._times.clip
        # of two experts the first denoises at noise times from the boundary on
        self.learns_from = float(self.pipeline.config.get("boundary_ratio") or 0.0)

    def _choose_head(self, kind: str) -> None:
        """Write another head than its own into the scheduler that reads it, and that is saved."""
        own = self._times.parametrisation
        if self.prediction_type in (None, own):
            return
        head = _head.choose(self.prediction_type, own, self._times.heads, kind)
        if self.train == "lora":
            raise ValueError(
                f"policy.prediction_type is {head!r}, but a LoRA keeps its pipeline's, {own!r}; set"
                " policy.train to full"
            )
        _head.tell(head, own)
        self._times.scheduler.register_to_config(prediction_type=head)
        self.pipeline.scheduler = self._times.scheduler

    def _choose_what_learns(self) -> None:
        for part in self._parts.modules().values():
            part.requires_grad_(False).eval()
        if self.train == "lora":
            lora_files.add(self.pipeline, self.denoiser, self.lora)
        else:
            self.denoiser.requires_grad_(True)
        self.denoiser.eval()  # while it learns too: with dropout a replay would not be exact
        if self.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        for name, part in self._parts.modules().items():
            if name in DENOISERS:
                part.register_forward_hook(self._count)

    def _count(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        rows = len(output[0])
        differentiated = torch.is_grad_enabled() and output[0].requires_grad
        self.evaluations += 2 * rows if differentiated else rows

    # Prompts

    def supervised(self, context: Context, uniform: Tensor) -> tuple[Prompts, Tensor]:
        """`encode`, and 0 for every row: frozen encoders draw nothing and have no losses."""
        return self.encode(context), torch.zeros(len(context), device=self.device)

    def encode(self, context: Context) -> Prompts:
        """B prompts; each distinct one goes through the pipeline's own ``encode_prompt`` once."""
        return self._embeddings.encode(context.prompts)

    def negative(self, condition: Prompts) -> Prompts:
        """The same rows with the negative prompt's embeddings."""
        return replace(condition, negative=True)

    def _negative(self) -> Entry:
        without = self._embeddings.entry(self.negative_prompt or "")
        return self._text.negative(self.negative_prompt, without)

    # The network

    def grid(self, steps: int, start: float | None = None) -> Tensor:
        """K+1 noise times, falling from ``start`` (None: the noisiest) to 0: K real steps for
        flows, else the scheduler's own spacing.
        """
        return self._times.grid(steps, start)

    def native_grid(self, steps: int) -> Tensor:
        """The K+1 noise times that the pipeline itself visits in ``steps`` steps."""
        return self._times.native(self._call.dry(steps, self._embeddings.rows(self._blank))[1])

    def denoise(self, x: Tensor, t: Tensor, condition: Prompts) -> Prediction:
        """One unguided network evaluation of x [B,*E] at t [B], counted."""
        output = self._network(x, t, condition)
        if output.shape != x.shape:
            raise ValueError(
                f"{type(self.denoiser).__name__} gives {tuple(output.shape[1:])} for"
                f" {tuple(x.shape[1:])}; networks that also predict a variance are not supported"
            )
        return Prediction.of(
            self.parametrisation, output, x, self.schedule.alpha(t), self.schedule.sigma(t)
        )

    def _network(self, x: Tensor, t: Tensor, condition: Prompts) -> Tensor:
        """Rows of different t in one call where the family reads a time per row, else by t."""
        times = self._times.network_time(t).to(x.device)
        if t.stride(0) == 0 or bool((times == times[0]).all()):
            return self._evaluate(x, times[:1], condition)
        if self._mixes_times is None:
            self._mixes_times = self._try_mixed(x, times, condition)
        if self._mixes_times:
            return self._evaluate(x, times[None], condition)
        groups = [(times == time).nonzero().flatten() for time in times.unique()]
        outputs = [self._evaluate(x[rows], times[rows][:1], condition[rows]) for rows in groups]
        return torch.cat(outputs)[torch.cat(groups).argsort()]

    @torch.no_grad()
    def _try_mixed(self, x: Tensor, times: Tensor, condition: Prompts) -> bool:
        """Returns whether one call with a time per row equals a call for each row at its own
        (asked once per model).
        """
        rows = torch.stack([times.argmin(), times.argmax()])
        counted = self.evaluations
        alone = torch.cat([self._evaluate(x[r], times[r], condition[r]) for r in rows.split(1)])
        try:
            together = self._evaluate(x[rows], times[rows][None], condition[rows])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError):
            # the loop reads its time as one number (Wan 2.2 chooses between two experts by it)
            return False
        finally:
            self.evaluations = counted
        return bool((together - alone).abs().max() <= 1e-2 * alone.abs().max())

    def _evaluate(self, x: Tensor, timesteps: Tensor, condition: Prompts) -> Tensor:
        """The pipeline's loop for one step at ``timesteps`` [1] or [1,B]: the network's output
        [B,*E].
        """
        scheduler = self._call.stand_in(timesteps)
        encode = handing(self._embeddings.rows(condition))
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            self._call(scheduler, encode, prompt=[""] * len(x), latents=x, output_type="latent")
        assert scheduler.output is not None
        return scheduler.output

    def times(self, uniform: Tensor) -> Tensor:
        """Flows: logit-normal times, then the family's shift, of them those at which what learns
        denoises; others: one of the levels, all alike (see `Times.training`).
        """
        return self._times.training(uniform, self.learns_from)

    def scored(self, value: Tensor) -> Tensor:
        """Every latent dim counts."""
        return value

    def event_mask(self, pad: Tensor) -> None:
        """Every latent dim counts in imitation too."""

    def features(self, condition: Prompts) -> Tensor:
        """The mean over tokens of the prompt's embedding, Float[B,F]."""
        embedding = next(
            v for v in self._embeddings.rows(condition) if v is not None and v.is_floating_point()
        )
        return (
            embedding.detach().float().flatten(1, -2).mean(1)
            if embedding.ndim > 2
            else embedding.detach().float()
        )

    def decode(self, x0: Tensor) -> Tensor:
        """The pipeline's tail: images Float[B,3,H,W], videos Float[B,F,3,H,W], in [0,1] fp32."""
        return self._vae.decode(x0)

    def event(self, outputs: Tensor) -> Tensor:
        """Pictures Float[B,3,H,W] or videos Float[B,F,3,H,W] in [0,1] as the samples [B,*E] whose
        decoding they are up to the VAE's own loss: the mode of its posterior, in the pipeline's
        scale and packing. Raises `ValueError` where their size is not that of ``call``.
        """
        return self._vae.encode(outputs)

    def keep(self, folder: Path) -> None:
        """See `genpolicy.contracts.model.EncodingModel`."""
        self._vae.keep(folder)

    # What learns

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The denoiser's parameters that learn, by their names in it, in its order."""
        return {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}

    def save(self, directory: Path, sampler: ChainConfig | None = None) -> None:
        """A LoRA for ``pipe.load_lora_weights``, or the whole pipeline with the scheduler it came
        with (with another head, the one that reads it).

        Of a consistency ``sampler`` the scheduler is the stock one that draws as it does, and a
        card has the call (`genpolicy.models._diffusers_stock`); that of a pipeline which was saved
        so, and is no consistency sampler's any more, adds no noise again.
        """
        own = self.pipeline.scheduler
        try:
            if sampler is not None:
                self._tell_scheduler(directory, sampler)
            if self.train == "lora":
                lora_files.save(self.pipeline, self._name, self.denoiser, directory)
            else:
                self.pipeline.save_pretrained(directory)
        finally:
            self.pipeline.scheduler = own

    def _tell_scheduler(self, directory: Path, sampler: ChainConfig) -> None:
        """Give the pipeline the stock scheduler of a consistency sampler, and write the card; of
        another sampler the one that adds no noise.
        """
        if sampler.kernel.get("name") != CONSISTENCY:
            self.pipeline.scheduler = without_noise(self.pipeline.scheduler)
            return
        native = sampler.grid == "native"
        steps, start = sampler.steps, sampler.start
        grid = self.native_grid(steps) if native else self.grid(steps, start)
        stock = self.stock(sampler, grid, consistency=True)
        if stock.scheduler is not None:
            self.pipeline.scheduler = stock.scheduler
        base = self.pretrained if self.train == "lora" else None
        kind = type(self.pipeline).__name__
        text = card(stock, kind, base, self.arguments(sampler), grid, lora_files.WEIGHTS)
        (directory / CARD).write_text(text, encoding="utf-8")

    # Plain diffusers

    def stock(self, sampler: ChainConfig, grid: Tensor, *, consistency: bool) -> Stock:
        """The stock scheduler that draws along ``grid`` [K+1] as a consistency sampler does, or
        else as the ODE.
        """
        asked = self._call.dry(len(grid) - 1, self._embeddings.rows(self._blank))[1]
        takes = self._call.arguments
        if consistency:
            return Stock.of(self._times, sampler, grid, asked, takes)
        return Stock.ode(self._times, grid, asked, takes)

    def arguments(self, sampler: ChainConfig) -> dict[str, Any]:
        """The arguments beside the noise times with which the pipeline's call draws as a sampler
        does.
        """
        takes = self._call.arguments
        guided = {"guidance_scale": sampler.guidance} if "guidance_scale" in takes else {}
        words = {} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}
        return {**guided, **(words if sampler.guidance != 1.0 else {}), **self.call}

    def whole(self, stock: Stock) -> Any:
        """The pipeline with a stock scheduler, and with the LoRA in its weights: the model learns
        no more, its pipeline is to be saved.
        """
        if self.train == "lora":
            lora_files.fuse(self.pipeline, self._name)
        self.pipeline.scheduler = stock.scheduler
        return self.pipeline
