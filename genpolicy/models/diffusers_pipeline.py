"""Any diffusers pipeline (SD1.5, SDXL, SD3, Flux, Wan, LTX, CogVideoX ...) as a model: encode, denoise, decode.

Nothing here knows a family. One network evaluation is the pipeline's own un-decorated ``__call__`` for one step, with a
scheduler in place of its own that shows the loop one time and keeps the network's output (`OneStep`), and with
``encode_prompt`` handing back cached embeddings: packing, ids, masks, rotary embeddings and micro-conditions stay the
pipeline's. Encoding and decoding are the same call with no step at all. Guidance is the chain's: the pipeline runs unguided.
"""

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

from genpolicy.chain import ClipX0, Prediction
from genpolicy.chain.schedule import Schedule
from genpolicy.chain.values import Parametrisation
from genpolicy.models import _diffusers_lora as lora_files
from genpolicy.models._diffusers_lora import Lora
from genpolicy.models._diffusers_scheduler import OneStep, Times, markov

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = {
    "prompt": "task.prompts",
    "negative_prompt": "policy.negative_prompt",
    "num_inference_steps": "chain.steps",
    **dict.fromkeys(("timesteps", "sigmas", "latents", "generator", "eta"), "chain"),
    **dict.fromkeys(("output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt"), "task and method"),
}
"""Arguments of a pipeline's call that this adapter passes itself, and the settings that decide them."""
CACHED_BYTES = 4 * 2**30
"""Prompt embeddings kept, oldest dropped first (and encoded again if asked for): SD3's are 2.7 MB a prompt in bf16."""
DECODED_ELEMENTS = 2**17
"""Latent elements decoded at once: one 1024 x 1024 image of SD3, 512 images of 32 x 32."""

Entry = tuple[Tensor | None, ...]
"""What ``encode_prompt`` returned for one prompt, in its order; None where it has nothing without guidance."""


@dataclass(frozen=True)
class Prompts:
    """A condition: B prompts, to be read as negatives or not. The embeddings stay with the model, once per prompt."""

    prompts: tuple[str, ...]
    negative: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor | slice) -> "Prompts":
        if isinstance(rows, slice):
            return replace(self, prompts=self.prompts[rows])
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return replace(self, prompts=tuple(self.prompts[i] for i in index.tolist()))


@dataclass(eq=False)
class DiffusersPipeline:
    """A diffusers pipeline as a `genpolicy.policy.Model`.

    pretrained: hub id or folder of a diffusers pipeline. revision: the hub's branch, tag or commit.
    train: "full" trains the denoiser (transformer or unet; of two transformers the first), "lora" a LoRA on it.
    precision: dtype that what is frozen is stored in and that the network runs in (autocast). What learns, and the VAE, are
        fp32. Kernel algebra is fp32 always.
    call: arguments of the pipeline's own call: height, width (pixels), num_frames, max_sequence_length (tokens),
        guidance_scale only where it is an input of the network (Flux).
    negative_prompt: for guidance; None is the pipeline's own idea of none ("" or, SDXL, zeros).
    gradient_checkpointing: less memory, about a third more time a differentiated evaluation.
    offload: the denoiser alone stays on the device; text encoders and VAE visit it when they work.
    device: None takes the accelerator if there is one.
    """

    pretrained: str
    revision: str | None = None
    train: Literal["full", "lora"] = "lora"
    lora: Lora = field(default_factory=Lora)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    call: dict[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = None
    gradient_checkpointing: bool = False
    offload: bool = False
    device: Any = None

    def __post_init__(self) -> None:
        if self.train not in ("full", "lora"):
            raise ValueError(f"policy.train is {self.train!r}; valid are 'full', 'lora'")
        if self.precision not in PRECISIONS:
            raise ValueError(f"policy.precision is {self.precision!r}; valid are {', '.join(PRECISIONS)}")
        if isinstance(self.lora, Mapping):
            self.lora = Lora(**self.lora)
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = torch.device(self.device or accelerator or "cpu")
        self.evaluations = 0.0
        self._entries: dict[tuple[str, bool], Entry] = {}
        self._stacked: dict[Prompts, list[Tensor | None]] = {}
        self._mixes_times: bool | None = None
        self.load()

    def load(self) -> None:
        """Load the pipeline, freeze it but for what learns, and run it dry once, so that a wrong setting is said now."""
        self.pipeline = load_pipeline(self.pretrained, self.revision, PRECISIONS[self.precision])
        run = getattr(type(self.pipeline).__call__, "__wrapped__", None)
        if run is None or not hasattr(self.pipeline, "encode_prompt"):
            raise ValueError(
                f"{type(self.pipeline).__name__} can't be run with gradients (its call is not decorated by no_grad, or it"
                " has no encode_prompt); use the family's plain text-to-image or text-to-video pipeline"
            )
        self._run = run
        self._arguments = inspect.signature(run).parameters
        self._check_call()
        self._scheduler = self.pipeline.scheduler
        markov_scheduler = markov(self._scheduler)
        self._times = Times(markov_scheduler, None)
        self._name = "transformer" if getattr(self.pipeline, "transformer", None) is not None else "unet"
        self.denoiser: torch.nn.Module = getattr(self.pipeline, self._name)
        self._place()
        for part in self._parts().values():
            part.requires_grad_(False).eval()  # eval: dropout stays off while learning too, or replay would not be exact
        if self.train == "lora":
            lora_files.add(self.pipeline, self.denoiser, self.lora)
            self.denoiser.eval()
        else:
            self.denoiser.float().requires_grad_(True)
        if self.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        for name in ("transformer", "transformer_2", "unet"):
            if getattr(self.pipeline, name, None) is not None:
                getattr(self.pipeline, name).register_forward_hook(self._count)
        self._blank = self.encode([self.negative_prompt or ""])
        latents, asked = self._dry(1)
        self.event_shape: tuple[int, ...] = tuple(latents.shape[1:])
        self._times = Times(markov_scheduler, asked[1].get("mu"))
        self.schedule: Schedule = self._times.schedule()
        self.parametrisation: Parametrisation = self._times.parametrisation

    def _check_call(self) -> None:
        for name in self.call:
            if name in OURS:
                raise ValueError(f"policy.call.{name} is not a setting of the pipeline here; it is decided by {OURS[name]}")
            if name not in self._arguments:
                near = difflib.get_close_matches(name, set(self._arguments) - set(OURS), n=3, cutoff=0.4)
                raise ValueError(
                    f"policy.call.{name}: {type(self.pipeline).__name__} has no such argument"
                    + (f"; the nearest are {', '.join(near)}" if near else "")
                )

    def _place(self) -> None:
        """Move everything, or with ``offload`` the denoisers, to the device, and make that the pipeline's device."""
        device, plain = self.device, type(self.pipeline)
        # the pipeline takes its device from whichever part comes first; with parts elsewhere that would be the wrong one
        self.pipeline.__class__ = type(plain.__name__, (plain,), {"_execution_device": property(lambda _: device)})
        self.pipeline.set_progress_bar_config(disable=True)
        for name, part in self._parts().items():
            part.to("cpu" if self.offload and not name.startswith(("transformer", "unet")) else device)

    def _parts(self) -> dict[str, torch.nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, torch.nn.Module)}

    @contextmanager
    def _visiting(self, *prefixes: str) -> Iterator[None]:
        """With ``offload``: the parts whose names start so are on the device in here, and on the CPU after."""
        visitors = [p for n, p in self._parts().items() if n.startswith(prefixes)] if self.offload else []
        try:
            for part in visitors:
                part.to(self.device)
            yield
        finally:
            for part in visitors:
                part.to("cpu")

    def _count(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        differentiated = torch.is_grad_enabled() and output[0].requires_grad
        self.evaluations += len(output[0]) * (2 if differentiated else 1)

    # -- the pipeline's call ------------------------------------------------------------------------------------------

    def _pipeline_call(self, scheduler: OneStep, encode: Any, **arguments: Any) -> Any:
        """The pipeline's own call, un-decorated, with ``scheduler`` and ``encode`` in its scheduler's and encoder's places."""
        if "guidance_scale" in self._arguments:
            arguments = {"guidance_scale": 1.0, **self.call, **arguments}
        else:
            arguments = {**self.call, **arguments}
        pipeline, standing = self.pipeline, self.pipeline.__dict__["scheduler"]
        try:
            # not setattr: that would also write the stand-in into the pipeline's config
            pipeline.__dict__["scheduler"], pipeline.__dict__["encode_prompt"] = scheduler, encode
            return self._run(pipeline, return_dict=False, **arguments)[0]
        finally:
            pipeline.__dict__["scheduler"] = standing
            del pipeline.__dict__["encode_prompt"]

    @torch.no_grad()
    def _dry(self, steps: int) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
        """No step at all: the latents [1,*E] that the loop would start from, and the arguments of ``set_timesteps``."""
        scheduler = self._stand_in(torch.empty(0))
        latents = self._pipeline_call(
            scheduler, self._handing(self._blank), prompt=[""], num_inference_steps=steps, output_type="latent"
        )
        return latents, scheduler.asked

    def _stand_in(self, timesteps: Tensor) -> OneStep:
        return OneStep(self._times.scheduler, timesteps)

    def _handing(self, condition: Prompts, dtype: torch.dtype | None = None) -> Any:
        rows = self._rows(condition)
        if dtype is not None:
            rows = [v.to(dtype) if v is not None and v.is_floating_point() else v for v in rows]
        return lambda *_, **__: tuple(rows)

    # -- prompts ------------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> Prompts:
        """[B] prompts; each distinct one goes through the pipeline's own ``encode_prompt`` once, alone."""
        for prompt in dict.fromkeys(prompts):
            self._entry(prompt, False)
        return Prompts(tuple(prompts))

    def negative(self, condition: Prompts) -> Prompts:
        """The same rows with the negative prompt's embeddings."""
        return replace(condition, negative=True)

    def _entry(self, prompt: str, negative: bool) -> Entry:
        key = (prompt, negative)
        if key not in self._entries:
            self._entries[key] = self._negative_entry() if negative else self._encode(prompt)
            size = sum(v.nbytes for entry in self._entries.values() for v in entry if v is not None)
            while size > CACHED_BYTES and len(self._entries) > 1:
                oldest = self._entries.pop(next(iter(self._entries)))
                size -= sum(v.nbytes for v in oldest if v is not None)
        return self._entries[key]

    def _negative_entry(self) -> Entry:
        """The entries that appear with guidance, in the places of those that are there without it."""
        blank = self._entry(self.negative_prompt or "", False)
        if "do_classifier_free_guidance" not in inspect.signature(self.pipeline.encode_prompt).parameters:
            return blank  # no classifier-free branch of its own (Flux): the negative prompt is encoded as a prompt
        guided = self._encode(
            self.negative_prompt or "", guidance_scale=2.0, negative_prompt=self.negative_prompt
        )
        others = iter(v for v, without in zip(guided, blank, strict=True) if without is None)
        return tuple(None if v is None else next(others) for v in blank)

    @torch.no_grad()
    def _encode(self, prompt: str, **arguments: Any) -> Entry:
        """Run the pipeline dry and keep what its ``encode_prompt`` returned: it passes its own arguments that way."""
        kept: list[Entry] = []
        own = self.pipeline.encode_prompt

        def record(*args: Any, **kwargs: Any) -> Entry:
            kept.append(own(*args, **kwargs))
            return kept[-1]

        with self._visiting("text_encoder"):
            self._pipeline_call(
                self._stand_in(torch.empty(0)),
                record,
                prompt=[prompt],
                num_inference_steps=1,
                output_type="latent",
                **arguments,
            )
        if not arguments and getattr(self.pipeline, "do_classifier_free_guidance", False):
            raise ValueError("policy.call.guidance_scale: guidance is the chain's on this pipeline; set chain.guidance")
        home = "cpu" if self.offload else self.device
        return tuple(None if v is None else v.to(home) for v in kept[0])

    def _rows(self, condition: Prompts) -> list[Tensor | None]:
        """What ``encode_prompt`` returns for these rows; the last few are kept, a chain asks for the same ones every step."""
        if condition not in self._stacked:
            distinct = ["" if condition.negative else p for p in condition.prompts]
            places = {prompt: i for i, prompt in enumerate(dict.fromkeys(distinct))}
            entries = [self._entry(prompt, condition.negative) for prompt in places]
            index = torch.tensor([places[prompt] for prompt in distinct], device=self.device)
            while len(self._stacked) >= 4:
                self._stacked.pop(next(iter(self._stacked)))
            self._stacked[condition] = [self._stack(values, index) for values in zip(*entries, strict=True)]
        return self._stacked[condition]

    def _stack(self, values: tuple[Tensor | None, ...], index: Tensor) -> Tensor | None:
        first = values[0]
        if first is None:
            return None
        if len(first) != 1:
            return first.to(self.device)  # not per row (Flux's text ids): shared
        if any(v.shape != first.shape for v in values):  # type: ignore[union-attr]
            raise ValueError(
                f"{type(self.pipeline).__name__} embeds prompts in different lengths, which can't share a batch here"
            )
        return torch.cat(values).to(self.device)[index]  # type: ignore[arg-type]

    # -- the network --------------------------------------------------------------------------------------------------

    def grid(self, steps: int) -> Tensor:
        """K+1 decreasing noise times ending at 0: K real steps for flows, the scheduler's own spacing else."""
        return self._times.grid(steps)

    def native_grid(self, steps: int) -> Tensor:
        """The K+1 noise times that the pipeline itself would visit in ``steps`` steps."""
        return self._times.native(self._dry(steps)[1])

    def denoise(self, x: Tensor, t: Tensor, condition: Prompts) -> Prediction:
        """One unguided network evaluation of x [B,*E] at t [B]; rows of different t in one call where the family allows it."""
        if self._times.clip is None:
            return self._predict(x, t, condition)
        bound, recompute = self._times.clip
        return ClipX0(self._predict, self.schedule, bound, recompute)(x, t, condition)

    def _predict(self, x: Tensor, t: Tensor, condition: Prompts) -> Prediction:
        output = self._network(x, t, condition)
        if output.shape != x.shape:
            raise ValueError(
                f"the network's output has shape {tuple(output.shape[1:])} for samples of {tuple(x.shape[1:])}; networks"
                " that also predict a variance are not supported"
            )
        return Prediction.of(self.parametrisation, output, x, self.schedule.alpha(t), self.schedule.sigma(t))

    def _network(self, x: Tensor, t: Tensor, condition: Prompts) -> Tensor:
        times = self._times.network_time(t).to(x.device)
        if len(t) == 1 or t.stride(0) == 0 or bool((times == times[0]).all()):
            return self._evaluate(x, times[:1], condition)
        if self._mixes_times is None:
            self._mixes_times = self._try_mixed(x, times, condition)
        if self._mixes_times:
            return self._evaluate(x, times[None], condition)
        output = torch.empty_like(x)
        for time in times.unique():
            rows = (times == time).nonzero().flatten()
            output = output.index_copy(0, rows, self._evaluate(x[rows], time[None], condition[rows]).float())
        return output

    @torch.no_grad()
    def _try_mixed(self, x: Tensor, times: Tensor, condition: Prompts) -> bool:
        """Whether one call with a time per row gives each row what a call at its own time gives (once per model)."""
        rows = torch.stack([times.argmin(), times.argmax()])
        pair, counted = condition[rows], self.evaluations
        alone = torch.cat([self._evaluate(x[r : r + 1], times[r : r + 1], condition[r[None]]) for r in rows])
        try:
            together = self._evaluate(x[rows], times[rows][None], pair)
        except (RuntimeError, ValueError, TypeError):
            return False  # the family reads its time as one number (Wan 2.2's two experts)
        finally:
            self.evaluations = counted
        return bool((together - alone).abs().max() <= 1e-2 * alone.abs().max())

    def _evaluate(self, x: Tensor, timesteps: Tensor, condition: Prompts) -> Tensor:
        """The pipeline's loop run for one step at ``timesteps`` [1] or [1,B]; the network's output [B,*E]."""
        scheduler = self._stand_in(timesteps)
        dtype = PRECISIONS[self.precision]
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            self._pipeline_call(
                scheduler,
                self._handing(condition),
                prompt=[""] * len(x),
                latents=x,
                num_inference_steps=1,
                output_type="latent",
            )
        assert scheduler.output is not None
        return scheduler.output

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """The pipeline's own tail: images Float[B,3,H,W], videos Float[B,F,3,H,W], in [0,1] fp32."""
        rows = max(1, DECODED_ELEMENTS // x0[0].numel())
        with self._visiting("vae", "safety_checker"):
            return torch.cat([self._decode(chunk) for chunk in x0.split(rows)])

    def _decode(self, x0: Tensor) -> Tensor:
        blank = Prompts(self._blank.prompts * len(x0))
        # a VAE that is told a noise level (LTX) draws noise: the same for every row, so that no split of rows matters
        draws = [torch.Generator().manual_seed(0) for _ in x0] if "generator" in self._arguments else None
        output = self._pipeline_call(
            self._stand_in(torch.empty(0)),
            self._handing(blank, torch.float32),
            prompt=[""] * len(x0),
            latents=x0,
            generator=draws,
            num_inference_steps=1,
            output_type="pt",
        )
        return output.float().clamp(0, 1)

    # -- what learns --------------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The denoiser's parameters that learn, by their names in it, in its order."""
        return {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}

    def save(self, directory: Path) -> None:
        """A LoRA for ``pipe.load_lora_weights``, or the whole pipeline with the scheduler that it came with."""
        if self.train == "lora":
            lora_files.save(self.pipeline, self._name, self.denoiser, directory)
        else:
            self.pipeline.save_pretrained(directory)


def load_pipeline(pretrained: str, revision: str | None, dtype: torch.dtype) -> Any:
    """A pipeline from a folder or the hub: the denoiser as trained from (fp32 until it is frozen), VAE fp32, the rest ``dtype``."""
    folder = Path(pretrained)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"policy.pretrained {pretrained} is no diffusers pipeline: it has no model_index.json")
    if not folder.is_dir() and (folder.is_absolute() or pretrained.count("/") != 1):
        raise FileNotFoundError(f"policy.pretrained {pretrained}: no such folder, and no hub id (owner/name) either")
    dtypes = {"default": dtype, "vae": torch.float32}
    try:
        return diffusers.DiffusionPipeline.from_pretrained(pretrained, revision=revision, torch_dtype=dtypes)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise ValueError(f"policy.pretrained {pretrained} can't be loaded: {str(error).splitlines()[0]}") from error
        raise OSError(
            f"policy.pretrained {pretrained}: no such folder, and the hub repository can't be read (unreachable, gated or"
            " misspelt); log in with a token (hf auth login) or give a local folder"
        ) from error
