"""The door: `genpolicy VERB`. A verb's own file is imported only when it is asked for, so that
--help answers at once.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from genpolicy.cli.options import command_line
from genpolicy.config.errors import ConfigError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell gives it."""
BAD_INPUT = 2
"""Exit code after bad input, as argparse gives it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code: 0, 1 for a law that fails, 2 for bad input, 130 when
    interrupted.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a dotted leaf, mypkg.mod:fn, may lie beside the user's YAML
    try:
        parser = command_line()
        args, extra = parser.parse_known_args(argv)
        unknown = [word for word in extra if not word.startswith(args.keys)]
        if unknown:
            parser.error(
                f"{args.verb} does not take {unknown[0]!r}; "
                f"genpolicy {args.verb} --help shows what it does"
            )
        args.overrides = extra
        return import_module(f"genpolicy.cli.{args.module}").run(args)
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("genpolicy: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `genpolicy list ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"genpolicy: {sentence}", file=sys.stderr)
        return BAD_INPUT


def _sentence(error: Exception) -> str | None:
    """The sentence to say instead of a traceback; None for an error that is not about bad input
    or numbers that are not finite.
    """
    reward = sys.modules.get("genpolicy.contracts.reward")  # it brings torch: not for its sake
    # training that is no longer finite stops itself with a sentence
    known = (ConfigError, OSError, FloatingPointError)
    known += (reward.RewardError,) if reward is not None else ()
    if not isinstance(error, known):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())
