"""The verb evaluate of an exported policy: its episodes are played through genpolicy_runtime, as on
the robot.
"""

import importlib
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.cli.evaluate_episodes import DECISIONS, SECONDS, WARM_UP, Asked, rates
from genpolicy.cli.sections import task_section
from genpolicy.config import shipped
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import make
from genpolicy.config.origin import Origin
from genpolicy.config.schema import EvalConfig, Experiment
from genpolicy.contracts.model import ControlModel, require_fit
from genpolicy.contracts.task import Context, Environments, is_control
from genpolicy.evaluation import metrics_file
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.evaluation.statistics import latency
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.guard import guarded

SOURCE = "robots/genpolicy_runtime/src"
"""The runtime's files in the repository, for who has not installed it."""


@dataclass(frozen=True)
class Drawn:
    """The answer to a decision of n robots: their actions Float[n,T,D]."""

    x0: Tensor


@dataclass(frozen=True)
class Exported:
    """An exported policy with what `genpolicy.rollout.episodes.play` asks of a policy and of its
    model.

    runtime: the loaded `genpolicy_runtime.Policy`. Every episode has one of its own on the same
    graphs, whose noise is that of the seed that the episode begins from.
    """

    runtime: Any
    episodes: dict[int, Any] = field(default_factory=dict)  # by the episode's number

    @property
    def model(self) -> "Exported":
        return self

    @property
    def history(self) -> int:
        return self.runtime.manifest.history

    @property
    def action_dim(self) -> int:
        return self.runtime.manifest.action.dim

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: one.shape for name, one in self.runtime.manifest.observation.items()}

    def encode(self, context: Context) -> Context:
        """The context itself: the graphs read observations."""
        return context

    def actions(self, x0: Tensor) -> Tensor:
        """The actions themselves."""
        return x0

    @property
    def warm(self) -> None:
        """Nothing for `play` to remember: the runtime keeps an episode's plan itself."""

    def sample(self, context: Context, noise: Noise, **_: Any) -> Drawn:
        """The plans of the rows' episodes; ``noise`` says only which they are."""
        assert noise.decision is not None
        rows = zip(noise.group.tolist(), noise.decision.tolist(), strict=True)
        plans = [
            self._plan(context[place : place + 1], noise.seed + episode, episode, h == 0)
            for place, (episode, h) in enumerate(rows)
        ]
        return Drawn(torch.from_numpy(np.stack(plans)))

    def _plan(self, context: Context, seed: int, episode: int, begins: bool) -> np.ndarray:
        if begins:
            self.episodes[episode] = type(self.runtime)(self.runtime.manifest, self.runtime.graphs)
            self.episodes[episode].reset(seed % 2**64)
        frames = [
            {name: context.observation[name][0, frame].numpy() for name in self.shapes}
            for frame in range(self.history)
        ]
        # the ticks since the last decision, as far back as the policy sees
        for frame in frames[:-1]:
            self.episodes[episode].observe(frame)
        return self.episodes[episode].plan(frames[-1])


def run(args: Namespace) -> int:
    """Evaluates an exported folder as ``args`` say; writes eval.json."""
    library = runtime()
    section, origin = task_section(args, {}, Origin(trust=args.trust))
    if not section:
        raise ConfigError(f"{args.policy} is an export, which names no task: name its --task")
    settings = EvalConfig()
    asked = Asked(
        episodes=settings.episodes if args.episodes is None else args.episodes,
        seed=settings.seed if args.seed is None else args.seed,
        environments=(Experiment.environments if args.environments is None else args.environments),
        gifs=0,
    )
    if args.gifs:
        raise ConfigError("--gifs does not apply: an export is measured, and not filmed")
    task = make("tasks", section, origin)
    if not is_control(task):
        raise ConfigError(f"task {section['name']} has no environments to act in")
    try:
        policy = Exported(library.Policy.load(args.policy))
    except library.ExportError as error:
        raise ConfigError(str(error)) from None
    require_fit(cast(ControlModel, policy), task)
    count = min(asked.environments, asked.episodes)
    environments = guarded(task, str(section["name"]), count, policy.history)
    try:
        found = evaluate_control(
            cast(ChainPolicy, policy),
            environments,
            episodes=asked.episodes,
            seed=asked.seed,
            judged=task.has_success,
        )
        taken = _latency(policy, environments, asked.seed)
    finally:
        environments.close()
    manifest = policy.runtime.manifest
    result = {
        "policy": str(args.policy),
        "runtime": library.__version__,
        "task": dict(section),
        **rates(found),
        "sampler": dict(manifest.sampler),
        "nfe_per_decision": manifest.evaluations,
        "latency_ms": taken,
        "n": asked.episodes,
        "seeds": {"first": asked.seed, "episodes": asked.episodes},
    }
    out = Path(args.out or ".") / "eval.json"
    metrics_file.write_json(out, result)
    name = "success_rate" if found.judged else "return"
    low, high = result["ci95"][name]
    print(f"{name} {result[name]:.3f} [{low:.3f}, {high:.3f}], p50 {taken['p50']:.2f} ms")
    print(f"{asked.episodes} episodes through genpolicy-runtime {library.__version__}; {out}")
    return 0


def runtime() -> Any:
    """The package `genpolicy_runtime`: the installed one, else the one that genpolicy ships."""
    ships = shipped.code(SOURCE)
    if ships is not None and str(ships) not in sys.path:
        sys.path.append(str(ships))
    try:
        return importlib.import_module("genpolicy_runtime")
    except ImportError as error:
        raise ConfigError(
            f"an export is played by genpolicy_runtime, which can't be imported ({error}):"
            " pip install genpolicy[deploy]"
        ) from error


def _latency(policy: Exported, environments: Environments, seed: int) -> dict[str, float]:
    """The latency of one decision for one robot, in milliseconds."""
    context = environments.reset([0], [seed])
    row = torch.zeros(1, dtype=torch.long)

    def decide(number: int) -> None:
        policy.sample(context, Noise(seed, 0, row, row, row + number))

    return latency(decide, DECISIONS, WARM_UP, SECONDS)
