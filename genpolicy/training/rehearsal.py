"""Rehearsing: one real iteration of each stage of an experiment, what it cost, and what the whole
budget will.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from genpolicy.config.schema import Experiment
from genpolicy.training.evaluator import EpisodeEvaluator
from genpolicy.training.replay_check import CHECK
from genpolicy.training.run import Run

REHEARSED = 1000
"""The iteration that a rehearsal is: past any warm-up, which costs less than what follows."""


@dataclass(frozen=True)
class StageCost:
    """One iteration of a stage, all processes together; seconds of wall-clock.

    iterations: how many of them the method wants; None: as many as the budget allows. samples: of
    prompts, or decisions, or recorded frames that were learned from; ``did`` says it in words.
    phases: name -> (seconds, peak GB of memory).
    """

    stage: str
    iterations: int | None
    seconds: float
    samples: int
    evaluations: float
    env_steps: float
    did: str
    phases: dict[str, tuple[float, float]]

    @property
    def once(self) -> float:
        """Seconds of the replay check, which is made once; everything else at each iteration."""
        return self.phases.get(CHECK, (0.0, 0.0))[0]

    @property
    def evaluations_per_sample(self) -> float:
        return self.evaluations / max(self.samples, 1)


@dataclass
class Rehearsal:
    """The cost of one real iteration of each stage, and of the whole budget.

    memory: whose. evaluation_seconds: of one evaluation, of what ``judged`` says, extrapolated from
    sampling, or from a few episodes. iterations, evaluations, seconds: of the whole budget, with
    its evaluations of the policy.
    """

    memory: str = (
        "the accelerator's, peak of the phase"
        if torch.cuda.is_available()
        else "this process's, peak so far"
    )
    stages: list[StageCost] = field(default_factory=list)
    judged: str = ""
    evaluation_seconds: float = 0.0
    iterations: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0

    def record(self, run: Run) -> Iterator[int]:
        """Stand in for the loop: an iteration of each stage on the real sizes, and the weights as
        they were.
        """
        weights, stages = run.weights(), run.stages
        stages.hurried = True
        for number, stage in enumerate(stages.all):
            if stage.iterations is None:
                stages.done = REHEARSED
            run.begin(REHEARSED + number)
            evaluations, started = run.policy.model.evaluations, time.perf_counter()
            yield run.iteration
            run.metrics.phase(None)
            seconds = time.perf_counter() - started
            evaluations = run.policy.model.evaluations - evaluations + run.metrics.evaluations
            whole = len(stages.all) == 1
            name = str(run.experiment.method["name"]) if whole else stage.name
            self.stages.append(self._cost(run, name, stage.iterations, seconds, evaluations))
            run.metrics.close()
        weights.restore()
        self._evaluate(run)

    def _cost(
        self, run: Run, stage: str, iterations: int | None, seconds: float, evaluations: float
    ) -> StageCost:
        metrics = run.metrics
        mine = [metrics.collected, metrics.seen, metrics.env_steps, evaluations]
        everybody = run.processes.reduce(torch.tensor(mine, dtype=torch.float64)).tolist()
        collected, seen, env_steps, evaluations = everybody
        samples = int(collected or seen)
        did = f"{samples} samples"
        if isinstance(run.evaluator, EpisodeEvaluator):
            lived = f"{samples} decisions in {env_steps:.0f} environment steps"
            did = lived if env_steps else f"{samples} recorded frames" if samples else "nothing new"
        phases = {name: (spent, metrics.memory[name]) for name, spent in metrics.clock.items()}
        return StageCost(stage, iterations, seconds, samples, evaluations, env_steps, did, phases)

    def _evaluate(self, run: Run) -> None:
        settings = run.experiment.eval
        if isinstance(run.evaluator, EpisodeEvaluator):
            self.judged = f"{settings.episodes} episodes"
            few = min(run.evaluator.environments.count, settings.episodes)
            started = time.perf_counter()
            run.evaluator.play(run.deployed, run.processes, few, settings.seed)
            self.evaluation_seconds = (time.perf_counter() - started) * settings.episodes / few
        else:
            only = self.stages[0]
            self.judged = f"{settings.samples} samples"
            drawn = sum(
                only.phases.get(name, (0.0, 0.0))[0] for name in ("sample", "decode", "reward")
            )
            self.evaluation_seconds = drawn * settings.samples / only.samples

    def project(self, experiment: Experiment) -> None:
        """Extrapolate to the budget: the stages in their order until it is spent."""
        b, every = experiment.budget, experiment.eval.every
        limits = [b.iterations, b.nfe, b.seconds, b.env_decisions, b.env_steps]
        left = [math.inf if limit is None else float(limit) for limit in limits]
        for cost in self.stages:
            each = cost.seconds - cost.once
            spends = [
                1.0,
                cost.evaluations,
                each,
                cost.samples if cost.env_steps else 0.0,
                cost.env_steps,
            ]
            allowed = min(
                rest / spent if spent else math.inf
                for rest, spent in zip(left, spends, strict=True)
            )
            count = math.ceil(
                min(allowed, math.inf if cost.iterations is None else cost.iterations)
            )
            left = [rest - count * spent for rest, spent in zip(left, spends, strict=True)]
            self.iterations += count
            self.evaluations += count * cost.evaluations
            self.seconds += cost.once + count * each
        self.seconds += (
            2 + (max(self.iterations - 1, 0) // every if every else 0)
        ) * self.evaluation_seconds
