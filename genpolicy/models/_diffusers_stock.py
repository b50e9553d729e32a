"""A chain in plain diffusers: the stock scheduler that draws as it does, the arguments that ask a
pipeline's call for its noise times, and the card that says so.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from genpolicy.chain import Linear
from genpolicy.config.schema import ChainConfig
from genpolicy.models._diffusers_scheduler import Asked, Times

CARD = "README.md"
"""The file that a hub shows beside the weights."""
CONSISTENCY = "consistency"
"""The kernel whose samplers diffusers has schedulers of their own for."""
LCM_SCALING = 10.0
"""LCMScheduler's timestep_scaling: its boundary is x0 itself up to 1e-4 at all levels but 15."""
EQUAL = 1e-6
"""Noise times that differ by less are the same: diffusers keeps them in fp32."""


@dataclass(frozen=True)
class Stock:
    """The stock scheduler of a chain, and how a pipeline is asked for its times.

    own: the pipeline's scheduler. changes: keys of its config that the stock one has otherwise.
    scheduler: with these; None where no scheduler of diffusers has the family's table. times: the
    arguments of the call for the chain's noise times; empty where it takes none that name them.
    """

    own: Any
    changes: Mapping[str, Any]
    scheduler: Any
    times: Mapping[str, Any]

    @classmethod
    def of(
        cls, times: Times, sampler: ChainConfig, grid: Tensor, asked: Asked, takes: Collection[str]
    ) -> "Stock":
        """Flows: FlowMatchEulerDiscreteScheduler with ``stochastic_sampling``, which puts noise
        back. Others: LCMScheduler, counting its steps from the noisiest level as our grids do.

        grid [K+1] of the chain; asked: what the pipeline asks its scheduler for in K steps; takes:
        the arguments of its call.
        """
        own = times.scheduler
        if times.flow:
            changes = {"stochastic_sampling": True}
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(own.config, **changes)
        else:
            changes = {
                "original_inference_steps": times.levels,
                "timestep_scaling": sampler.kernel.get("scaling") or LCM_SCALING,
                "clip_sample": times.clip is not None,
            }
            scheduler = LCMScheduler.from_config(own.config, **changes)
            if not torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod):
                return cls(own, changes, None, {})
        stock = Times(scheduler, times.mu)
        return cls(own, changes, scheduler, _asking(stock, grid, asked, takes))

    @classmethod
    def ode(cls, times: Times, grid: Tensor, asked: Asked, takes: Collection[str]) -> "Stock":
        """The scheduler that takes the ODE's steps along ``grid``.

        Flows: FlowMatchEulerDiscreteScheduler. Others: DDIMScheduler (of CogVideoX its own), which
        must not only visit the grid, with its own spacing or ``trailing`` from the noisiest level
        on: each of its steps goes down by one whole number of levels, whatever it visits next. It
        is None where x0 is clipped as DDPMScheduler does.
        """
        own = without_noise(times.scheduler)
        if type(own).__name__ == "DDPMScheduler":
            own = DDIMScheduler.from_config(own.config)
        if times.clip is not None and times.clip[1]:
            return cls(own, {}, None, {})
        if times.flow:
            return cls(own, {}, own, _asking(replace(times, scheduler=own), grid, asked, takes))
        spacings: tuple[dict[str, Any], ...] = ({}, {"timestep_spacing": "trailing"})
        for changes in spacings:
            scheduler = type(own).from_config(own.config, **changes)
            visited = Times(scheduler, times.mu).native(asked)
            if _same(visited, grid) and _strides(scheduler, grid):
                return cls(own, changes, scheduler, {"num_inference_steps": len(grid) - 1})
        return cls(own, {}, own, {})

    @property
    def line(self) -> str:
        """The line of code that puts the scheduler into a pipeline that has its own."""
        said = ", ".join(f"{name}={value!r}" for name, value in self.changes.items())
        kind = type(self.scheduler).__name__
        return f"pipe.scheduler = {kind}.from_config(pipe.scheduler.config, {said})"


