"""An experiment from its YAML to its result: claim the folder, build what it names, train, or only
rehearse.
"""

import contextlib
import dataclasses
import importlib.metadata
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import genpolicy
from genpolicy.config import parse, shipped, whole_file
from genpolicy.config.errors import GO_ON, ConfigError
from genpolicy.config.origin import Origin
from genpolicy.config.schema import Experiment
from genpolicy.evaluation import curves, metrics_file
from genpolicy.rollout import store
from genpolicy.training import checkpoint, loop
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import start_processes
from genpolicy.training.rehearsal import Rehearsal
from genpolicy.training.run import Run
from genpolicy.training.workspace import CONFIG

SUMMARY = "summary.json"
"""In a run's folder: its costs and its first and last evaluation."""


@dataclass(frozen=True)
class Result:
    """The result of `train`: the run's folder, the evaluations before and after, and the whole
    summary.
    """

    folder: Path
    before: dict[str, Any]
    after: dict[str, Any]
    summary: dict[str, Any]


def train(
    experiment: Experiment | str | Path, overrides: Sequence[str] = (), *, trust: bool = False
) -> Result:
    """Run an experiment (an `Experiment`, a YAML's path, or a shipped config's name) to the end of
    its budget.

    trust: the policies and data that it names may import the code that they name, too.
    A run's own config.yaml resumes that run. Raises `ConfigError` before any work starts if
    something does not fit.
    """
    started = time.perf_counter()
    resume, folder, origin = False, None, Origin(trust=trust)
    if not isinstance(experiment, Experiment):
        resume = _is_run(Path(experiment))
        folder = Path(experiment).parent if resume else None
        experiment, origin = _read(experiment, overrides, trust)
    folder = folder or Path(experiment.output)
    processes = start_processes(experiment, folder)
    with _folder(folder, resume) if processes.main else contextlib.nullcontext():
        run, method = prepare(experiment, folder, processes, origin=origin)
        with run:
            method.train(run)
            return _finish(run, time.perf_counter() - started)


def _read(path: str | Path, overrides: Sequence[str], trust: bool) -> tuple[Experiment, Origin]:
    """The experiment of a person's YAML, and its origin."""
    experiment = parse.load(path, overrides)
    return experiment, Origin(trust=trust, folder=str(shipped.find_config(path).parent))


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
        metrics_file.write_sealed(run.folder / SUMMARY, summary)
    run.processes.finish_trackers()
    return Result(run.folder, run.deployment.before, after, summary)


def rehearse(
    experiment: str | Path, overrides: Sequence[str] = (), *, trust: bool = False
) -> tuple[Experiment, Rehearsal]:
    """One real iteration of each of an experiment's stages, what they cost, and what its budget
    will; nothing is written.

    trust: as of `train`.
    """
    asked, origin = _read(experiment, overrides, trust)
    cost = Rehearsal()
    with (
        tempfile.TemporaryDirectory() as nowhere
    ):  # episodes that a method keeps are written down as they end
        processes = start_processes(asked, None)
        run, method = prepare(asked, Path(nowhere), processes, cost, origin)
        with run:
            method.train(run)
    cost.project(asked)
    return asked, cost


@contextlib.contextmanager
def _folder(folder: Path, resume: bool) -> Iterator[None]:
    """Hold the run's folder. A new run that fails before it has earned anything leaves nothing
    behind; any other stays, and the error ends with the command that resumes it.
    """
    existed = folder.exists()
    if not resume and (folder / CONFIG).exists():
        raise ConfigError(
            f"folder {folder} holds a run already: resume it with {_command(folder)}, or choose"
            " another output"
        )
    if existed and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file: choose another output")
    if not resume and existed and not all(map(_left_by_a_kill, folder.iterdir())):
        raise ConfigError(f"folder {folder} is not empty and holds no run: choose another output")
    with checkpoint.locked(folder):
        try:
            yield
        except BaseException as error:
            if _earned(folder):
                error.add_note(f"{GO_ON}{_command(folder)}")
            elif not resume:
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                if not existed:
                    folder.rmdir()
            raise


def _command(folder: Path) -> str:
    """The command that resumes a run."""
    return f"genpolicy train {folder / CONFIG}"


def _left_by_a_kill(path: Path) -> bool:
    """True for a file of a run that was killed before its config.yaml stood."""
    return path.name in (checkpoint.LOCK, f"{whole_file.STAGED}{CONFIG}")


def _earned(folder: Path) -> bool:
    """True where an evaluation, an episode or a checkpoint is on disk."""
    measured = folder / metrics_file.METRICS
    episodes = (folder / store.FOLDER).glob(f"*/{store.EPISODES}")
    return measured.is_file() or bool(checkpoint.iterations(folder)) or any(episodes)


def _is_run(path: Path) -> bool:
    """True for a run's own config.yaml, also where the run was copied without its dotfiles."""
    folder = path.parent
    return path.name == CONFIG and ((folder / checkpoint.LOCK).is_file() or _earned(folder))


def finished(folder: Path) -> bool:
    """True where the run in a folder has spent its budget (one that was stopped has a summary too);
    a run whose summary is damaged writes it again.
    """
    try:
        return spent(metrics_file.read_sealed(folder / SUMMARY))
    except (FileNotFoundError, ConfigError):
        return False


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
