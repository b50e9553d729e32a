"""An experiment from its YAML to its result: claim the folder, build what it names, train, or only
rehearse.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import genpolicy
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import Experiment
from genpolicy.contracts.reward import RewardError
from genpolicy.evaluation import curves, metrics_file
from genpolicy.training import checkpoint, loop
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import start_processes
from genpolicy.training.rehearsal import Rehearsal
from genpolicy.training.run import Run


@dataclass(frozen=True)
class Result:
    """The result of `train`: the run's folder, the evaluations before and after, and the whole
    summary.
    """

    folder: Path
    before: dict[str, Any]
    after: dict[str, Any]
    summary: dict[str, Any]


def train(experiment: Experiment | str | Path, overrides: Sequence[str] = ()) -> Result:
    """Run an experiment (an `Experiment`, a YAML's path, or a shipped config's name) to the end of
    its budget.

    A run's own config.yaml resumes that run. Raises `ConfigError` before any work starts if
    something does not fit.
    """
    started = time.perf_counter()
    resume, folder = False, None
    if not isinstance(experiment, Experiment):
        own = Path(experiment)
        resume = _is_run(own)
        folder = own.parent if resume else None
        experiment = parse.load(own, overrides)
        if resume:
            _require_own_output(own, experiment)
    folder = folder or Path(experiment.output)
    processes = start_processes(experiment, folder)
    with _folder(folder, resume) if processes.main else contextlib.nullcontext():
        run, method = prepare(experiment, folder, processes)
        if experiment.trackers:  # now, not before: they write into the folder
            processes.start_trackers(parse.to_yaml(experiment))
        with run:
            method.train(run)
            return _finish(run, time.perf_counter() - started)


def _finish(run: Run, wall_time: float) -> Result:
    """The last evaluation, the figures and summary.json."""
    after, spent = loop.conclude(run), run.spent
    summary = {
        "asked": dataclasses.asdict(run.experiment.budget),
        "iterations": run.iteration,
        "over": spent.over,
        "before": run.deployment.before,
        "after": after,
        "wall_time_s": wall_time,
        "training_s": spent.seconds,
        "evaluations": spent.evaluations,
        "env_decisions": spent.env_decisions,
        "env_steps": spent.env_steps,
        "replay_gap": run.replay_check.gap,
        "seeds": {"run": run.experiment.seed, "eval": run.experiment.eval.seed},
        "processes": run.processes.count,
        "versions": {"python": platform.python_version(), **versions()},
    }
    if run.processes.main:
        curves.figures(run.folder)
        metrics_file.write_json(run.folder / "summary.json", summary)
    run.processes.finish_trackers()
    return Result(run.folder, run.deployment.before, after, summary)


def rehearse(experiment: str | Path, overrides: Sequence[str] = ()) -> tuple[Experiment, Rehearsal]:
    """One real iteration of each of an experiment's stages, what they cost, and what its budget
    will; nothing is written.
    """
    asked = parse.load(experiment, overrides)
    cost = Rehearsal()
    with (
        tempfile.TemporaryDirectory() as nowhere
    ):  # episodes that a method keeps are written down as they end
        processes = start_processes(asked, None)
        run, method = prepare(asked, Path(nowhere), processes, rehearsal=cost)
        with run:
            method.train(run)
    cost.project(asked)
    return asked, cost


@contextlib.contextmanager
def _folder(folder: Path, resume: bool) -> Iterator[None]:
    """Hold the run's folder. A new run that fails on bad input in its first iteration, or before,
    leaves nothing behind.
    """
    existed = folder.exists()
    if not resume and (folder / "config.yaml").exists():
        raise ConfigError(
            f"folder {folder} holds a run already: resume it with genpolicy train"
            f" {folder}/config.yaml, or choose another output"
        )
    if existed and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file: choose another output")
    if not resume and existed and any(path.name != checkpoint.LOCK for path in folder.iterdir()):
        raise ConfigError(f"folder {folder} is not empty and holds no run: choose another output")
    with checkpoint.locked(folder):
        try:
            yield
        except BaseException as error:
            nothing = not (folder / "checkpoints").exists() or isinstance(
                error, ConfigError | RewardError | OSError
            )
            if (
                not resume
                and nothing
                and not any(m["iteration"] for m in metrics_file.read(folder))
            ):
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                if not existed:
                    folder.rmdir()
            raise


def _require_own_output(path: Path, asked: Experiment) -> None:
    """Raise `ConfigError` where a run's own config.yaml is to be trained into another folder."""
    folder = path.parent
    if asked.output != parse.load(path).output and Path(asked.output).resolve() != folder.resolve():
        raise ConfigError(
            f"output is {asked.output}, and {path} resumes the run in its own folder: leave output"
            f" out, or begin another run from {folder / 'policy'} with a config of its own"
        )


def _is_run(path: Path) -> bool:
    """True for a run's own config.yaml."""
    return path.name == "config.yaml" and (path.parent / checkpoint.LOCK).is_file()


def finished(folder: Path) -> bool:
    """True where the run in a folder has spent its budget
    (one that was stopped has a summary too).
    """
    file = folder / "summary.json"
    return file.is_file() and spent(json.loads(file.read_text(encoding="utf-8")))


def spent(summary: Mapping[str, Any]) -> bool:
    """True where a run with this summary has spent its budget."""
    # the other limits are called in the summary what the budget calls them
    done = {
        **{name: name for name in summary["asked"]},
        "nfe": "evaluations",
        "seconds": "training_s",
    }
    return summary["over"] or any(
        limit and summary[done[name]] >= limit for name, limit in summary["asked"].items()
    )


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")
    return {
        "genpolicy": genpolicy.__version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }
