"""An object that lives in a process of its own and answers by messages."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import IO, Any

PATIENCE = 5.0
"""Seconds that a worker has to end by itself before it is killed."""
GLANCE = 1.0
"""Seconds between two looks of a worker at whether its parent still lives."""
BEGIN = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from genpolicy.tasks._workers import serve
serve(int(sys.argv[1]))
"""


class Worker:
    """The object that ``make`` makes, in a process of its own that ends when this one does.

    The process is a fresh Python that reads pickles from a pipe until the pipe closes. Other than
    multiprocessing's, it neither copies this process (its locks, its CUDA) nor runs the main script
    once more. ``make`` and all messages must pickle, by names that can be imported.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        first = pickle.dumps(sys.path) + pickle.dumps(make)
        self._process = subprocess.Popen(
            # -P: what lies in the current folder is no module before the path is set
            [sys.executable, "-P", "-c", BEGIN, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.close = weakref.finalize(self, _stop, self._process)
        self._send(first)

    def ask(self, verb: str, *arguments: Any) -> Callable[[], Any]:
        """Asks for a method's call; calling the result waits for the answer, or raises its
        exception.
        """
        self._send(pickle.dumps((verb, arguments)))
        return self.ready

    def ready(self) -> Any:
        """The oldest answer not yet taken; the first of all tells that ``make`` is done."""
        try:
            well, answer = pickle.load(_pipe(self._process.stdout))
        except (EOFError, pickle.UnpicklingError):
            raise self._gone() from None
        if not well:
            raise answer
        return answer

    def _send(self, message: bytes) -> None:
        pipe = _pipe(self._process.stdin)
        try:
            pipe.write(message)
            pipe.flush()
        except (BrokenPipeError, ValueError):  # it is gone, now or before: then the pipe is closed
            raise self._gone() from None

    def _gone(self) -> RuntimeError:
        self.close()
        code = self._process.returncode
        return RuntimeError(
            f"a process that simulates environments has ended unexpectedly (exit code {code})"
        )


def serve(parent: int) -> None:
    """Makes the object, then calls what is asked until the pipe closes: the life of a worker of the
    process ``parent``.
    """
    # these signals are for the parent, which may finish its iteration first
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a simulation prints must not stand between the answers
    made: list[Any] = []
    _answer(answers, lambda: made.append(pickle.load(sys.stdin.buffer)()))
    while made:
        try:
            verb, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            made.pop().close()
        else:
            _answer(answers, getattr(made[0], verb), *arguments)


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, also where a simulation hangs and nobody reads
    the pipe; one that hangs with Python's lock held does not let this thread look.
    """
    while os.getppid() == parent:
        time.sleep(GLANCE)
    os._exit(1)


def _answer(pipe: IO[bytes], call: Callable[..., Any], *arguments: Any) -> None:
    """Sends (True, the call's result) or (False, its exception, with the traceback as a note)."""
    try:
        message = pickle.dumps((True, call(*arguments)))
    except SystemExit as error:  # a simulation's; it must not look like a worker that was told to
        said = f"a simulation has called sys.exit({error.code!r})"
        message = pickle.dumps((False, RuntimeError(said)))
    except Exception as error:
        error.add_note(traceback.format_exc())
        message = pickle.dumps(
            (False, error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}"))
        )
    with contextlib.suppress(BrokenPipeError):  # nobody is left to tell, and the next read says so
        pipe.write(message)
        pipe.flush()


def _travels(error: Exception) -> bool:
    """Tells if an exception survives pickling; one that is built in an unusual way does not."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # Popen was asked for both
    return pipe


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):
        _pipe(process.stdin).close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _pipe(process.stdout).close()
