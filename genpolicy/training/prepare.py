"""Builds all objects of an experiment and checks them against each other before work starts."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from genpolicy.config.errors import ConfigError, choice
from genpolicy.config.leaves import make
from genpolicy.config.origin import PERSON, Origin
from genpolicy.config.schema import Experiment
from genpolicy.contracts.dataset import Pictures
from genpolicy.contracts.model import EncodingModel
from genpolicy.contracts.task import Task
from genpolicy.policy.files import completed
from genpolicy.policy.parts_files import load_parts
from genpolicy.policy.sampler import (
    deployed_sampler,
    make_kernel,
    make_policy,
    require_trainable,
)
from genpolicy.policy.teacher import TEACHER, Taught, load_teacher, student
from genpolicy.rollout.guard import guarded
from genpolicy.rollout.micro_batch import MicroBatches
from genpolicy.rollout.store import EpisodeStore
from genpolicy.training import loop
from genpolicy.training.build import (
    control_model,
    load_rewards,
    make_data,
    make_model,
    make_rewards,
    prompt_lines,
)
from genpolicy.training.collector import Collector
from genpolicy.training.display import Display
from genpolicy.training.episode_collector import EpisodeCollector
from genpolicy.training.evaluator import EpisodeEvaluator, Evaluator, PromptEvaluator
from genpolicy.training.iteration_metrics import IterationMetrics
from genpolicy.training.processes import Processes, launch_remark
from genpolicy.training.prompt_collector import PromptCollector
from genpolicy.training.rehearsal import Rehearsal
from genpolicy.training.requirements import (
    Needs,
    expert_remark,
    require_chain,
    require_counts,
    require_kind,
    require_sections,
    require_shape,
    require_teacher,
    world_of,
)
from genpolicy.training.run import Method, Run
from genpolicy.training.workspace import Workspace

LATENTS = "latents"
"""In a run's folder: the events of pictures that a network of the model has encoded."""


def evaluation_prompts(experiment: Experiment, task: Task) -> tuple[str, ...]:
    """The prompts of the evaluation set: its own file's, or the task's first ones, each once."""
    if experiment.eval.prompts is not None:
        return prompt_lines(experiment.eval.prompts, "eval: prompts: ")
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
    experiment: Experiment,
    folder: Path,
    processes: Processes,
    rehearsal: Rehearsal | None = None,
    origin: Origin = PERSON,
) -> tuple[Run, Method]:
    """Build everything an experiment names; what does not fit raises before any work starts.

    rehearsal: records one iteration of each stage in the place of the loop.
    origin: of the experiment, which is the person's; what its policy and data sections name is not.
    """
    experiment = dataclasses.replace(experiment, policy=completed(student(experiment.policy)))
    require_trainable(experiment.chain, origin)
    make_kernel(deployed_sampler(experiment.chain, experiment.eval.sampler).kernel, origin)
    torch.manual_seed(experiment.seed)
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    method = make("methods", experiment.method, origin)
    task: Any = make("tasks", experiment.task, origin)
    name, needs = str(experiment.method["name"]), required(method)
    world = world_of(task)
    require_sections(name, needs, world, experiment.data is not None)
    require_teacher(name, needs, TEACHER in experiment.policy)
    require_counts(method, needs, processes)
    data = make_data(experiment.data, origin)
    require_kind(world, data)
    # what every run has, and what the two worlds have each
    metrics, display = IterationMetrics(processes), Display(experiment, folder, processes.main)
    micro_batches = MicroBatches(experiment.micro_batch, display.say)
    workspace = Workspace(folder, processes, metrics, micro_batches, display)
    seed, settings = experiment.seed, experiment.eval
    store = EpisodeStore(folder, display.say, for_good=experiment.record)
    collector: Collector
    evaluator: Evaluator
    if world == "robots":
        if experiment.reward:
            raise ConfigError(
                f"task {experiment.task['name']} brings its own reward: leave the reward section"
                " out"
            )
        model = control_model(experiment.policy, task, data, origin)
        environments = guarded(
            task,
            str(experiment.task["name"]),
            experiment.environments,
            model.history,
            experiment.patience,
        )
        evaluator = EpisodeEvaluator(environments, task.has_success, settings)
        circumstances = repr((experiment.task, experiment.chain, experiment.environments))
        collector = EpisodeCollector(
            seed,
            model,
            circumstances,
            environments,
            task,
            processes,
            metrics,
            store,
            experiment.record,
        )
    else:
        if experiment.record:
            raise ConfigError("record keeps what robots see: leave it out where prompts are drawn")
        reward = make_rewards(experiment.reward, origin, experiment.patience)
        evaluator = PromptEvaluator(reward, evaluation_prompts(experiment, task), settings)
        load_rewards(reward)
        model = make_model(experiment.policy, origin)
        collector = PromptCollector(
            seed, model, task, reward, processes, metrics, micro_batches, store
        )
    choice("eval: select", settings.select or evaluator.measured[0], evaluator.measured)
    parts = load_parts(experiment.policy, model, origin)
    policy = make_policy(model, experiment.chain, parts, origin=origin)
    require_chain(name, needs, policy)
    require_shape(model, data)
    if isinstance(data, Pictures) and isinstance(model, EncodingModel) and rehearsal is None:
        model.keep(folder / LATENTS)
    teacher = load_teacher(experiment.policy, origin, model)
    for remark in (launch_remark(processes), expert_remark(model)):
        if remark is not None:
            display.say(remark)
    run = Run(
        experiment,
        policy,
        task,
        collector,
        evaluator,
        workspace,
        data=data,
        teacher=teacher,
        iterate=loop.iterations if rehearsal is None else rehearsal.record,
        rehearsal=rehearsal is not None,
    )
    if teacher is not None:
        run.register(teacher=Taught(teacher))
    return run, method
