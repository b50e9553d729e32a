"""The loop around a method's iterations: resume, count, log, evaluate, checkpoint, stop."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from genpolicy.config import parse, whole_file
from genpolicy.config.seal import marked
from genpolicy.evaluation import metrics_file
from genpolicy.training import resume
from genpolicy.training.run import Run
from genpolicy.training.stop_request import StopRequest
from genpolicy.training.workspace import CONFIG


def iterations(run: Run) -> Iterator[int]:
    """Yield 1, 2, ... until the budget is spent or a signal asks to stop."""
    resume.resume(run)
    if run.processes.main:
        whole_file.write_text(run.folder / CONFIG, marked(parse.to_yaml(run.experiment)))
    if run.experiment.trackers:  # now, not before: they write into the folder
        run.processes.start_trackers(parse.to_yaml(run.experiment))
    if run.iteration == 0 and not run.deployment.before:
        run.deployment.before = run.deployment.evaluate(0)
        resume.save(run)
    begun = run.iteration
    with StopRequest(run.say) as stop, run.display.bar(run.progress):
        while run.progress < 1 and not run.processes.sum(float(stop.asked)):
            started, counted = time.perf_counter(), run.policy.model.evaluations
            run.begin(run.iteration + 1)
            yield run.iteration
            run.state.require_claimed()
            evaluations = run.policy.model.evaluations - counted + run.metrics.evaluations
            _finish(run, _account(run, time.perf_counter() - started, evaluations))
        if stop.asked:
            run.say(
                f"stopped at iteration {run.iteration}; go on with"
                f" genpolicy train {run.folder / CONFIG}"
            )
        if run.iteration > begun:  # what was resumed and went no further is saved already
            resume.save(run)


def conclude(run: Run) -> dict[str, Any]:
    """The last evaluation: of the end, or, where a signal stopped the run, the one before (the run
    will go on from there).
    """
    if run.deployment.evaluated_at == run.iteration or run.progress < 1:
        return run.deployment.last
    return run.deployment.evaluate(run.iteration)


def _account(run: Run, seconds: float, evaluations: float) -> float:
    """Add an iteration's cost: the main process's clock and everybody's evaluations, the same
    numbers on every process, because budget and learning rate follow from them. Returns the
    evaluations per row that was collected, where none was per recorded row that was learned from.
    """
    metrics = run.metrics
    clock = seconds if run.processes.main else 0.0
    mine = [clock, evaluations, metrics.collected, metrics.seen, metrics.env_steps]
    everybody = run.processes.reduce(torch.tensor(mine, dtype=torch.float64)).tolist()
    clock, evaluations, collected, seen, steps = everybody
    run.spent.add(clock, evaluations, collected if steps else 0.0, steps)
    return evaluations / (collected or seen or 1)


def _finish(run: Run, evaluations_per_row: float) -> None:
    """Log and show the iteration; where they are due, evaluate and checkpoint."""
    spent = run.spent
    metrics = {**run.metrics.close(), "nfe_per_sample": evaluations_per_row}
    if run.evaluator.of_actions:
        metrics |= {"env_decisions": spent.env_decisions, "env_steps": spent.env_steps}
    metrics["time_s"] = spent.seconds
    if run.processes.main:
        metrics_file.append(run.folder, {"iteration": run.iteration, **metrics})
        run.processes.log(metrics, run.iteration)
    run.display.advance(run.progress, metrics)
    due = run.evaluation_due or run.progress >= 1
    if due and run.deployment.evaluated_at < run.iteration:
        run.deployment.evaluate(run.iteration)
        if run.progress < 1:  # the end draws the last
            run.display.draw_curves()
    if run.iteration % run.experiment.checkpoint_every == 0:
        resume.save(run)
