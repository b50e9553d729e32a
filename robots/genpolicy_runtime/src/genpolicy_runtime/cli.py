"""The command `genpolicy-runtime`: an exported policy in words, and its latency on this machine."""

import argparse
import sys
from collections.abc import Sequence

from genpolicy_runtime import __version__
from genpolicy_runtime.bench import HEAD, MODES, Timing, measure
from genpolicy_runtime.errors import ExportError, plain
from genpolicy_runtime.manifest import RATES
from genpolicy_runtime.policy import THREADS, Policy
from genpolicy_runtime.providers import PROVIDERS
from genpolicy_runtime.words import words

LONGEST = 3600.0
"""Seconds that one line of `bench` is measured, at most."""
BAD_INPUT = 2
"""Exit code after bad input, as argparse gives it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code: 0, or 2 after one sentence about what is wrong."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except ExportError as error:
        print(f"genpolicy-runtime: {plain(str(error))}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="genpolicy-runtime",
        description="Runs policies that `genpolicy export` wrote, without torch.",
    )
    parser.add_argument("--version", action="version", version=f"genpolicy-runtime {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    text = "Check every file of an exported policy and print its manifest in words."
    check = verbs.add_parser("check", help=text, description=text)
    check.set_defaults(run=_check)
    check.add_argument("folder", metavar="DIR", help="what `genpolicy export` wrote")

    text = "Measure in real time whether an exported policy keeps up with a robot on this machine."
    bench = verbs.add_parser("bench", help=text, description=text)
    bench.set_defaults(run=_bench)
    bench.add_argument("folder", metavar="DIR", help="what `genpolicy export` wrote")
    bench.add_argument("--hz", type=_rate, help="ticks per second (default: the policy's own)")
    bench.add_argument(
        "--seconds",
        type=_seconds,
        default=5.0,
        help="that each line is measured (default: %(default)g)",
    )
    bench.add_argument(
        "--threads",
        type=_threads,
        nargs="+",
        default=[1],
        metavar="N",
        help="threads of the CPU, a number for each pair of lines (default: 1)",
    )
    bench.add_argument(
        "--provider", choices=PROVIDERS, default="cpu", help="(default: %(default)s)"
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    policy = Policy.load(args.folder)
    print(f"{plain(args.folder)} is whole, and onnxruntime reads it.")
    for line in words(policy.manifest):
        print(plain(line))


def _bench(args: argparse.Namespace) -> None:
    timings: list[Timing] = []
    for threads in args.threads:
        policy = Policy.load(args.folder, args.provider, threads)
        hz = args.hz or policy.manifest.rate_hz
        if hz is None:
            raise ExportError(f"{args.folder} names no rate of its own: say --hz RATE")
        if not timings:
            print(f"{hz:g} Hz: an action every {1000 / hz:.3f} ms, on {args.provider}")
            print(HEAD)
        for mode in MODES:
            timings.append(measure(policy, threads, mode, hz, args.seconds))
            print(timings[-1].line(), flush=True)
    fit = [f"{one.threads} threads, {one.mode}" for one in timings if one.misses == 0]
    print(f"Never late: {'; '.join(fit) or 'none of these settings'}.")


def _rate(text: str) -> float:
    least, most = RATES
    value = float(text)
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is no rate from {least:g} to {most:g} Hz")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {LONGEST:g}")
    return value


def _threads(text: str) -> int:
    value = int(text)
    if not 1 <= value <= THREADS:
        raise argparse.ArgumentTypeError(f"{text} is not a number of threads: 1 to {THREADS}")
    return value
