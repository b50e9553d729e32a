"""Calls of code that is not ours, a task's or a reward's: it may hang, end the program, or fail."""

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from genpolicy.config.errors import OUTSIDE


class _Expired(BaseException):
    """The end of a call's time; no code that tries again after any `Exception` sees it."""


@contextmanager
def outside(who: str, patience: float | None, failure: type[Exception]) -> Iterator[None]:
    """Calls what is not ours inside the block.

    who: names it in a sentence, "reward a". patience: seconds that the block may take; None is no
    limit, and in any thread but the main one there is none. A library that hangs with Python's lock
    held can't be interrupted: simulations that may do so belong into workers. Raises ``failure``
    with one sentence where the time is up, and where sys.exit was called, which would end the run
    as if it were done. An `OSError` is raised on with the note `OUTSIDE`.
    """
    try:
        with _limited(patience):
            yield
    except _Expired as error:
        # the last frame is that of the alarm, the one before it is where the call hangs
        place = traceback.extract_tb(error.__traceback__)[-2]
        raise failure(
            f"{who} has not answered for {patience:g} seconds"
            f" ({Path(place.filename).name}:{place.lineno}); patience: SECONDS in the experiment"
            " gives it longer"
        ) from None
    except SystemExit as error:
        raise failure(
            f"{who} has called sys.exit({error.code!r}): it must not end the run"
        ) from None
    except OSError as error:
        error.add_note(OUTSIDE)
        raise


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Raises `_Expired` inside the block when its time is up."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _expire)
    left = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, before)


def _expire(number: int, frame: FrameType | None) -> None:
    raise _Expired
