"""Experiments: a YAML, dataclasses, and the leaves they name. Two passes: names first, then the
leaves' own dataclasses.

A leaf is found by its file name (``method: grpo_guard`` is genpolicy/methods/grpo_guard.py) or by a
dotted path (``mypkg.mod:fn``). Its entry is the class or function of that file whose name equals
the file's, underscores and case aside.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from genpolicy.config.errors import ConfigError, at_least, positive


@dataclass
class ChainConfig:
    """The sampler: how noise becomes a sample.

    steps: denoising steps K. kernel: {name, ...}: a class of genpolicy.chain (ddim, sde, cps, heun,
    dpmsolver, ...) or a dotted path. guidance: classifier-free scale, 1 is none. guidance_interval:
    [low, high] noise times it acts in. negative_gradient: train through the unconditional branch
    too, as some public scripts do (off: its backward is saved). window: [low, high) steps at which
    the kernel acts (default: all but the last), the ODE elsewhere. window_size: if set, that many
    consecutive steps are drawn from the window anew for every iteration. best_of: samples that are
    drawn for a decision; the policy's critic picks one.
    """

    steps: int = 10
    kernel: dict[str, Any] = field(default_factory=lambda: {"name": "ddim", "eta": 1.0})
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    negative_gradient: bool = False
    window: tuple[int, int] | None = None
    window_size: int | None = None
    best_of: int = 1

    def __post_init__(self) -> None:
        at_least("chain", self, steps=1, guidance=0, window_size=1, best_of=1)
        if (
            self.guidance_interval is not None
            and not self.guidance_interval[0] < self.guidance_interval[1]
        ):
            raise ConfigError(
                f"chain: guidance_interval is {list(self.guidance_interval)}; it must be [low, high] with low < high"
            )


@dataclass
class OptimizerConfig:
    """AdamW and what surrounds it.

    lr at its peak; warmup: updates of linear rise; final: the cosine ends at this share of lr (1:
    constant); max_grad_norm: global norm clip; ema: decay of the averaged weights that are
    evaluated and saved (0: none), min((1+n)/(10+n), ema) after update n. betas, eps, weight_decay:
    AdamW's.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    warmup: int = 0
    final: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        positive("optimizer", self, "lr", "eps", "max_grad_norm")
        at_least("optimizer", self, weight_decay=0, warmup=0, final=0, ema=0)
        for name, shares in (("betas", self.betas), ("ema", (self.ema,))):
            if not all(0 <= share < 1 for share in shares):
                raise ConfigError(
                    f"optimizer: {name} is {', '.join(map(str, shares))}; it must lie in [0, 1)"
                )


@dataclass
class BudgetConfig:
    """When to stop: at the first of these. nfe: network evaluations; env_decisions, env_steps:
    decisions and steps in environments; seconds: of wall-clock training, evaluation aside.
    """

    iterations: int | None = None
    nfe: float | None = None
    env_decisions: float | None = None
    env_steps: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = [f.name for f in dataclasses.fields(self)]
        positive("budget", self, *limits)
        if all(getattr(self, name) is None for name in limits):
            raise ConfigError(f"budget sets no limit; give one of {', '.join(limits)}")


@dataclass
class EvalConfig:
    """Periodic evaluation with the deployed sampler, on its own prompts (or starts) and one fixed
    noise.

    every: iterations between evaluations (0: only before and after). prompts: file, one a line
    (default: the task's). samples: images. episodes: in environments. select: the metric that
    decides policy_best. sampler: overrides of `chain` for the deployed sampler (default: the same
    steps and guidance, on prompts with the ODE, in environments with the mean of the kernel, see
    `Mean`). seed: of the evaluation noise, and the first of the environments' reset seeds, the same
    for every run that is to be compared.
    """

    every: int = 20
    prompts: str | None = None
    samples: int = 256
    episodes: int = 100
    select: str | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    seed: int = 1_000_003

    def __post_init__(self) -> None:
        at_least("eval", self, every=0, samples=1, episodes=1)


@dataclass
class Experiment:
    """One experiment = one YAML. The resolved form is written to the run's folder and is the file
    to resume from.
    """

    policy: dict[str, Any]
    task: dict[str, Any]
    method: dict[str, Any]
    reward: dict[str, Any] = field(default_factory=dict)  # of prompts; environments bring their own
    data: dict[str, Any] | list[Any] | None = (
        None  # recorded episodes to learn from; a list is several as one
    )
    chain: ChainConfig = field(default_factory=ChainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    budget: BudgetConfig = field(default_factory=lambda: BudgetConfig(iterations=100))
    eval: EvalConfig = field(default_factory=EvalConfig)
    threads: int | None = (
        None  # CPU threads of a process; small networks are fastest on 1 (default: torch's)
    )
    environments: int = 20  # side by side, in each process
    micro_batch: int | str = (
        "auto"  # rows of one forward and backward; auto: all, halved when memory runs out
    )
    checkpoint_every: int = 20  # iterations between checkpoints
    trackers: list[str] = field(default_factory=list)  # accelerate's: tensorboard, wandb, ...
    seed: int = 0
    output: str = "runs/experiment"

    def __post_init__(self) -> None:
        at_least("the experiment", self, checkpoint_every=1, threads=1, environments=1)
        if self.micro_batch != "auto" and not (
            isinstance(self.micro_batch, int) and self.micro_batch >= 1
        ):
            raise ConfigError(
                f"the experiment: micro_batch is {self.micro_batch!r}; it must be auto or a number of rows, at least 1"
            )
        if not self.output:
            raise ConfigError("the experiment: output is empty; it must name the run's folder")
