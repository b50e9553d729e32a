"""An experiment from its YAML to its result: claim the folder, build what it names, train, or only rehearse."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import genpolicy
from genpolicy import checkpoint, config, report
from genpolicy.build import (
    control_model,
    load_rewards,
    make_data,
    make_policy,
    make_rewards,
    prompt_lines,
    require_trainable,
)
from genpolicy.config import ConfigError, Experiment, choice, make
from genpolicy.exam import ControlExam, Exam, PromptExam
from genpolicy.rescore import CHECK
from genpolicy.reward import RewardError
from genpolicy.run import Method, Run, start_processes
from genpolicy.task import Task, is_control

REHEARSED = 1000
"""The iteration that a rehearsal is: past any warm-up, which costs less than what follows."""


@dataclass(frozen=True)
class Result:
    """What `train` returns: the run's folder, the evaluations before and after, and the whole summary."""

    folder: Path
    before: dict[str, Any]
    after: dict[str, Any]
    summary: dict[str, Any]


@dataclass
class Rehearsal:
    """What one real iteration cost, and what the budget will: all processes together, seconds of wall-clock.

    samples: of prompts, or decisions, or recorded frames that were learned from; ``did`` says it in words, and ``judged``
    what an evaluation is of. phases: name -> (seconds, peak GB of memory). memory: whose. evaluation_seconds: of one
    evaluation, extrapolated from sampling, or from a few episodes. iterations, evaluations, seconds: of the whole
    budget, with its evaluations of the policy.
    """

    memory: str = "the accelerator's, peak of the phase" if torch.cuda.is_available() else "this process's, peak so far"
    samples: int = 0
    evaluations_per_sample: float = 0.0
    env_steps: float = 0.0
    did: str = ""
    judged: str = ""
    total_seconds: float = 0.0
    phases: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    evaluation_seconds: float = 0.0
    iterations: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0

    def record(self, run: Run) -> Iterator[int]:
        """Stand in for `Run.iterations`: one iteration on the real sizes, and the weights as they were."""
        weights, evaluations = run.snapshot(), run.policy.model.evaluations
        run.iteration, started = REHEARSED, time.perf_counter()
        yield REHEARSED
        run.journal.phase(None)
        self.total_seconds = time.perf_counter() - started
        self.samples = run.journal.collected * run.processes.count
        self.env_steps = run.journal.env_steps * run.processes.count
        self.evaluations_per_sample = (run.policy.model.evaluations - evaluations) / max(run.journal.collected, 1)
        self.phases = {name: (spent, run.journal.memory[name]) for name, spent in run.journal.clock.items()}
        run.restore(weights)
        settings = run.experiment.eval
        if isinstance(run.exam, ControlExam):
            lived = f"{self.samples} decisions in {self.env_steps:.0f} environment steps"
            self.did = lived if self.env_steps else f"{self.samples} recorded frames"
            self.judged = f"{settings.episodes} episodes"
            few = min(run.environments.count, settings.episodes)  # type: ignore[union-attr]  # the exam plays in them
            exam = dataclasses.replace(run.exam, settings=dataclasses.replace(settings, episodes=few))
            started = time.perf_counter()
            exam(run.deployed, run.processes, run.micro_batches, run.folder)
            self.evaluation_seconds = (time.perf_counter() - started) * settings.episodes / few
        else:
            self.did, self.judged = f"{self.samples} samples", f"{settings.samples} samples"
            drawn = sum(self.phases.get(name, (0.0, 0.0))[0] for name in ("sample", "decode", "reward"))
            self.evaluation_seconds = drawn * settings.samples / self.samples

    def project(self, experiment: Experiment) -> None:
        """Extrapolate to the budget: the replay check is made once, everything else at each iteration."""
        b, e = experiment.budget, experiment.eval
        once = self.phases.get(CHECK, (0.0, 0.0))[0]
        each, nfe = self.total_seconds - once, self.evaluations_per_sample * self.samples
        limits = [(b.iterations, 1), (b.nfe, nfe), (b.seconds, each), (b.env_decisions, self.samples)]
        limits.append((b.env_steps, self.env_steps or math.inf))
        self.iterations = math.ceil(min(limit / cost for limit, cost in limits if limit is not None))
        self.evaluations = self.iterations * nfe
        evaluations = 2 + (max(self.iterations - 1, 0) // e.every if e.every else 0)
        self.seconds = once + self.iterations * each + evaluations * self.evaluation_seconds


def train(experiment: Experiment | str | Path, overrides: Sequence[str] = ()) -> Result:
    """Run an experiment (an `Experiment`, a YAML's path, or a shipped config's name) to the end of its budget.

    A run's own config.yaml resumes that run. Raises `ConfigError` before any work starts if something does not fit.
    """
    started = time.perf_counter()
    resume, folder = False, None
    if not isinstance(experiment, Experiment):
        resume = _is_run(Path(experiment))
        folder = Path(experiment).parent if resume else None
        experiment = config.load(experiment, overrides)
    folder = folder or Path(experiment.output)
    accelerator = start_processes(experiment, folder)
    with _folder(folder, resume) if accelerator.is_main_process else contextlib.nullcontext():
        run, method = prepare(experiment, folder, accelerator)
        if experiment.trackers:  # now, not before: they write into the folder
            accelerator.init_trackers("genpolicy", config={"experiment": config.to_yaml(experiment)})
        with run:
            method.train(run)
            return _finish(run, time.perf_counter() - started)


def _finish(run: Run, wall_time: float) -> Result:
    """The last evaluation, the figures and summary.json."""
    after = run.conclude()
    summary = {
        "asked": dataclasses.asdict(run.experiment.budget),
        "iterations": run.iteration,
        "over": run.over,
        "before": run.before,
        "after": after,
        "wall_time_s": wall_time,
        "training_s": run.seconds,
        "evaluations": run.evaluations,
        "env_decisions": run.env_decisions,
        "env_steps": run.env_steps,
        "replay_gap": run.replay_check.gap,
        "seeds": {"run": run.experiment.seed, "eval": run.experiment.eval.seed},
        "processes": run.processes.count,
        "versions": {"python": platform.python_version(), **versions()},
    }
    if run.processes.main:
        report.figures(run.folder)
        report.write_json(run.folder / "summary.json", summary)
    for tracker in run.accelerator.trackers:
        tracker.finish()
    return Result(run.folder, run.before, after, summary)


def rehearse(experiment: str | Path, overrides: Sequence[str] = ()) -> tuple[Experiment, Rehearsal]:
    """One real iteration of an experiment, its costs, and what its budget will cost; nothing is written."""
    asked = config.load(experiment, overrides)
    run, method = prepare(asked, Path(asked.output), start_processes(asked, None))
    cost = Rehearsal()
    run.rehearse = cost.record
    with run:
        method.train(run)
    cost.project(asked)
    return asked, cost


@contextlib.contextmanager
def _folder(folder: Path, resume: bool) -> Iterator[None]:
    """Hold the run's folder. A new run that fails on bad input in its first iteration, or before, leaves nothing
    behind.
    """
    existed = folder.exists()
    if not resume and (folder / "config.yaml").exists():
        raise ConfigError(
            f"folder {folder} holds a run already: resume it with genpolicy train {folder}/config.yaml, or choose another output"
        )
    if existed and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file: choose another output")
    if not resume and existed and any(path.name != checkpoint.LOCK for path in folder.iterdir()):
        raise ConfigError(f"folder {folder} is not empty and holds no run: choose another output")
    with checkpoint.locked(folder):
        try:
            yield
        except BaseException as error:
            nothing = not (folder / "checkpoints").exists() or isinstance(error, ConfigError | RewardError | OSError)
            if not resume and nothing and not any(m["iteration"] for m in report.read(folder)):
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                if not existed:
                    folder.rmdir()
            raise


def _is_run(path: Path) -> bool:
    """Whether a path is a run's own config.yaml."""
    return path.name == "config.yaml" and (path.parent / checkpoint.LOCK).is_file()


def finished(folder: Path) -> bool:
    """Whether the run in a folder has spent its budget (one that was stopped has a summary too)."""
    file = folder / "summary.json"
    return file.is_file() and spent(json.loads(file.read_text(encoding="utf-8")))


def spent(summary: Mapping[str, Any]) -> bool:
    """Whether a run with this summary has spent its budget."""
    # the other limits are called in the summary what the budget calls them
    done = {**{name: name for name in summary["asked"]}, "nfe": "evaluations", "seconds": "training_s"}
    return summary["over"] or any(limit and summary[done[name]] >= limit for name, limit in summary["asked"].items())


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")
    return {"genpolicy": genpolicy.__version__, **{name: importlib.metadata.version(name) for name in packages}}


def evaluation_prompts(experiment: Experiment, task: Task) -> tuple[str, ...]:
    """The prompts of the evaluation set: its own file's, or the task's first ones, each once."""
    if experiment.eval.prompts is not None:
        return prompt_lines(experiment.eval.prompts)
    return tuple(dict.fromkeys(task.reset(range(experiment.eval.samples)).prompts))


def prepare(experiment: Experiment, folder: Path, accelerator: Any) -> tuple[Run, Method]:
    """Build everything an experiment names; what does not fit raises before any work starts."""
    require_trainable(experiment.chain)
    torch.manual_seed(experiment.seed)
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    method = make("methods", experiment.method)
    task = make("tasks", experiment.task)
    data = make_data(experiment.data)
    if is_control(task):
        model = control_model(experiment.policy, task, data)
        environments = task.environments(experiment.environments, model.history)
        exam: Exam = ControlExam(environments, task.has_success, experiment.eval)
        parts: dict[str, Any] = {"environments": environments, "data": data}
        if experiment.reward:
            raise ConfigError(f"task {experiment.task['name']} brings its own reward: leave the reward section out")
    else:
        reward = make_rewards(experiment.reward)
        exam = PromptExam(reward, evaluation_prompts(experiment, task), experiment.eval)
        parts = {"reward": reward}
        load_rewards(reward)
        model = make("models", experiment.policy)
    choice("eval: select", experiment.eval.select or exam.measured[0], exam.measured)
    policy = make_policy(model, experiment.chain)
    return Run(experiment, policy, task, exam, folder, accelerator, **parts), method
