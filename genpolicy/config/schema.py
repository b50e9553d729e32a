"""Experiments: a YAML, the dataclasses that it is read into, and the leaves that they name.

A YAML is decoded in two passes: the names first, then the leaves' own dataclasses. A leaf is found
by its file name (``method: grpo_guard`` is genpolicy/methods/grpo_guard.py) or by a dotted path
(``mypkg.mod:fn``). Its entry is the class or function of that file whose name equals the file's,
underscores and case aside.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from genpolicy.config.errors import ConfigError, at_least, at_most, positive


@dataclass
class ChainConfig:
    """The sampler: how noise becomes a sample. Defaults without a source are ours."""

    # denoising steps K; Flow-GRPO's number for training (arXiv 2505.05470)
    steps: int = 10
    # {name, ...}: a class of genpolicy.chain (ddim, sde, cps, heun, dpmsolver, ...) or a dotted
    # path; eta 1 is DDPM's own noise (arXiv 2010.02502)
    kernel: dict[str, Any] = field(default_factory=lambda: {"name": "ddim", "eta": 1.0})
    # classifier-free scale (arXiv 2207.12598); 1 is none
    guidance: float = 1.0
    # noise times (low, high] in which guidance acts; None is all of them
    guidance_interval: tuple[float, float] | None = None
    # differentiate the unconditional branch too, as the public DDPO and Flow-GRPO scripts do; off
    # saves its backward
    negative_gradient: bool = False
    # denoising steps [low, high) at which the kernel acts, the ODE elsewhere; None is all but the
    # last. A learned std draws under a kernel without noise only where a window is named. With
    # another number of steps in its place (eval.sampler.steps, --steps) it is the same share of
    # them: [5, 10) of 10 steps is [3, 5) of 5; a window that is named beside them is taken as it is
    window: tuple[int, int] | None = None
    # consecutive steps that are drawn from the window anew for every iteration; None is the whole
    # window
    window_size: int | None = None
    # samples that are drawn per decision, of which the policy's critic picks one
    best_of: int = 1
    # noise times: "own" are genpolicy's for the family, "native" those of the family's own library
    grid: Literal["own", "native"] = "own"
    # noise time at which the chain starts, below the noisiest; None is the noisiest
    start: float | None = None
    # actions of a chunk that are carried out before the next decision; None is all that the model
    # says. Of a policy that is deployed: what is trained carries out whole chunks
    execute: int | None = None
    # {name, ...}: rti or sdedit (genpolicy.chain), every decision of an episode but its first
    # begins from the plan before it; None is noise each time. Of a policy that is deployed
    warm: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        at_most("chain", self, steps=10_000)
        at_least("chain", self, steps=1, guidance=0, window_size=1, best_of=1, execute=1)
        positive("chain", self, "start")
        if self.grid == "native" and self.start is not None:
            raise ConfigError("chain: a native grid starts where its library does: leave start out")
        interval = self.guidance_interval
        if interval is not None and not interval[0] < interval[1]:
            raise ConfigError(
                f"chain: guidance_interval is {list(interval)}; "
                "it must be [low, high] with low < high"
            )


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) and what surrounds it. Defaults without a source are ours."""

    lr: float = 1e-4  # learning rate at its peak; GRPO-Guard's configuration
    betas: tuple[float, float] = (0.9, 0.999)  # decays of the two moments, per update; torch
    eps: float = 1e-8  # added to the second moment's root; torch
    weight_decay: float = 1e-4  # per update, times lr; Flow-GRPO's configuration
    max_grad_norm: float = 1.0  # global norm above which gradients are scaled; Flow-GRPO
    warmup: int = 0  # updates of linear rise
    final: float = 1.0  # share of lr at which the cosine ends; 1 is constant
    # decay of the averaged weights that are evaluated and saved, min((1 + n) / (10 + n), ema) after
    # update n; 0 is no averaging
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
    """The limits of a run, which stops at the first of these; None is no limit."""

    iterations: int | None = None
    nfe: float | None = None  # network evaluations
    env_decisions: float | None = None  # decisions in environments
    env_steps: float | None = None  # environment steps
    seconds: float | None = None  # of wall-clock training, evaluation aside

    def __post_init__(self) -> None:
        limits = [f.name for f in dataclasses.fields(self)]
        positive("budget", self, *limits)
        if all(getattr(self, name) is None for name in limits):
            raise ConfigError(f"budget sets no limit; give one of {', '.join(limits)}")


@dataclass
class EvalConfig:
    """Periodic evaluation with the deployed sampler, on its own prompts (or starts) and one fixed
    noise. The defaults are ours.
    """

    every: int = 20  # iterations between evaluations; 0 is only before and after training
    prompts: str | None = None  # file with one prompt per line; None takes the task's prompts
    samples: int = 256  # pictures or videos per evaluation, over all prompts
    episodes: int = 100  # episodes per evaluation, in environments
    select: str | None = None  # metric that decides policy_best; None takes the first one measured
    # keys of `ChainConfig` that the deployed sampler replaces; without any it has the same steps
    # and guidance, on prompts with the ODE, in environments with the mean of the kernel (`Mean`),
    # or with the ODE where chain.window_size draws the noisy steps anew for every iteration; a
    # kernel without noise (ddim with eta 0) stays without a learned std too, unless a window is
    # named beside it
    sampler: dict[str, Any] = field(default_factory=dict)
    # seed of the evaluation noise and first reset seed of the environments, the same for every run
    # that is to be compared
    seed: int = 1_000_003

    def __post_init__(self) -> None:
        at_least("eval", self, every=0, samples=1, episodes=1, seed=0)
        at_most("eval", self, samples=1_000_000, episodes=1_000_000)


@dataclass
class Experiment:
    """One experiment, which is one YAML. Its resolved form is written to the run's folder and is
    the file to resume from. The defaults are ours.
    """

    policy: dict[str, Any]  # a leaf of models/ and its settings
    task: dict[str, Any]  # a leaf of tasks/ and its settings
    method: dict[str, Any]  # a leaf of methods/ and its settings
    # leaves of rewards/ by name, with their weights, of prompts; environments bring their own
    reward: dict[str, Any] = field(default_factory=dict)
    # a leaf of datasets/, the recorded episodes to learn from; a list is several as one, of which
    # each says for itself what came of its episodes (next.success, next.reward)
    data: dict[str, Any] | list[Any] | None = None
    chain: ChainConfig = field(default_factory=ChainConfig)  # the sampler that is trained
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    budget: BudgetConfig = field(default_factory=lambda: BudgetConfig(iterations=100))
    eval: EvalConfig = field(default_factory=EvalConfig)
    # CPU threads per process; small networks are fastest on 1; None is torch's number
    threads: int | None = None
    environments: int = 20  # environments side by side, per process
    # keep every episode that is collected in environments as long as the run, frame by frame, so
    # that `genpolicy compact` can write all of them as a data set (docs/replay.md)
    record: bool = False
    # rows per forward and backward; auto takes all, halved when memory runs out
    micro_batch: int | str = "auto"
    checkpoint_every: int = 20  # iterations between checkpoints
    # seconds that the environments may take for a decision, or a reward for the rows that it is
    # given at once, before the run stops and says so; None waits for ever
    patience: float | None = 1800.0
    trackers: list[str] = field(default_factory=list)  # accelerate's: tensorboard, wandb, ...
    seed: int = 0  # of everything that is drawn in training
    output: str = "runs/experiment"  # the run's folder

    def __post_init__(self) -> None:
        at_least("the experiment", self, checkpoint_every=1, threads=1, environments=1)
        at_most("the experiment", self, threads=1024, environments=10_000, patience=1e9)
        positive("the experiment", self, "patience")
        rows = self.micro_batch
        if rows != "auto" and not (isinstance(rows, int) and rows >= 1):
            raise ConfigError(
                f"the experiment: micro_batch is {rows!r}; "
                "it must be auto or a number of rows, at least 1"
            )
        if not self.output:
            raise ConfigError("the experiment: output is empty; it must name the run's folder")
