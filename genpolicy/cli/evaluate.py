"""The verb evaluate: scores on fixed prompts of a policy that draws; a policy that acts goes on in
evaluate_episodes.py.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from genpolicy.cli import evaluate_episodes, evaluate_exported
from genpolicy.cli.sections import sampler_keys
from genpolicy.config import leaves, parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import EvalConfig
from genpolicy.evaluation import metrics_file
from genpolicy.evaluation.prompt_scores import draw, measure
from genpolicy.evaluation.statistics import latency
from genpolicy.formats.onnx import is_export
from genpolicy.policy.files import Saved, saved
from genpolicy.training.build import load_rewards, make_rewards, prompt_lines
from genpolicy.training.prepare import evaluation_prompts

OF_PROMPTS = ("prompts", "samples", "reward", "guidance")
"""Options that only mean something for policies that draw."""
OF_EPISODES = ("episodes", "environments", "gifs", "samplers", "deploy", "task")
"""Options that only mean something for policies that act."""


def run(args: Namespace) -> int:
    """Evaluates the deployed sampler and writes eval.json."""
    if is_export(Path(args.policy)):
        where = f"{args.policy} is an export"
        _refuse(
            args, OF_PROMPTS, f"{where} of a policy that acts: judge it with --task, --episodes"
        )
        _refuse(args, ("samplers",), f"{where}, whose sampler is in its graph")
        if sampler_keys(args):
            raise ConfigError(f"{where}, whose sampler is in its graph: export it with another one")
        return evaluate_exported.run(args)
    found = saved(args.policy, trust=args.trust, **sampler_keys(args))
    out = Path(args.out or (args.policy if found.run is not None else "."))
    if found.acts:
        options = "--task, --episodes, --environments, --samplers"
        _refuse(args, OF_PROMPTS, f"{args.policy} acts: judge it with {options}")
        return evaluate_episodes.run(args, found, out)
    _refuse(args, OF_EPISODES, f"{args.policy} draws: judge it with --prompts, --samples, --reward")
    rewards, prompts, source, samples, seed = _evaluation_set(args, found)
    load_rewards(rewards)
    policy = found.load()
    measured, per_sample = measure(policy, rewards, prompts=prompts, samples=samples, seed=seed)
    metrics = measured.metrics()
    result: dict[str, Any] = {
        "policy": found.where,
        **{name: value for name, value in metrics.items() if name.startswith("reward/")},
        "ci95": {
            name.removeprefix("ci95/"): value
            for name, value in metrics.items()
            if name.startswith("ci95/")
        },
        "diversity": metrics["diversity"],
        "n": measured.samples,
        "prompts": source,
        "seeds": {"eval": seed},
        "sampler": asdict(found.sampler),
        "nfe_per_sample": per_sample,
        "latency_ms": latency(lambda call: draw(policy, prompts[:1], 1, seed + call)),
    }
    metrics_file.write_json(out / "eval.json", result)
    for name, (low, high) in result["ci95"].items():
        print(f"{name:>24}  {result[f'reward/{name}']:8.4f}  [{low:.4f}, {high:.4f}]")
    print(f"{measured.samples} samples, {per_sample:.1f} evaluations each; {out / 'eval.json'}")
    return 0


def _refuse(args: Namespace, names: Sequence[str], why: str) -> None:
    """Raises if one of these options was given."""
    given = [name for name in names if getattr(args, name) is not None]
    if given or (args.overrides and "task" in names):
        raise ConfigError(f"--{given[0] if given else 'task'} does not apply: {why}")


def _evaluation_set(args: Namespace, found: Saved) -> tuple[Any, tuple[str, ...], str, int, int]:
    """The rewards, the prompts and their source, the number of samples and the seed: those of the
    run, or those that were asked for.
    """
    if args.samples is not None and args.samples < 1:
        raise ConfigError(f"--samples is {args.samples}; it must be at least 1")
    of_rewards = PERSON
    rewards: dict[str, Any] = dict.fromkeys(args.reward or (), 1.0)
    source, defaults = args.prompts, EvalConfig()
    prompts = prompt_lines(source) if source is not None else ()
    if found.run is not None:
        config = found.run / "config.yaml"
        experiment, origin = parse.load(config), found.origin.reached(config)
        defaults = experiment.eval
        if not rewards:
            rewards, of_rewards = experiment.reward, origin
        if not prompts:
            task = leaves.make("tasks", experiment.task, origin)
            prompts = evaluation_prompts(experiment, task)
        source = source or defaults.prompts or str(experiment.task.get("prompts"))
    if source is None or not rewards:
        raise ConfigError(
            f"{args.policy} comes from no run of ours: name its --prompts FILE and --reward NAME"
        )
    seed = defaults.seed if args.seed is None else args.seed
    made = make_rewards(rewards, of_rewards)
    return made, prompts, source, args.samples or defaults.samples, seed