def _asking(stock: Times, grid: Tensor, asked: Asked, takes: Collection[str]) -> Mapping[str, Any]:
    """The arguments of the call after which the stock scheduler visits ``grid``: the number of
    steps where its own spacing is that, else the times themselves.
    """
    steps = len(grid) - 1
    if _same(stock.native(asked), grid):
        return {"num_inference_steps": steps}
    if stock.flow:
        # the scheduler shifts the sigmas that it is given
        schedule = stock.schedule()
        assert isinstance(schedule, Linear)
        named = grid[:-1] / (schedule.shift - (schedule.shift - 1) * grid[:-1])
        times = {"sigmas": [round(float(sigma), 6) for sigma in named]}
        settings = {} if stock.mu is None else {"mu": stock.mu}
    else:
        times, settings = {"timesteps": stock.network_time(grid[:-1]).tolist()}, {}
    if not set(times) <= set(takes):
        return {}
    return times if _same(stock.native(((), {**times, **settings})), grid) else {}


def _strides(scheduler: Any, grid: Tensor) -> bool:
    """True where the steps along a grid are those of diffusers' DDIM: down by levels // steps each,
    and to the end of the table where that would be below it.
    """
    levels = len(scheduler.alphas_cumprod)
    visited = (grid * levels).round()
    landed = (visited[:-1] - levels // (len(grid) - 1)).clamp_min(0)
    return torch.equal(landed, visited[1:])


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() < EQUAL)


def without_noise(scheduler: Any) -> Any:
    """The scheduler itself; of a pipeline that was a consistency chain's, one without noise."""
    config = scheduler.config
    if config.get("stochastic_sampling"):
        return type(scheduler).from_config(config, stochastic_sampling=False)
    if type(scheduler).__name__ == "LCMScheduler":
        return DDIMScheduler.from_config(config)
    return scheduler


def card(
    stock: Stock, kind: str, base: str | None, call: Mapping[str, Any], grid: Tensor, weights: str
) -> str:
    """The text of `CARD`: the call with which plain diffusers draws what genpolicy does.

    kind: the pipeline's class. base: the pipeline that a LoRA belongs to, whose file is
    ``weights``; None: the folder is a whole pipeline. call: arguments beside the times.
    """
    steps = len(grid) - 1
    passes = f"{steps} network evaluations" if steps > 1 else "one network evaluation"
    noise = ", ".join(f"{t:.4g}" for t in grid[:-1].tolist())
    text = (
        f"# A {kind} of few steps\n\n"
        f"Distilled with genpolicy. A sample takes {passes}, at noise times {noise}, without"
        " guidance; fresh noise is put back between two of them. genpolicy.json has this sampler,"
        " with which `genpolicy sample FOLDER` draws.\n\n"
    )
    if stock.scheduler is None:
        return text + "No scheduler of diffusers has this family's noise table.\n"
    if not stock.times:
        return text + (
            f"The call of {kind} can't be asked for these noise times; those of a student with"
            " chain.grid native can.\n"
        )
    return text + code(stock, base, call, weights)


def code(stock: Stock, base: str | None, call: Mapping[str, Any], weights: str) -> str:
    """The lines of Python, fenced for a card, with which plain diffusers draws; see `card`."""
    said = {**stock.times, **call}
    arguments = ", ".join(f"{name}={value!r}" for name, value in said.items())
    scheduler = type(stock.scheduler).__name__
    if base is None:
        lines = [
            "from diffusers import DiffusionPipeline\n",
            'pipe = DiffusionPipeline.from_pretrained("FOLDER")  # with its ' + scheduler,
        ]
    else:
        lines = [
            f"from diffusers import DiffusionPipeline, {scheduler}\n",
            f'pipe = DiffusionPipeline.from_pretrained("{base}")',
            f'pipe.load_lora_weights("FOLDER", weight_name="{weights}")',
            stock.line,
        ]
    lines.append(f'pipe("...", {arguments})[0]')
    return "```python\n" + "\n".join(lines) + "\n```\n"
