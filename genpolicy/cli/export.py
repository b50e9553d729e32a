"""The verb export: a policy in another format, with the sampler that is deployed or asked for."""

import inspect
import sys
from argparse import Namespace
from pathlib import Path

from genpolicy.cli.sections import sampler_keys
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf, make
from genpolicy.config.origin import PERSON
from genpolicy.contracts.dataset import Dataset, Pictures
from genpolicy.contracts.task import ControlTask, is_control
from genpolicy.formats.onnx import is_export
from genpolicy.policy.files import Saved, saved
from genpolicy.training.build import make_data


def run(args: Namespace) -> int:
    """Writes the policy as ``args.format`` to the folder ``args.out``."""
    write = leaf("formats", args.format, PERSON)
    more = {} if args.precision is None else {"precision": args.precision}
    if not more.keys() <= inspect.signature(write).parameters.keys():
        raise ConfigError(f"--precision does not apply to --format {args.format}")
    if is_export(Path(args.policy)):
        raise ConfigError(
            f"{args.policy} is an export already: export the run or the policy that it came from"
        )
    found = saved(args.policy, trust=args.trust, **sampler_keys(args))
    data, task = known(found)
    out, told = Path(args.out), args.instruction
    print(write(found, out, data=data, task=task, instruction=told, **more))
    return 0


def known(found: Saved) -> tuple[Dataset | None, ControlTask | None]:
    """The recorded episodes and the task of the run that made a policy that acts, as far as they
    are still there; what is not is said on the error stream.
    """
    if found.run is None or not found.acts:
        return None, None
    config = found.run / "config.yaml"
    experiment, origin = parse.load(config), found.origin.reached(config)
    data, task = None, None
    try:
        made = make_data(experiment.data, origin)
        data = None if isinstance(made, Pictures) else made
    except (ConfigError, OSError) as error:
        print(f"without the run's recorded episodes: {error}", file=sys.stderr)
    try:
        asked = make("tasks", experiment.task, origin)
        task = asked if is_control(asked) else None
    except (ConfigError, OSError) as error:
        print(f"without the run's task: {error}", file=sys.stderr)
    return data, task
