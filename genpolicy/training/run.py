"""Run: the verbs that a method is written in.

World size never enters a config: global sizes are stated, Run divides them and keeps groups whole.
There is no wrapper around the network: gradients are summed over processes by hand, so that a
pipeline's own code keeps running.
"""

import contextlib
import copy
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from genpolicy.chain import Condition, Noise, Trajectory
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import ChainConfig, Experiment, OptimizerConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Context, ControlTask, Environments, Task, is_control
from genpolicy.evaluation import curves, metrics_file, pictures
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.learning.objective import Scored
from genpolicy.policy.best_of import QJudge
from genpolicy.policy.files import save_policy
from genpolicy.policy.policy import Base, ChainPolicy, swapped
from genpolicy.policy.sampler import deployed_sampler, make_policy, without_last_noise
from genpolicy.rollout import minibatch
from genpolicy.rollout.episodes import reset_seed
from genpolicy.rollout.micro_batch import MicroBatches, recount
from genpolicy.rollout.minibatch import Batch
from genpolicy.rollout.rollout import Rollout, single
from genpolicy.rollout.store import EpisodeStore
from genpolicy.training import checkpoint
from genpolicy.training.collector import Collector
from genpolicy.training.evaluator import Exam
from genpolicy.training.iteration_metrics import Journal
from genpolicy.training.optimizer import Optimizer
from genpolicy.training.processes import Processes
from genpolicy.training.replay_check import LogRatio, ReplayCheck

Loss = Callable[[Scored], tuple[Tensor, dict[str, Tensor]]]
"""A scored step of b rows -> (loss [b], metrics by name [b]). Pure."""


WHOLE = "whole"
"""The one stage of a method that has no stages."""


STAGES = "stages"
"""In a run's folder: the policies of its milestones."""


COUNTERS = [
    "iteration",
    "seconds",
    "evaluations",
    "env_decisions",
    "env_steps",
    "best",
    "before",
    "last",
    "evaluated_at",
    "over",
]
"""What a checkpoint has of the run itself, beside weights, optimiser and what was registered."""


REDRAW = 30.0
"""Seconds between two drawings of the curves: one costs a second, which short runs would spend
again and again.
"""


