"""The verb compact: writes the episodes that a run has kept as one data set."""

from argparse import Namespace
from pathlib import Path

from genpolicy.rollout.compaction import compact


def run(args: Namespace) -> int:
    """Writes the journal of ``args.run`` as a data set into ``args.out``."""
    done = compact(Path(args.run), Path(args.out), trust=args.trust)
    print(
        f"{args.out}: {done.episodes} episodes of {done.iterations} iterations, {done.successes} of"
        f" them successful, {done.frames} frames, a person acted in {done.human}"
    )
    return 0
