"""The verb compare: experiments with the same start, evaluation set, budget and seeds, in a table
and one figure.
"""

import gc
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from genpolicy.config import parse, shipped, whole_file
from genpolicy.config.documents import yaml_value
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import make
from genpolicy.config.origin import Origin
from genpolicy.config.schema import Experiment
from genpolicy.contracts.task import is_control
from genpolicy.evaluation import metrics_file
from genpolicy.evaluation.comparison import Arm, Finished, figure, markdown, summarise
from genpolicy.policy.sampler import deployed_sampler, make_policy
from genpolicy.training.build import control_model, make_data, make_model, make_rewards
from genpolicy.training.experiment import finished, spent, train
from genpolicy.training.prepare import evaluation_prompts
from genpolicy.training.processes import end_processes


def run(args: Namespace) -> int:
    """Trains every config with every seed, one run's folder each under --out/NAME/seed-S, then
    writes the comparison.

    What is finished already is left as it is, what was interrupted is resumed. Raises
    `ConfigError`, before anything is trained, if the arms differ in what must be the same, and says
    in what.
    """
    out, all_seeds = Path(args.out), seeds(args.seeds)
    arms = [_arm(path, args.overrides, args.trust) for path in args.configs]
    _require_comparable(arms)
    asked = [(arm, seed, out / arm.name / f"seed-{seed}") for seed in all_seeds for arm in arms]
    complete = _train(asked)
    if complete and os.environ.get("RANK", "0") == "0":
        _write([_read(arm.name, seed, folder) for arm, seed, folder in asked], out)
    end_processes()
    return 0


def seeds(text: str) -> list[int]:
    """The distinct seeds of a text like "0-2" or "0,3,7"."""
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        if not (low.isdigit() and (high.isdigit() or not dash)) or (dash and int(high) < int(low)):
            raise ConfigError(f"--seeds is {text!r}; it must be like 0-2 or 0,3,7")
        found += range(int(low), int(high or low) + 1)
    return list(dict.fromkeys(found))


def _train(asked: Sequence[tuple[Arm, int, Path]]) -> bool:
    """Trains every run that is not finished; returns False where a signal stopped one."""
    begun = {folder for _, _, folder in asked if (folder / "config.yaml").is_file()}
    for arm, seed, folder in asked:
        _require_same(_with(arm, seed, folder), folder)
    for place, (arm, seed, folder) in enumerate(asked, 1):
        print(f"[{place}/{len(asked)}] {arm.name}, seed {seed}: {folder}", file=sys.stderr)
        if finished(folder):
            continue
        experiment = folder / "config.yaml" if folder in begun else _with(arm, seed, folder)
        result = train(experiment, trust=arm.origin.trust)
        gc.collect()  # one model at a time
        if not spent(result.summary):
            print("stopped; the same command goes on from here", file=sys.stderr)
            return False
    return True


def _write(runs: Sequence[Finished], out: Path) -> None:
    """Writes the table, as JSON and for people, and the figure; prints the table."""
    table = summarise(runs)
    metrics_file.write_json(out / "compare.json", table)
    text = markdown(table)
    whole_file.write_text(out / "compare.md", text)
    figure(runs, table, out / "compare.png")
    print(f"{text}\n{out / 'compare.md'}, {out / 'compare.json'}, {out / 'compare.png'}")


# Before


def _arm(path: str, overrides: Sequence[str], trust: bool) -> Arm:
    experiment = parse.load(path, overrides)
    file = shipped.find_config(path)
    return Arm(file.stem, experiment, Origin(trust=trust, folder=str(file.parent)))


def _with(arm: Arm, seed: int, folder: Path) -> Experiment:
    return replace(arm.experiment, seed=seed, output=str(folder))


def _require_comparable(arms: Sequence[Arm]) -> None:
    """Raises unless the arms' names differ, their start, evaluation and budget are the same, and
    every arm can be built.
    """
    first = arms[0]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two of the configs are called {name}: arms are told apart by their file names"
            )
    for arm in arms:
        for what, value in _shared(arm).items():
            other = _shared(first)[what]
            if value != other:
                place = _difference(other, value)
                raise ConfigError(
                    f"{first.name} and {arm.name} can't be compared: their {what} differs{place}"
                )
    task = make("tasks", first.experiment.task, first.origin)
    for arm in arms:
        experiment, origin = arm.experiment, arm.origin
        make("methods", experiment.method, origin)
        if is_control(task):
            data = make_data(experiment.data, origin)
            model = control_model(experiment.policy, task, data, origin)
            make_policy(model, experiment.chain, origin=origin)
        else:
            make_rewards(experiment.reward, origin)
    if not is_control(task):
        model = make_model(first.experiment.policy, first.origin)
        for arm in arms:
            make_policy(model, arm.experiment.chain, origin=arm.origin)


def _shared(arm: Arm) -> dict[str, Any]:
    """The settings that must be the same for a comparison to mean anything, by what they are
    called.

    Where a policy acts it is deployed with the mean of the kernel that it was trained with: that
    may differ, but not what a decision costs.
    """
    experiment, evaluation = arm.experiment, arm.experiment.eval
    task = make("tasks", experiment.task, arm.origin)
    shared: dict[str, Any] = {
        "start (the policy section)": experiment.policy,
        "budget": asdict(experiment.budget),
    }
    sampler = asdict(deployed_sampler(experiment.chain, evaluation.sampler, is_control(task)))
    if is_control(task):
        shared["task"] = experiment.task
        shared["evaluation set"] = {
            "episodes": evaluation.episodes,
            "seed": evaluation.seed,
        }
        shared["evaluated sampler"] = {"steps": sampler["steps"]}
    else:
        prompts = evaluation_prompts(experiment, task)
        shared["evaluation set"] = {
            "prompts": prompts,
            "samples": evaluation.samples,
            "seed": evaluation.seed,
        }
        shared["evaluated sampler"] = sampler
    return shared


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], above: str = "") -> str:
    """The text ' in KEY (A and B)' of the first key that differs, or ''."""
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if a != b and isinstance(a, Mapping) and isinstance(b, Mapping):
            return _difference(a, b, f"{above}{key}.")
        if a != b:
            return f" in {above}{key}" + (f" ({a} and {b})" if len(f"{a}{b}") < 80 else "")
    return ""


def _require_same(experiment: Experiment, folder: Path) -> None:
    """Raises unless the run that is there already, if any, is the one that is asked for."""
    file = folder / "config.yaml"
    if not file.is_file():
        return
    there = parse.read_yaml(file)
    asked = yaml_value(parse.to_yaml(experiment), "the experiment")
    if there != asked:
        place = _difference(there, asked)
        raise ConfigError(
            f"{folder} holds a run of another experiment, they differ{place}: choose another --out"
        )


def _read(arm: str, seed: int, folder: Path) -> Finished:
    experiment = parse.read_yaml(folder / "config.yaml")
    summary = metrics_file.read_sealed(folder / "summary.json")
    for number in metrics_file.damaged(folder):
        print(f"{folder / metrics_file.METRICS}: line {number} is damaged and left out")
    return Finished(arm, seed, folder, experiment, summary, metrics_file.read(folder))