class Stateful(Protocol):
    """Anything that `Run.register` saves and resumes."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class Method(Protocol):
    """One paper: ``train(run)`` is its loop in the verbs of Run."""

    def train(self, run: "Run") -> None: ...


class Run:
    """The state of one training run: policy, task, optimiser, counters, folder.

    reward: of prompts. environments: of a control task. data: the recorded episodes, if the
    experiment names some.
    """

    def __init__(
        self,
        experiment: Experiment,
        policy: ChainPolicy,
        task: Task | ControlTask,
        exam: Exam,
        folder: Path,
        accelerator: Accelerator,
        *,
        reward: WeightedRewards | None = None,
        environments: Environments | None = None,
        data: Dataset | None = None,
    ) -> None:
        self.experiment, self.policy, self.task, self.exam = experiment, policy, task, exam
        self.reward, self.environments, self.data = reward, environments, data
        self.folder, self.accelerator = folder, accelerator
        self.processes = Processes(accelerator)
        self.sampler = deployed_sampler(experiment.chain, experiment.eval.sampler, is_control(task))
        self.deployed = make_policy(policy.model, self.sampler)
        self.window = policy.chain.stochastic
        self.iteration = 0
        # of training so far; evaluations, decisions and steps of environments of all processes
        # together
        self.seconds = self.evaluations = self.env_decisions = self.env_steps = 0.0
        self.trainable = list(policy.model.trainable().values())
        self.stages: Mapping[str, OptimizerConfig] = {WHOLE: experiment.optimizer}
        self.enter(WHOLE)
        self.pace: float | None = (
            None  # how far a method's stage is, where that and not the budget sets the lr
        )
        self.over = False  # a method whose course is run says so
        self.micro_batches = MicroBatches(experiment.micro_batch, self.say)
        self.journal = Journal()
        self.collector = Collector(
            experiment.seed,
            repr((experiment.task, experiment.chain, experiment.environments)),
            task,
            reward,
            environments,
            self.processes,
            self.journal,
            self.micro_batches,
            EpisodeStore(folder),
        )
        self.replay_check = ReplayCheck(self.journal, self.micro_batches, self.processes, self.say)
        self.registered: dict[str, Stateful] = {}
        self.before: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.best = -math.inf
        self.rehearse: Callable[[Run], Iterator[int]] | None = None
        self._stop = False
        self._drawn = 0.0
        self.evaluated_at = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.environments is not None:
            self.environments.close()

    # The loop

    def iterations(self) -> Iterator[int]:
        """Yield 1, 2, ... until the budget is spent or a signal asks to stop; resume, evaluate,
        checkpoint and log around it.
        """
        if self.rehearse is not None:
            yield from self.rehearse(self)
            return
        self._resume()
        if self.processes.main:
            (self.folder / "config.yaml").write_text(parse.to_yaml(self.experiment))
        if self.iteration == 0 and not self.before:
            self.before = self.evaluate()
            self._save()
        handlers = {
            s: signal.signal(s, self._request_stop)
            for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            with self._bar() as bar:
                while self.progress < 1 and not self._stopping():
                    started, counted = time.perf_counter(), self.policy.model.evaluations
                    self.iteration += 1
                    yield self.iteration
                    self._account(
                        time.perf_counter() - started, self.policy.model.evaluations - counted
                    )
                    self._finish_iteration(self.policy.model.evaluations - counted, bar)
            self._save()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, by whichever of its limits is nearest; 1 when the
        method is through.
        """
        if self.over:
            return 1.0
        b = self.experiment.budget
        spent = {
            "iterations": self.iteration,
            "nfe": self.evaluations,
            "env_decisions": self.env_decisions,
        }
        spent |= {"env_steps": self.env_steps, "seconds": self.seconds}
        limits = {name: getattr(b, name) for name in spent}
        return max((spent[name] / limit for name, limit in limits.items() if limit), default=0.0)

    def _account(self, seconds: float, evaluations: float) -> None:
        """Add an iteration's cost: the main process's clock and everybody's evaluations, the same
        numbers on every process, because budget and learning rate follow from them.
        """
        decisions = self.journal.collected if self.journal.env_steps else 0
        mine = [
            seconds if self.processes.main else 0.0,
            evaluations,
            decisions,
            self.journal.env_steps,
        ]
        spent = self.processes.reduce(torch.tensor(mine, dtype=torch.float64)).tolist()
        self.seconds += spent[0]
        self.evaluations += spent[1]
        self.env_decisions += spent[2]
        self.env_steps += spent[3]

    # Collecting

    def collect(
        self,
        groups: int,
        members: int,
        *,
        updates: int = 1,
        shared_prefix: bool = False,
        keep: bool = False,
        starts: Sequence[int] | None = None,
    ) -> Rollout:
        """Roll the policy out: ``groups`` = M prompts or start states of this iteration,
        ``members`` = N samples or episodes each.

        updates: how many minibatches the rollout will be split into (each gets whole groups, evenly
        over the processes). shared_prefix: the members of a group share everything before the
        window (prompts only). keep: episodes are written down as they end (`EpisodeStore`), and a
        run that was killed meanwhile plays only those that are missing. starts: reset seeds of the
        groups, if not the iteration's own (`starts`).
        """
        window = self._draw_window()
        policy = self.policy.with_window(window)
        branch = window[0] if shared_prefix else None
        rollout = self.collector(
            policy, self.iteration, groups, members, updates, branch, keep, starts
        )
        for name, value in {**rollout.parts, "total": rollout.rewards}.items():
            self.log(f"reward/{name}", value.mean().item())
        rewards = rollout.rewards
        self.log(
            "reward/total_ci95", 1.96 * rewards.mean(1).std().item() / math.sqrt(max(groups, 2))
        )
        self.log(
            "reward/group_std_zero", (rewards.std(1, correction=0) == 0).double().mean().item()
        )
        return rollout

    def starts(self, groups: int) -> list[int]:
        """The reset seeds of this iteration's groups."""
        return [reset_seed(self.experiment.seed, self.iteration, group) for group in range(groups)]

    def redraw(self, condition: Condition, place: Tensor, total: int, draw: int = 0) -> Rollout:
        """What the policy would do where it is shown this process's B rows of ``condition``:
        decisions that nobody carried out, to be judged by a critic. place [B]: their numbers among
        the ``total`` of all processes, which name their noise; draw: the number of this redrawing
        in its iteration.
        """
        self.journal.phase("sample")
        policy = self.policy.with_window(self._draw_window())
        noise = Noise(self.experiment.seed, self.iteration, place, torch.full_like(place, draw))
        trajectory = policy.sample(condition, noise)
        self.journal.phase(None)
        context, unknown = Context([""] * len(place)), torch.zeros(len(place), dtype=torch.float64)
        decisions = single(unknown, context, place, total)
        outputs = trajectory.x0
        return Rollout(
            trajectory,
            context,
            outputs,
            {},
            {},
            unknown[:, None],
            (),
            torch.arange(len(place)),
            decisions,
        )

    def _draw_window(self) -> tuple[int, int]:
        """This iteration's window of steps: a pure function of seed and iteration."""
        low, high = self.window.start, self.window.stop
        size = self.experiment.chain.window_size
        if size is None:
            return low, high
        noise = Noise(self.experiment.seed, self.iteration, torch.tensor([-1]), torch.tensor([-1]))
        uniform = 0.5 * math.erfc(-float(noise(0, (1,))[0, 0]) / math.sqrt(2))
        start = low + min(int(uniform * (high - size - low + 1)), high - size - low)
        return start, start + size

    def minibatches(self, rollout: Rollout, updates: int, epochs: int = 1) -> Iterator[Batch]:
        """`minibatch.rows`, ``epochs`` times."""
        for epoch in range(epochs):
            yield from minibatch.rows(rollout, updates, self._order(epoch))

    def pairs(self, rollout: Rollout, updates: int, epoch: int) -> Iterator[Batch]:
        """`minibatch.pairs` in an order that is the epoch's own."""
        return minibatch.pairs(rollout, updates, self._order(epoch))

    def chains(self, rollout: Rollout, updates: int, epoch: int) -> Iterator[Batch]:
        """`minibatch.chains` in an order that is the epoch's own."""
        return minibatch.chains(rollout, updates, self._order(epoch))

    def _order(self, epoch: int) -> list[int]:
        return [self.experiment.seed % 2**64, self.iteration, epoch]

    def normalised(self, values: Tensor) -> Tensor:
        """(values - mean) / std over the rows [R] of all processes."""
        sums = torch.stack([torch.ones_like(values), values, values**2]).double().sum(1)
        count, first, second = self.processes.reduce(sums).tolist()
        mean = first / count
        return (values - mean) / (max(second / count - mean**2, 0.0) ** 0.5 + 1e-8)

    def verified(self, rollout: Rollout, log_ratio: LogRatio, tolerance: float) -> Rollout:
        """A rollout that the training forward replays to within a log-ratio of ``tolerance``
        (`rescore.ReplayCheck`).
        """
        return self.replay_check(self._window_of(rollout.trajectory), rollout, log_ratio, tolerance)

    def _window_of(self, trajectory: Trajectory) -> ChainPolicy:
        return self.policy.with_window((trajectory.steps.start, trajectory.steps.stop))

    # Updating

    def update(
        self,
        rollout: Rollout,
        batch: Batch,
        advantage: Tensor,
        loss: Loss,
        reference: Sequence[Tensor] | None = None,
        also: Sequence[Optimizer] = (),
    ) -> dict[str, float]:
        """One optimiser step on the mean of ``loss`` over these rows and steps, in micro-batches,
        over all processes; returns the means of the loss and its metrics.

        advantage: of episodes [M,N], or of this process's rows [R]. reference: a snapshot under
        which every step is scored too, without gradients. also: optimisers of other parts that the
        loss reaches, stepped together.
        """
        self.journal.phase("update")
        rows = (
            advantage.to(rollout.trajectory.x0) if advantage.ndim == 1 else rollout.rows(advantage)
        )
        chains, weight = rollout.trajectory[batch.rows], 1.0
        if not len(
            chains
        ):  # another process has all of a small minibatch; few networks can be asked about no row
            batch, weight = minibatch.stand_in(rollout, batch), 0.0
            chains = rollout.trajectory[batch.rows]
        advantages = rows[batch.rows]
        policy = self._window_of(rollout.trajectory)
        steps = list(chains.steps) if batch.k is None else [batch.k]
        sums: dict[str, float] = {}

        def accumulate(part: slice) -> None:
            for k in steps:
                k = k if isinstance(k, int) else k[part]
                value, metrics = loss(
                    self._score(policy, chains[part], k, advantages[part], reference)
                )
                self.optimizer.backward(weight * value.sum() / count)
                for name, metric in {"loss": value, **metrics}.items():
                    sums[name] = sums.get(name, 0.0) + weight * float(
                        metric.detach().double().sum()
                    )

        forget = recount(policy)

        def restart() -> None:
            for optimizer in (self.optimizer, *also):
                optimizer.zero_grad()
            sums.clear()
            forget()

        restart()
        count = self._count(len(chains) * len(steps) if weight else 0)
        self.micro_batches(accumulate, len(chains), chains.shared * batch.whole, restart)
        if not weight:
            forget()
        self.log("lr", self.optimizer.lr(self._pace))
        self.log("grad_norm", self.optimizer.step(self._pace))
        for optimizer in also:
            optimizer.step(self._pace)
        totals = (
            self.processes.reduce(torch.tensor(list(sums.values()), dtype=torch.float64)) / count
        )
        means = dict(zip(sums, totals.tolist(), strict=True))
        for name, value in means.items():
            self.log(f"policy/{name}", value)
        self.journal.phase(None)
        return means

    def descend(
        self,
        losses: Callable[[slice], Tensor],
        rows: int,
        name: str,
        optimizer: Optimizer | None = None,
    ) -> None:
        """One step of ``optimizer`` (the policy's by default) on the mean of ``losses(rows) ->
        [b]`` over this process's ``rows`` and everybody else's, in micro-batches; logged as
        NAME/loss.
        """
        self.journal.phase(f"update {name}" if optimizer else "update")
        optimizer = optimizer or self.optimizer
        count, total = self._count(rows), 0.0
        forget = recount(self.policy)

        def accumulate(part: slice) -> None:
            nonlocal total
            value = losses(part).sum()
            optimizer.backward(value / count)
            total += float(value.detach())

        def restart() -> None:
            nonlocal total
            optimizer.zero_grad()
            total = 0.0
            forget()

        restart()
        self.micro_batches(accumulate, rows, restart=restart)
        self.log(f"{name}/grad_norm", optimizer.step(self._pace))
        self.log(
            f"{name}/loss",
            float(self.processes.reduce(torch.tensor([total], dtype=torch.float64))) / count,
        )
        self.journal.phase(None)

    def _count(self, rows: int) -> int:
        return int(self.processes.reduce(torch.tensor([rows], dtype=torch.float64)))

    @property
    def _pace(self) -> float:
        return self.progress if self.pace is None else self.pace

    def enter(self, stage: str) -> None:
        """Go on with the fresh optimiser of one of ``stages``. Where the last one averaged the
        weights, the averages are what goes on: they are what was evaluated and saved.
        """
        if hasattr(self, "optimizer") and self.optimizer.ema is not None:
            self.restore(self.optimizer.ema)
        reduce = self.processes.reduce if self.processes.count > 1 else None
        fp16 = self.policy.model.precision == "fp16"
        self.stage, self.optimizer = (
            stage,
            Optimizer(self.stages[stage], self.trainable, fp16, reduce),
        )

    def learner(
        self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerConfig
    ) -> Optimizer:
        """An optimiser of its own for a critic or another part beside the policy; `register` it."""
        reduce = self.processes.reduce if self.processes.count > 1 else None
        return Optimizer(settings, list(parameters), False, reduce)

    def _score(
        self,
        policy: ChainPolicy,
        batch: Trajectory,
        k: int | Tensor,
        advantage: Tensor,
        reference: Sequence[Tensor] | None,
    ) -> Scored:
        anchor = None
        if reference is not None:
            with torch.no_grad(), self.using(reference):
                anchor = policy.scored(policy.transition(batch, k))
        grid, device = policy.chain.grid, batch.x0.device
        return Scored(
            new=policy.scored(policy.transition(batch, k)),
            old=policy.scored(batch.acted(k)),
            reference=anchor,
            x=policy.model.scored(batch.after(k)),
            advantage=advantage,
            std=policy.std(k).to(device),
            dt=(grid[k] - grid[k + 1]).float().to(device),
            gain=policy.gain(k).to(device),
            index=k - batch.first,
            steps=len(batch.steps),
        )

    # Snapshots and state

    def register(self, **objects: Stateful) -> None:
        """Save and resume these with the run. Call it before `iterations`."""
        self.registered.update(objects)

    def snapshot(self) -> list[Tensor]:
        """A copy of the trainable parameters: the reference when taken before `iterations`."""
        return [p.detach().clone() for p in self.trainable]

    def using(self, snapshot: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
        """Run with a snapshot in the parameters' place."""
        return swapped(self.trainable, snapshot)

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Set the parameters back to a snapshot."""
        for parameter, value in zip(self.trainable, snapshot, strict=True):
            parameter.data.copy_(value)

    def save_point(self) -> tuple[list[Tensor], Any]:
        """Everything that an update of the policy changes: its weights, its optimiser, their
        averages.
        """
        return self.snapshot(), copy.deepcopy(self.optimizer.state_dict())

    def rewind(self, point: tuple[list[Tensor], Any]) -> None:
        """Undo every update since a `save_point`, to the bit."""
        weights, optimizer = point
        self.restore(weights)
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))

    def milestone(self, name: str, judge: QJudge | None = None, best_of: int = 1) -> None:
        """Examine the policy as it stands, log NAME/metric, and keep it as stages/NAME. judge:
        instead of the deployed sampler, the best of ``best_of`` samples of the training kernel (its
        last step without noise) by this critic. A rehearsal passes none.
        """
        if self.rehearse is not None:
            return
        if judge is None:
            sampler, policy, metrics = self.sampler, self.deployed, self.evaluate()
        else:
            sampler = without_last_noise(
                replace(self.experiment.chain, window_size=None, best_of=best_of)
            )
            policy = replace(make_policy(self.policy.model, sampler, judge), base=self.policy.base)
            metrics = self._examine(policy)
        if self.processes.main:
            shown = "  ".join(
                f"{each.removeprefix('reward/')} {metrics[each]:.3f}" for each in self.exam.measured
            )
            self.say(f"{name} (n {metrics['n']}): {shown}")
            metrics_file.append(
                self.folder,
                {"iteration": self.iteration, **{f"{name}/{k}": v for k, v in metrics.items()}},
            )
        self.keep(name, policy, sampler)

    def keep(
        self, name: str, policy: ChainPolicy | None = None, sampler: ChainConfig | None = None
    ) -> None:
        """Save the policy as it stands, with the deployed sampler or another, as stages/NAME."""
        if self.processes.main:
            (self.folder / STAGES).mkdir(parents=True, exist_ok=True)
            with self.optimizer.averaged():
                save_policy(
                    policy or self.deployed,
                    self.experiment,
                    sampler or self.sampler,
                    self.folder / STAGES / name,
                )
        self.processes.wait()

    def try_out(self, episodes: int, name: int) -> float:
        """The success rate (or mean return) of the deployed sampler in real episodes, which count
        as any others that the run collects; of one ``name`` they always begin from the same starts.
        """
        assert self.environments is not None
        found = evaluate_control(
            self.deployed,
            self.environments,
            episodes=episodes,
            seed=reset_seed(self.experiment.seed, name, -1 % 2**32),
            judged=is_control(self.task) and self.task.has_success,
            process=(self.processes.index, self.processes.count),
            gather=self.processes.gather,
        )
        self.journal.env_steps += float(found.lengths.sum()) / self.processes.count
        self.journal.collected += int(found.decisions) // self.processes.count
        return float((found.success if found.judged else found.returns).mean())

    def _resume(self) -> None:
        state = checkpoint.latest(self.folder)
        if state is None:
            if self.processes.main:
                metrics_file.truncate(self.folder, -1)
            return
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the checkpoint in {self.folder} does not fit this experiment (was its policy or method changed?): {error}"
            ) from error
        for name in COUNTERS:
            setattr(self, name, state["counters"][name])
        if self.processes.main:
            metrics_file.truncate(self.folder, self.iteration)
        self.processes.wait()
        self.say(f"resumed at iteration {self.iteration}")

    def _restore(self, state: dict[str, Any]) -> None:
        self.enter(state["stage"])
        self.restore(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay_check.load_state_dict(state["replay_check"])
        for name, value in state["registered"].items():
            self.registered[name].load_state_dict(value)

    def _save(self) -> None:
        """Checkpoint, and the policy as it stands, written atomically by the main process."""
        if self.processes.main:
            state = {
                "parameters": [p.detach() for p in self.trainable],
                "stage": self.stage,
                "optimizer": self.optimizer.state_dict(),
                "registered": {name: value.state_dict() for name, value in self.registered.items()},
                "replay_check": self.replay_check.state_dict(),
                "counters": {name: getattr(self, name) for name in COUNTERS},
            }
            checkpoint.write(self.folder, self.iteration, state)
            self.collector.store.trim(min(checkpoint.iterations(self.folder)))
            if self.iteration:
                with self.optimizer.averaged():
                    save_policy(
                        self.deployed, self.experiment, self.sampler, self.folder / "policy"
                    )
        self.processes.wait()

    # Evaluating and telling

    def evaluate(self) -> dict[str, Any]:
        """Examine the deployed sampler (with averaged weights, if any) on the fixed evaluation set;
        keep the best policy.
        """
        metrics = self._examine(self.deployed)
        if self.processes.main:
            with self.optimizer.averaged():
                self._keep(metrics)
        self.last, self.evaluated_at = metrics, self.iteration
        return metrics

    def _examine(self, policy: ChainPolicy) -> dict[str, Any]:
        """A policy's metrics with the averaged weights; what that costs does not count."""
        evaluations = self.policy.model.evaluations
        with self.optimizer.averaged():
            folder = self.folder / "samples" / str(self.iteration)
            metrics = self.exam(policy, self.processes, self.micro_batches, folder)
        self.policy.model.evaluations = evaluations
        return metrics

    def _keep(self, metrics: dict[str, Any]) -> None:
        select = self.experiment.eval.select or self.exam.measured[0]
        metrics_file.append(
            self.folder,
            {"iteration": self.iteration, **{f"eval/{k}": v for k, v in metrics.items()}},
        )
        if (
            self.iteration and metrics[select] >= self.best
        ):  # of equals the one that has learned longer
            self.best = metrics[select]
            save_policy(self.deployed, self.experiment, self.sampler, self.folder / "policy_best")
        shown = "  ".join(
            f"{name.removeprefix('reward/')} {metrics[name]:.3f}" for name in self.exam.measured
        )
        self.say(f"evaluation after {self.iteration} iterations (n {metrics['n']}): {shown}")

    def show(self, rollout: Rollout, advantage: Tensor) -> None:
        """Where an evaluation is due, draw one group of pictures with its rewards and advantages
        [M,N].
        """
        if self._evaluation_due() and self.processes.main and self.environments is None:
            n = rollout.rewards.shape[1]
            group = int(rollout.local[0])
            pictures.group(
                rollout.outputs[:n],
                rollout.prompts[group],
                rollout.rewards[group],
                advantage[group],
                self.folder / "samples" / str(self.iteration) / "group.png",
            )

    def seen(self, samples: int) -> None:
        """Count the samples of an iteration that collects none itself."""
        self.journal.collected += samples // self.processes.count

    def log(self, name: str, value: float) -> None:
        """Add a number to this iteration's metrics; several in one iteration are averaged."""
        self.journal.log(name, value)

    def say(self, text: str) -> None:
        """One line to the person, above the progress bar."""
        if self.processes.main:
            tqdm.write(text, file=sys.stderr)

    def _evaluation_due(self) -> bool:
        every = self.experiment.eval.every
        return self.rehearse is None and bool(every) and self.iteration % every == 0

    def _finish_iteration(self, evaluations: float, bar: tqdm) -> None:
        rows = self.journal.collected or 1
        metrics = self.journal.close()
        metrics["nfe_per_sample"] = evaluations / rows
        if self.environments is not None:
            metrics |= {"env_decisions": self.env_decisions, "env_steps": self.env_steps}
        metrics["time_s"] = self.seconds
        if self.processes.main:
            metrics_file.append(self.folder, {"iteration": self.iteration, **metrics})
            self.accelerator.log(metrics, step=self.iteration)
        advance = min(self.progress, 1.0) * bar.total - bar.n
        if "reward/total" in metrics:
            shown = f"reward {metrics['reward/total']:.3f} ± {metrics['reward/total_ci95']:.3f}"
        else:
            shown = f"loss {next((v for name, v in metrics.items() if name.endswith('/loss')), math.nan):.4f}"
        bar.set_postfix_str(
            f"{shown}, {metrics['nfe_per_sample']:.1f} evaluations/sample", refresh=False
        )
        bar.update(advance)
        if (self._evaluation_due() or self.progress >= 1) and self.evaluated_at < self.iteration:
            self.evaluate()
            if (
                self.processes.main
                and self.progress < 1
                and time.monotonic() - self._drawn > REDRAW
            ):
                curves.figures(self.folder)  # `finish` draws the last
                self._drawn = time.monotonic()
        if self.iteration % self.experiment.checkpoint_every == 0:
            self._save()

    def _bar(self) -> tqdm:
        total = self.experiment.budget.iterations or 100
        return tqdm(
            total=total,
            initial=min(self.progress, 1.0) * total,
            desc=str(self.experiment.method["name"]),
            unit="it" if self.experiment.budget.iterations else "%",
            disable=not self.processes.main,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n:.0f}/{total} [{elapsed}<{remaining}] {postfix}",
            file=sys.stderr,
        )

    def _request_stop(self, number: int, _frame: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        self.say(
            f"{signal.Signals(number).name}: finishing this iteration, saving, then stopping (again: stop at once)"
        )

    def _stopping(self) -> bool:
        return bool(self.processes.reduce(torch.tensor([float(self._stop)]))[0] > 0)

    def conclude(self) -> dict[str, Any]:
        """The last evaluation: of the end, or, where a signal stopped the run, the one before (the
        run will go on from there).
        """
        return (
            self.last
            if self.evaluated_at == self.iteration or self.progress < 1
            else self.evaluate()
        )

    @property
    def features(self) -> int:
        """The length F of what a critic sees of an observation or a prompt."""
        if self.environments is not None:
            context = self.environments.reset([0], [0])
        else:
            context = cast(Task, self.task).reset(range(1))
        with torch.no_grad():
            return self.policy.model.features(self.policy.model.encode(context)).shape[1]

    def freeze_base(self) -> None:
        """Where the window begins inside the chain, leave what comes before it to the policy as it
        is now, for good. Call it before `iterations`.
        """
        if self.window.start:
            base = Base(self.snapshot(), float(self.policy.chain.grid[self.window.start]))
            self.policy, self.deployed = (
                replace(self.policy, base=base),
                replace(self.deployed, base=base),
            )

    def require_density(self) -> None:
        """Raise unless every step of the window has a density: a likelihood method can't train a
        point.
        """
        for k in self.window:
            if float(self.policy.std(k)) == 0:
                raise ConfigError(
                    f"step {k} of the window is deterministic (std 0) under kernel {self.experiment.chain.kernel}: a method that "
                    "needs likelihoods can't train it; use ddim with eta > 0, sde or cps, or another window"
                )
        self.require_window()

    def require_window(self) -> None:
        """Raise unless there is a step to train."""
        if not self.window:
            raise ConfigError(
                "the chain has no stochastic step to train: widen chain.window or use a kernel with noise"
            )
