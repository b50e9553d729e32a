"""The verb train: runs an experiment, or measures what it would cost."""

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from genpolicy.cli import plan_memory
from genpolicy.config import parse
from genpolicy.config.parse import to_yaml
from genpolicy.config.schema import Experiment
from genpolicy.training.experiment import rehearse, train
from genpolicy.training.processes import end_processes
from genpolicy.training.rehearsal import Rehearsal


def run(args: Namespace) -> int:
    """Trains, or only rehearses one iteration with --plan; the first process alone prints."""
    main_process = os.environ.get("RANK", "0") == "0"
    if args.plan:
        asked = parse.load(args.config, args.overrides)
        published = plan_memory.is_published(asked)
        if published and not plan_memory.is_here(asked):
            if main_process:
                _print_computed(asked)
            return 0
        experiment, cost = rehearse(args.config, args.overrides, trust=args.trust)
        end_processes()
        if main_process:
            _print_plan(experiment, cost)
            if published:
                print("\n".join(plan_memory.lines(experiment)))
        return 0
    result = train(args.config, args.overrides, trust=args.trust)
    end_processes()
    if main_process:
        print(f"{result.folder}: {_before_and_after(result.before, result.after)}")
    return 0


def _before_and_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The rewards, or success and return, that were measured both before and after training."""
    of_episodes = ("success_rate", "return")
    names = [
        name
        for name in after
        if (name.startswith("reward/") or name in of_episodes) and name in before
    ]
    return ", ".join(
        f"{name.removeprefix('reward/')} {before[name]:.3f} -> {after[name]:.3f}" for name in names
    )


def _print_computed(experiment: Experiment) -> None:
    """Prints the resolved experiment and its memory, where its weights are not on this machine."""
    print(to_yaml(experiment))
    print("\n".join(plan_memory.lines(experiment)))
    print(
        f"{experiment.policy['pretrained']} is not on this machine, so that no iteration was"
        " rehearsed; fetch it with hf download, and ask again"
    )


def _print_plan(experiment: Experiment, cost: Rehearsal) -> None:
    """Prints the resolved experiment, each stage's cost per iteration, and the whole budget's."""
    print(to_yaml(experiment))
    for stage in cost.stages:
        name = f" of {stage.stage}" if len(cost.stages) > 1 else ""
        print(
            f"one real iteration{name}: {stage.did}, "
            f"{stage.evaluations_per_sample:.1f} network evaluations each"
        )
        print(f"{'phase':>14} {'seconds':>9} {'peak GB':>8}")
        for phase, (seconds, gigabytes) in stage.phases.items():
            print(f"{phase:>14} {seconds:9.2f} {gigabytes:8.2f}")
    print(f"memory is {cost.memory}; the replay check is made once, at the first iteration")
    print(f"one evaluation: {cost.judged}, about {_duration(cost.evaluation_seconds)}")
    iterations = f"{cost.iterations} iterations, {cost.evaluations:.3g} network evaluations"
    print(f"the whole budget: {iterations}, about {_duration(cost.seconds)}, evaluation included")


def _duration(seconds: float) -> str:
    """A time in seconds below two minutes, in minutes below two hours, else in hours."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.1f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
