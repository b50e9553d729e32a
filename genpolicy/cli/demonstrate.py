"""The verb demonstrate: records an expert's or a policy's episodes of a task as a data set."""

from argparse import Namespace
from pathlib import Path

from genpolicy.cli.options import NOISE
from genpolicy.cli.sections import named_task, task_section
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import Origin
from genpolicy.rollout.demonstrations import demonstrate


def run(args: Namespace) -> int:
    """Records ``args.episodes`` episodes into --out, or to where the YAML's data section looks."""
    task, origin = task_section(args, {}, Origin(trust=args.trust))
    data = named_task(args.task).get("data")
    out = args.out or (data.get("root") if isinstance(data, dict) else None)
    if out is None:
        raise ConfigError(f"{args.task} does not say where its data set is: give --out DIR")
    noise = args.noise
    if noise is None:
        noise = NOISE if args.by is None else 0.0
    done = demonstrate(
        task,
        Path(out),
        episodes=args.episodes,
        noise=noise,
        seed=args.seed,
        policy=args.by,
        origin=origin,
    )
    kept = f"{done.episodes} episodes of {done.tried} tried, {done.successes} of them successful"
    print(f"{out}: {kept}, {done.frames} frames")
    return 0
