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

import torch

import genpolicy
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError, choice
from genpolicy.config.leaves import make
from genpolicy.config.schema import Experiment
from genpolicy.contracts.reward import RewardError
from genpolicy.contracts.task import Task
from genpolicy.evaluation import curves, metrics_file
from genpolicy.policy.files import completed, load_parts
from genpolicy.policy.sampler import make_policy, require_trainable
from genpolicy.rollout.micro_batch import MicroBatches
from genpolicy.rollout.store import EpisodeStore
from genpolicy.training import checkpoint, loop
from genpolicy.training.build import (
    control_model,
    load_rewards,
    make_data,
    make_rewards,
    prompt_lines,
)
from genpolicy.training.collector import Collector
from genpolicy.training.display import Display
from genpolicy.training.episode_collector import EpisodeCollector
from genpolicy.training.evaluator import EpisodeEvaluator, Evaluator, PromptEvaluator
from genpolicy.training.iteration_metrics import IterationMetrics
from genpolicy.training.processes import Processes, start_processes
from genpolicy.training.prompt_collector import PromptCollector
from genpolicy.training.rehearsal import Rehearsal
from genpolicy.training.requirements import (
    Needs,
    require_chain,
    require_kind,
    require_sections,
    world_of,
)
from genpolicy.training.run import Method, Run
from genpolicy.training.workspace import Workspace


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
        resume = _is_run(Path(experiment))
        folder = Path(experiment).parent if resume else None
        experiment = parse.load(experiment, overrides)
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


def _is_run(path: Path) -> bool:
    """True for a run's own config.yaml."""
    return path.name == "config.yaml" and (path.parent / checkpoint.LOCK).is_file()


def finished(folder: Path) -> bool:
    """True where the run in a folder has spent its budget (one that was stopped has a summary too)."""
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


def evaluation_prompts(experiment: Experiment, task: Task) -> tuple[str, ...]:
    """The prompts of the evaluation set: its own file's, or the task's first ones, each once."""
    if experiment.eval.prompts is not None:
        return prompt_lines(experiment.eval.prompts)
    return tuple(dict.fromkeys(task.reset(range(experiment.eval.samples)).prompts))


def required(method: Method) -> Needs:
    """A method's needs; `ConfigError` where it states none."""
    needs = getattr(method, "needs", None)
    if not isinstance(needs, Needs):
        raise ConfigError(
            f"method {type(method).__name__} does not say what it needs: give its class the"
            " attribute needs = genpolicy.training.requirements.Needs(...)"
        )
    return needs


def prepare(
    experiment: Experiment, folder: Path, processes: Processes, rehearsal: Rehearsal | None = None
) -> tuple[Run, Method]:
    """Build everything an experiment names; what does not fit raises before any work starts.

    rehearsal: records one iteration of each stage in the place of the loop.
    """
    experiment = dataclasses.replace(experiment, policy=completed(experiment.policy))
    require_trainable(experiment.chain)
    torch.manual_seed(experiment.seed)
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    method = make("methods", experiment.method)
    task: Any = make("tasks", experiment.task)
    name, needs = str(experiment.method["name"]), required(method)
    world = world_of(task)
    require_sections(name, needs, world, experiment.data is not None)
    data = make_data(experiment.data)
    require_kind(world, data)
    # what every run has, and what the two worlds have each
    metrics, display = IterationMetrics(), Display(experiment, folder, processes.main)
    micro_batches = MicroBatches(experiment.micro_batch, display.say)
    workspace = Workspace(folder, processes, metrics, micro_batches, display)
    seed, settings = experiment.seed, experiment.eval
    collector: Collector
    evaluator: Evaluator
    if world == "robots":
        if experiment.reward:
            raise ConfigError(
                f"task {experiment.task['name']} brings its own reward: leave the reward section"
                " out"
            )
        model = control_model(experiment.policy, task, data)
        environments = task.environments(experiment.environments, model.history)
        evaluator = EpisodeEvaluator(environments, task.has_success, settings)
        circumstances = repr((experiment.task, experiment.chain, experiment.environments))
        store = EpisodeStore(folder)
        collector = EpisodeCollector(seed, circumstances, environments, processes, metrics, store)
    else:
        reward = make_rewards(experiment.reward)
        evaluator = PromptEvaluator(reward, evaluation_prompts(experiment, task), settings)
        load_rewards(reward)
        model = make("models", experiment.policy)
        collector = PromptCollector(seed, task, reward, processes, metrics, micro_batches)
    choice("eval: select", settings.select or evaluator.measured[0], evaluator.measured)
    policy = make_policy(model, experiment.chain, load_parts(experiment.policy, model))
    require_chain(name, needs, policy)
    run = Run(
        experiment,
        policy,
        task,
        collector,
        evaluator,
        workspace,
        data=data,
        iterate=loop.iterations if rehearsal is None else rehearsal.record,
        rehearsal=rehearsal is not None,
    )
    return run, method
