"""Runs that are killed before the n-th thing that they do to a file, and go on.

``python -m tests.killed JOBS`` reads a YAML list of [experiment, run's folder, [place, ...]]. It trains each experiment and
kills it before its place-th file operation; what is resumed is killed before the operation of the next place, and so on; a
place of 0 lets the run end. It prints, per job and place, the exit code and how many operations a run that ended has made.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import yaml

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
"""Audit events that change a folder; os.replace is os.rename's."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watched(run: Path, place: int) -> list[int]:
    """Kill this process before its ``place``-th operation on the files of ``run``; returns the running count."""
    made = [0]

    def count() -> None:
        made[0] += 1
        if made[0] == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if (writes or event in CHANGES) and str(arguments[0]).startswith(str(run)):
            count()

    honest = os.fsync

    def fsync(file: int) -> None:
        count()
        honest(file)

    os.fsync = fsync
    sys.addaudithook(audit)
    return made


def child(path: Path, run: Path, place: int) -> tuple[int, int]:
    """Train in a process of its own; its exit code, and the operations that it made if it came to its end."""
    from genpolicy.training.experiment import train

    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        made = watched(run, place)
        code = 1
        try:
            train(path)
            code = 0
        finally:
            os.write(writer, str(made[0]).encode())
            os._exit(code)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    made = os.read(reader, 100)
    os.close(reader)
    return code, int(made or b"0")


def main(jobs: str) -> None:
    """The parent never trains, so that its children may fork from it; libraries are imported once."""
    import genpolicy.methods.flow_grpo
    import genpolicy.methods.rl100
    import genpolicy.models.mlp  # noqa: F401
    from genpolicy.evaluation import curves

    curves.figures = lambda folder: None
    torch.set_num_threads(1)
    done = []
    for experiment, run, places in yaml.safe_load(Path(jobs).read_text()):
        config = Path(run) / "config.yaml"
        codes = []
        for place in places:
            codes.append(child(config if config.exists() else Path(experiment), Path(run), place))
        done.append([list(each) for each in codes])
    print(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1])
