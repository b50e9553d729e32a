"""The verb evaluate where a policy acts: episodes from fixed starts, with one sampler or several,
and GIFs of some.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from genpolicy.chain import Noise
from genpolicy.cli.sections import task_section
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError, RenderError
from genpolicy.config.leaves import make
from genpolicy.config.origin import Origin
from genpolicy.config.schema import EvalConfig, Experiment
from genpolicy.contracts.model import ControlModel, require_fit
from genpolicy.contracts.task import ControlTask, Environments, is_control
from genpolicy.evaluation import metrics_file
from genpolicy.evaluation.episode_scores import ControlEvaluation, evaluate_control
from genpolicy.evaluation.film import film, save
from genpolicy.evaluation.prompt_scores import EVALUATION
from genpolicy.evaluation.samplers import Variant, variants, with_levels
from genpolicy.evaluation.statistics import latency, paired
from genpolicy.policy.files import Saved, save_policy
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.guard import guarded
from genpolicy.rollout.plans import Plans

DECISIONS, WARM_UP, SECONDS = 200, 10, 20.0
"""Decisions whose latency is measured, decisions that go before, and the longest time, seconds."""
GIFS = "episodes"
"""Folder of the GIFs, beside eval.json."""


@dataclass(frozen=True)
class Asked:
    """The episodes to play, the same for every sampler."""

    episodes: int  # how many
    seed: int  # reset seed of the first one; the others follow it, one by one
    environments: int  # side by side
    gifs: int  # of so many successes, and of so many failures
    deploy: Path | None = None  # folder in which the policy is saved with the last sampler

    def __post_init__(self) -> None:
        for name, low in (("episodes", 1), ("environments", 1), ("gifs", 0)):
            value = getattr(self, name)
            if value < low:
                raise ConfigError(f"--{name} is {value}; it must be at least {low}")
        if self.deploy is not None and self.deploy.exists():
            raise ConfigError(f"--deploy {self.deploy} is there already: name a new folder")


@dataclass(frozen=True)
class Measured:
    """A sampler's evaluation and what it cost."""

    variant: Variant
    evaluation: ControlEvaluation
    nfe: float  # network evaluations per decision
    nfe_per_action: float  # network evaluations per action that was carried out
    seconds: float  # that the evaluation took
    latency: Mapping[str, float]  # of one decision, milliseconds (see `latency`)

    def entry(self) -> dict[str, Any]:
        """The sampler's part of eval.json."""
        return {
            **rates(self.evaluation),
            "sampler": self.variant.description(),
            "nfe_per_decision": self.nfe,
            "nfe_per_action": self.nfe_per_action,
            "latency_ms": dict(self.latency),
            **(
                {}
                if self.variant.contraction is None
                else {"warm": asdict(self.variant.contraction)}
            ),
        }

    def difference(self, other: "Measured") -> dict[str, Any]:
        """This sampler's numbers minus the other's, on the same episodes, with 95 % intervals."""
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


def rates(evaluation: ControlEvaluation) -> dict[str, Any]:
    """An evaluation's numbers as eval.json has them: each, and under "ci95" its interval."""
    metrics = evaluation.metrics()
    intervals = {
        name.removeprefix("ci95/"): value
        for name, value in metrics.items()
        if name.startswith("ci95/")
    }
    plain = {
        name: value
        for name, value in metrics.items()
        if not name.startswith("ci95/") and name != "n"
    }
    return {**plain, "ci95": intervals}


def run(args: Namespace, found: Saved, out: Path) -> int:
    """Evaluates the policy ``found`` as ``args`` say, or as its run did; writes out/eval.json."""
    settings, side_by_side, task = EvalConfig(), Experiment.environments, {}
    origin = found.origin
    if found.run is not None:
        config = found.run / "config.yaml"
        made_by, origin = parse.load(config), origin.reached(config)
        settings, side_by_side, task = made_by.eval, made_by.environments, made_by.task
        if made_by.threads is not None:
            torch.set_num_threads(made_by.threads)
    section, origin = task_section(args, task, origin)
    if not section:
        raise ConfigError(
            f"{args.policy} comes from no run of ours: name its --task, "
            "for example --task metaworld --task.env=assembly-v3"
        )
    asked = Asked(
        episodes=settings.episodes if args.episodes is None else args.episodes,
        seed=settings.seed if args.seed is None else args.seed,
        environments=side_by_side if args.environments is None else args.environments,
        gifs=2 if args.gifs is None else args.gifs,
        deploy=None if args.deploy is None else Path(args.deploy),
    )
    evaluate_episodes(found, section, origin, asked, args.samplers or (), out)
    return 0


def evaluate_episodes(
    found: Saved,
    section: Mapping[str, Any],
    origin: Origin,
    asked: Asked,
    samplers: Sequence[str],
    out: Path,
) -> dict[str, Any]:
    """Plays, measures and films a policy in the task of ``section`` and its ``origin``, with its
    deployed sampler and the other ``samplers`` (see `variants`); prints a table, writes
    out/eval.json and returns what it holds.
    """
    task = make("tasks", section, origin)
    if not is_control(task):
        raise ConfigError(f"task {section['name']} has no environments to act in")
    chosen = variants(samplers, found)
    if any(variant.sampler.guidance != 1 for variant in chosen):
        raise ConfigError("guidance is for prompts: a policy that acts has no unconditional branch")
    policy = found.load()
    model: ControlModel = policy.model  # type: ignore[assignment]  # its caller saw that it acts
    require_fit(model, task)
    for variant in chosen:
        variant.require_fit(policy)
    name, count = str(section["name"]), min(asked.environments, asked.episodes)
    environments = guarded(task, name, count, model.history)
    measured: list[Measured] = []
    try:
        chosen = with_levels(chosen, policy, environments, asked.seed)
        policies = [variant.of(policy) for variant in chosen]
        for variant in chosen:
            if variant.contraction is not None:
                print(f"{variant.name}: {variant.contraction.described(variant.sampler)}")
        # a line of the table as soon as its sampler is measured
        width = max(len("sampler"), *(len(variant.name) for variant in chosen))
        print(_head(width, task.has_success, len(chosen) > 1))
        for variant, acting in zip(chosen, policies, strict=True):
            measured.append(_measure(variant, acting, task, environments, asked))
            print(_line(measured[-1], measured[0], width), flush=True)
        # the file, then the films, which may fail for want of a camera
        result = _result(found, section, asked, measured)
        metrics_file.write_json(out / "eval.json", result)
        last = asked.seed + asked.episodes - 1
        print(f"{asked.episodes} episodes from seeds {asked.seed} to {last}; {out / 'eval.json'}")
        if asked.deploy is not None:
            save_policy(policies[-1], found.policy, chosen[-1].sampler, asked.deploy)
            print(f"{asked.deploy}: the policy, deployed with {chosen[-1].name}")
        if asked.gifs:
            _film(policies[0], task, environments, asked, measured[0].evaluation, out / GIFS)
    finally:
        environments.close()
    return result


def _measure(
    variant: Variant,
    policy: ChainPolicy,
    task: ControlTask,
    environments: Environments,
    asked: Asked,
) -> Measured:
    counted, started = policy.model.evaluations, time.perf_counter()
    found = evaluate_control(
        policy, environments, episodes=asked.episodes, seed=asked.seed, judged=task.has_success
    )
    seconds = time.perf_counter() - started
    nfe = policy.model.evaluations - counted
    per_decision, per_action = nfe / found.decisions, nfe / float(found.lengths.sum())
    timed = _latency(policy, environments, asked.seed)
    return Measured(variant, found, per_decision, per_action, seconds, timed)


@torch.no_grad()
def _latency(policy: ChainPolicy, environments: Environments, seed: int) -> dict[str, float]:
    """The latency of one decision for one robot: observation encoded, chain sampled, actions
    decoded and brought to the CPU. With a warm start, of one that is not an episode's first.
    """
    context = environments.reset([0], [seed])
    row, plans = torch.zeros(1, dtype=torch.long), Plans(policy)

    def decide(number: int) -> None:
        noise = Noise(seed, EVALUATION, row, row, row + number)
        chain = plans.sample([0], policy.model.encode(context), noise, keep=(0, 0))
        policy.actions(chain.x0).cpu()

    return latency(decide, DECISIONS, WARM_UP, SECONDS)


def _result(
    found: Saved, section: Mapping[str, Any], asked: Asked, measured: Sequence[Measured]
) -> dict[str, Any]:
    """The contents of eval.json: the deployed sampler's numbers, the others' under "samplers"."""
    deployed, *others = measured
    result = {
        "policy": found.where,
        "task": dict(section),
        **deployed.entry(),
        "n": asked.episodes,
        "seeds": {"first": asked.seed, "episodes": asked.episodes},
        "env_steps_per_s": float(deployed.evaluation.lengths.sum()) / deployed.seconds,
    }
    if others:
        result["samplers"] = [
            {"name": other.variant.name, **other.entry(), "difference": other.difference(deployed)}
            for other in others
        ]
    return result


def _head(width: int, judged: bool, several: bool) -> str:
    """The heading of the columns of `_line`."""
    rate = "success rate, 95 %" if judged else "return, 95 %"
    first = f"{'sampler':>{width}}  {rate:>24}  {'return':>9}  {'steps':>6}"
    columns = f"{first}  {'NFE':>5}  {'/action':>7}  {'p50 ms':>7}"
    return columns + ("   difference to the deployed one, paired" if several else "")


def _line(one: Measured, deployed: Measured, width: int) -> str:
    """A sampler's line of the table."""
    name, entry = "success_rate" if one.evaluation.judged else "return", one.entry()
    low, high = entry["ci95"][name]
    rate = f"{entry[name]:.3f} [{low:.3f}, {high:.3f}]"
    played = f"{entry['return']:9.3f}  {entry['length']:6.1f}"
    cost = f"{one.nfe:5.4g}  {one.nfe_per_action:7.4g}  {one.latency['p50']:7.2f}"
    line = f"{one.variant.name:>{width}}  {rate:>24}  {played}  {cost}"
    if one is deployed:
        return line
    difference = one.difference(deployed)[name]
    low, high = difference["ci95"]
    return f"{line}   {difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _film(
    policy: ChainPolicy,
    task: ControlTask,
    environments: Environments,
    asked: Asked,
    evaluation: ControlEvaluation,
    folder: Path,
) -> None:
    """Writes GIFs of the first successes and failures, or of the first episodes where the task has
    no verdict; each episode is played again, and its file is named by how it then ends.
    """
    kinds = (
        [evaluation.success > 0, evaluation.success == 0]
        if task.has_success
        else [evaluation.returns.isfinite()]
    )
    chosen = sorted(
        episode for kind in kinds for episode in kind.nonzero().flatten()[: asked.gifs].tolist()
    )
    try:
        films = film(policy, task, environments, seed=asked.seed, episodes=chosen)
    except RenderError as error:
        print(f"no GIFs: {error}", file=sys.stderr)
        return
    for shot in films:
        kind = shot.outcome if task.has_success else "episode"
        save({"": shot}, folder / f"{kind}-{shot.seed}.gif")
    print(f"{len(films)} GIFs in {folder}")
