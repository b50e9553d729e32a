"""The verb evaluate where a policy acts: episodes from fixed starts, with one sampler or several,
and GIFs of some.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import make
from genpolicy.contracts.model import ControlModel, require_fit
from genpolicy.contracts.task import ControlTask, Environments, is_control
from genpolicy.evaluation import metrics_file
from genpolicy.evaluation.episode_scores import ControlEvaluation, evaluate_control
from genpolicy.evaluation.film import film, save
from genpolicy.evaluation.prompt_scores import EVALUATION, latency, paired
from genpolicy.evaluation.samplers import Variant, variants
from genpolicy.policy.files import Saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.tasks._simulators import RenderError

DECISIONS, WARM_UP, SECONDS = 200, 10, 20.0
"""Decisions whose latency is measured, those that go before, and how long it may take."""
GIFS = "episodes"
"""Folder of the GIFs, beside eval.json."""


@dataclass(frozen=True)
class Plan:
    """What to play: ``episodes`` from the reset seeds ``seed``, ``seed`` + 1, ..., so many
    ``environments`` side by side; GIFs of so many successes and so many failures.
    """

    episodes: int
    seed: int
    environments: int
    gifs: int

    def __post_init__(self) -> None:
        for name, low in (("episodes", 1), ("environments", 1), ("gifs", 0)):
            value = getattr(self, name)
            if value < low:
                raise ConfigError(f"--{name} is {value}; it must be at least {low}")


@dataclass(frozen=True)
class Measured:
    """A sampler's evaluation and the seconds that it took; network evaluations of a decision, and
    milliseconds of one.
    """

    variant: Variant
    evaluation: ControlEvaluation
    nfe: float
    seconds: float
    latency: Mapping[str, float]

    def entry(self) -> dict[str, Any]:
        """Its part of eval.json."""
        metrics = self.evaluation.metrics()
        rates = {
            name: value
            for name, value in metrics.items()
            if not name.startswith("ci95/") and name != "n"
        }
        intervals = {
            name.removeprefix("ci95/"): value
            for name, value in metrics.items()
            if name.startswith("ci95/")
        }
        return {
            **rates,
            "ci95": intervals,
            "sampler": self.variant.description(),
            "nfe_per_decision": self.nfe,
            "latency_ms": dict(self.latency),
        }

    def difference(self, other: "Measured") -> dict[str, Any]:
        """This one minus the other on the same episodes, with 95 % intervals (Student's t)."""
        mine, theirs = self.evaluation, other.evaluation
        pairs = {"return": (theirs.returns, mine.returns)}
        if mine.judged:
            pairs["success_rate"] = theirs.success, mine.success
        found = {
            name: paired(before, after, mine.samples) for name, (before, after) in pairs.items()
        }
        return {
            name: {"mean": mean, "ci95": [low, high]} for name, (mean, low, high) in found.items()
        }


def trial(
    found: Saved, task_section: Mapping[str, Any], plan: Plan, asked: Sequence[str], out: Path
) -> dict[str, Any]:
    """Play, measure and film a policy with its deployed sampler and the others that are ``asked``
    for (see `variants`); print a table, write out/eval.json and return what it holds.
    """
    task = make("tasks", task_section)
    if not is_control(task):
        raise ConfigError(f"task {task_section['name']} has no environments to act in")
    chosen = variants(asked, found)
    if any(variant.sampler.guidance != 1 for variant in chosen):
        raise ConfigError("guidance is for prompts: a policy that acts has no unconditional branch")
    policy = found.load()
    model: ControlModel = policy.model  # type: ignore[assignment]  # its caller saw that it acts
    require_fit(model, task)
    policies = [variant.of(policy) for variant in chosen]
    environments = task.environments(min(plan.environments, plan.episodes), model.history)
    measured: list[Measured] = []
    try:
        width = max(len("sampler"), *(len(variant.name) for variant in chosen))
        print(_head(width, task.has_success, len(chosen) > 1))
        for variant, acting in zip(chosen, policies, strict=True):
            measured.append(_measure(variant, acting, task, environments, plan))
            print(_line(measured[-1], measured[0], width), flush=True)
        result = _result(found, task_section, plan, measured)
        metrics_file.write_json(out / "eval.json", result)
        last = plan.seed + plan.episodes - 1
        print(f"{plan.episodes} episodes from seeds {plan.seed} to {last}; {out / 'eval.json'}")
        if plan.gifs:
            _film(policies[0], task, environments, plan, measured[0].evaluation, out / GIFS)
    finally:
        environments.close()
    return result


def _measure(
    variant: Variant, policy: ChainPolicy, task: ControlTask, environments: Environments, plan: Plan
) -> Measured:
    counted, started = policy.model.evaluations, time.perf_counter()
    found = evaluate_control(
        policy, environments, episodes=plan.episodes, seed=plan.seed, judged=task.has_success
    )
    seconds = time.perf_counter() - started
    nfe = (policy.model.evaluations - counted) / found.decisions
    return Measured(variant, found, nfe, seconds, _latency(policy, environments, plan.seed))


@torch.no_grad()
def _latency(policy: ChainPolicy, environments: Environments, seed: int) -> dict[str, float]:
    """Of one decision for one robot: observation encoded, chain sampled, actions decoded and
    brought to the CPU.
    """
    context = environments.reset([0], [seed])
    row = torch.zeros(1, dtype=torch.long)

    def decide(number: int) -> None:
        noise = Noise(seed, EVALUATION, row, row, row + number)
        chain = policy.sample(policy.model.encode(context), noise, keep=(0, 0))
        policy.model.decode(chain.x0).cpu()

    return latency(decide, DECISIONS, WARM_UP, SECONDS)


def _result(
    found: Saved, task_section: Mapping[str, Any], plan: Plan, measured: Sequence[Measured]
) -> dict[str, Any]:
    """eval.json: the deployed sampler's numbers, and those of the others under "samplers"."""
    deployed, *others = measured
    result = {
        "policy": found.where,
        "task": dict(task_section),
        **deployed.entry(),
        "n": plan.episodes,
        "seeds": {"first": plan.seed, "episodes": plan.episodes},
        "env_steps_per_s": float(deployed.evaluation.lengths.sum()) / deployed.seconds,
    }
    if others:
        result["samplers"] = [
            {"name": other.variant.name, **other.entry(), "difference": other.difference(deployed)}
            for other in others
        ]
    return result


def _head(width: int, judged: bool, several: bool) -> str:
    """What stands over the columns of `_line`."""
    rate = "success rate, 95 %" if judged else "return, 95 %"
    columns = (
        f"{'sampler':>{width}}  {rate:>24}  {'return':>9}  {'steps':>6}  {'NFE':>5}  {'p50 ms':>7}"
    )
    return columns + ("   difference to the deployed one, paired" if several else "")


def _line(one: Measured, deployed: Measured, width: int) -> str:
    """A sampler's numbers."""
    name, entry = "success_rate" if one.evaluation.judged else "return", one.entry()
    low, high = entry["ci95"][name]
    rate = f"{entry[name]:.3f} [{low:.3f}, {high:.3f}]"
    numbers = (
        f"{entry['return']:9.3f}  {entry['length']:6.1f}  {one.nfe:5.4g}  {one.latency['p50']:7.2f}"
    )
    line = f"{one.variant.name:>{width}}  {rate:>24}  {numbers}"
    if one is deployed:
        return line
    difference = one.difference(deployed)[name]
    low, high = difference["ci95"]
    return f"{line}   {difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _film(
    policy: ChainPolicy,
    task: ControlTask,
    environments: Environments,
    plan: Plan,
    evaluation: ControlEvaluation,
    folder: Path,
) -> None:
    """GIFs of the first successes and failures, or of the first episodes where nobody judges; each
    is played again, and is called what it then is.
    """
    kinds = (
        [evaluation.success > 0, evaluation.success == 0]
        if task.has_success
        else [evaluation.returns.isfinite()]
    )
    chosen = sorted(
        episode for kind in kinds for episode in kind.nonzero().flatten()[: plan.gifs].tolist()
    )
    try:
        films = film(policy, task, environments, seed=plan.seed, episodes=chosen)
    except RenderError as error:
        print(f"no GIFs: {error}", file=sys.stderr)
        return
    for shot in films:
        kind = shot.outcome if task.has_success else "episode"
        save({"": shot}, folder / f"{kind}-{shot.seed}.gif")
    print(f"{len(films)} GIFs in {folder}")
