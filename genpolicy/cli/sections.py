"""Sections of an experiment as the command line gives them, for the verbs that take an option in
place of a YAML.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from genpolicy.config import leaves, parse, shipped
from genpolicy.config.errors import ConfigError, nearest
from genpolicy.config.origin import Origin


def sampler_keys(args: Namespace) -> dict[str, Any]:
    """The sampler's keys that --steps, --guidance and --sampler replace."""
    asked: dict[str, Any] = {
        key: getattr(args, key) for key in ("steps", "guidance") if getattr(args, key) is not None
    }
    for text in args.sampler:
        parse.override(asked, f"--{text}")
    return asked


def task_section(
    args: Namespace, default: Mapping[str, Any], origin: Origin
) -> tuple[dict[str, Any], Origin]:
    """The task section that is asked for by name or in a YAML, or else the default one, whose
    origin is given, with --task.key=value; empty where there is neither. And its origin.
    """
    raw: dict[str, Any] = {"task": dict(default)}
    if args.task is not None:
        raw, origin = {"task": named_task(args.task)["task"]}, Origin(trust=origin.trust)
        if Path(args.task).is_file():
            origin = replace(origin, folder=str(Path(args.task).parent))
    given: dict[str, Any] = {}
    for text in args.overrides:
        parse.override(raw, text)
        parse.override(given, text)
    return raw["task"], origin.naming(given)


def named_task(name: str) -> dict[str, Any]:
    """A YAML with a task section, or the same of a task's bare name."""
    tasks = leaves.names("tasks")
    if ":" in name or name in tasks:
        return {"task": {"name": name}}
    if Path(name).suffix not in shipped.SUFFIXES and name not in shipped.configs():
        raise ConfigError(
            f"there is no task {name!r}{nearest(name, tasks)}; or give a YAML with one"
        )
    raw = parse.read_yaml(name)
    if "task" not in raw:
        raise ConfigError(f"{name} has no task section")
    return raw if isinstance(raw["task"], dict) else {**raw, "task": {"name": raw["task"]}}
