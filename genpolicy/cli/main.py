"""The door: `genpolicy VERB`. A verb's own file is imported only when it is asked for, so that
--help answers at once.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module

from genpolicy.cli.options import command_line
from genpolicy.config.errors import GO_ON, OUTSIDE, ConfigError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell gives it."""
BAD_INPUT = 2
"""Exit code after bad input, as argparse gives it."""
FAILED = 1
"""Exit code after a program that code which is not ours has ended."""
OURS = {
    "genpolicy.contracts.reward": "RewardError",
    "genpolicy.contracts.task": "TaskError",
}
"""Errors that are one sentence, by the module that they are in; it brings torch, and is not
imported for their sake.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code: 0, 1 for a law that fails and for a program that
    something else has ended, 2 for bad input, 130 when interrupted.
    """
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
        return _run(args)
    except SystemExit as end:  # argparse's
        return int(end.code or 0)
    except KeyboardInterrupt as error:
        print(f"genpolicy: interrupted{_way_on(error)}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `genpolicy list ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"genpolicy: {sentence}{_way_on(error)}", file=sys.stderr)
        return BAD_INPUT


def _run(args: Namespace) -> int:
    """Runs the verb; code that is not ours and calls sys.exit has not done what was asked for."""
    try:
        return import_module(f"genpolicy.cli.{args.module}").run(args)
    except SystemExit as end:
        print(f"genpolicy: sys.exit({end.code!r}) was called{_way_on(end)}", file=sys.stderr)
        return FAILED


def _sentence(error: Exception) -> str | None:
    """The sentence to say instead of a traceback; None for an error that is not about bad input
    or numbers that are not finite.
    """
    # training that is no longer finite stops itself with a sentence
    known: list[type[Exception]] = [ConfigError, OSError, FloatingPointError]
    for module, name in OURS.items():
        if module in sys.modules:
            known.append(getattr(sys.modules[module], name))
    if not isinstance(error, tuple(known)) or OUTSIDE in _notes(error):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())


def _way_on(error: BaseException) -> str:
    """The end of a message: the command that resumes the run, where there is one to resume."""
    return "".join(f"; {note}" for note in _notes(error) if note.startswith(GO_ON))


def _notes(error: BaseException) -> Sequence[str]:
    return getattr(error, "__notes__", ())
