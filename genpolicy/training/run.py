"""Run: the verbs that a method is written in.

World size never enters a config: global sizes are stated, Run divides them and keeps groups whole.
There is no wrapper around the network: gradients are summed over processes by hand, so that a
pipeline's own code keeps running.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from genpolicy.chain import Condition, Noise
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import Experiment, OptimizerConfig
from genpolicy.contracts.dataset import Dataset, Pictures
from genpolicy.contracts.task import Context, ControlTask, Task
from genpolicy.policy.files import require_savable
from genpolicy.policy.policy import ChainPolicy, Part
from genpolicy.policy.weights import Pool, Weights
from genpolicy.rollout import minibatch
from genpolicy.rollout.episodes import reset_seed
from genpolicy.rollout.examples import shown
from genpolicy.rollout.minibatch import Batch
from genpolicy.rollout.rollout import Rollout, unjudged
from genpolicy.training.budget import Spent
from genpolicy.training.checkpoint import RunState, Stateful
from genpolicy.training.collector import Collector
from genpolicy.training.deployment import Deployment
from genpolicy.training.draws import Draws
from genpolicy.training.evaluator import EpisodeEvaluator, Evaluator
from genpolicy.training.optimizer import Optimizer
from genpolicy.training.replay_check import LogRatio, ReplayCheck
from genpolicy.training.requirements import Needs
from genpolicy.training.stages import Stage, Stages
from genpolicy.training.updates import Loss, Losses, Updates
from genpolicy.training.workspace import Workspace


class Method(Protocol):
    """One paper: ``train(run)`` is its loop in the verbs of Run; ``needs`` is what that takes."""

    @property
    def needs(self) -> Needs: ...

    def train(self, run: "Run") -> None: ...


class Run:
    """One training run. Methods call its verbs and read its attributes; they write into none.

    experiment, task, folder, processes: what runs, on what, where, and who runs it.
    policy: the one that learns and collects. deployment: the one that is evaluated and saved.
    data: the recorded episodes or pictures, if the experiment names some.
    spent: counters. stages: of the method. metrics: of the iteration that is running.
    """

    def __init__(
        self,
        experiment: Experiment,
        policy: ChainPolicy,
        task: Task | ControlTask,
        collector: Collector,
        evaluator: Evaluator,
        workspace: Workspace,
        *,
        data: Dataset | Pictures | None = None,
        iterate: Callable[["Run"], Iterator[int]],
        rehearsal: bool = False,
    ) -> None:
        self.experiment, self.policy, self.task = experiment, policy, task
        self.collector, self.evaluator, self.data = collector, evaluator, data
        self.folder, self.processes = workspace.folder, workspace.processes
        self.metrics, self.display = workspace.metrics, workspace.display
        self.spent = Spent()
        self.trainable = list(policy.model.trainable().values())
        self.stages = Stages([Stage("whole", None, experiment.optimizer)])
        self.pace, self.optimizer = 0.0, self.fresh_optimizer()
        averaged = lambda: self.optimizer.averaged()  # noqa: E731  # of the stage's own optimiser
        self.deployment = Deployment(experiment, policy, evaluator, workspace, averaged)
        self.replay_check = ReplayCheck(workspace)
        self.updates = Updates(workspace)
        self._draws = Draws(experiment.seed)
        self.state = RunState()
        self.register(spent=self.spent, replay_check=self.replay_check, deployment=self.deployment)
        self._iterate, self.rehearsal = iterate, rehearsal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.evaluator.close()

    @property
    def iteration(self) -> int:
        """The number of the iteration that is running, from 1."""
        return self.spent.iteration

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, in [0, 1]; 1 when the method is through."""
        return self.spent.share(self.experiment.budget)

    @property
    def deployed(self) -> ChainPolicy:
        """The policy that is evaluated and saved."""
        return self.deployment.policy

    @property
    def window(self) -> range:
        """The steps that are trained."""
        return self.policy.chain.stochastic

    # The loop

    def begin(self, iteration: int) -> None:
        """Begin an iteration; called by what stands around the method's loop.

        ``pace``, what learning rates go by, is the share of the stage that is done, or of the
        budget where the stage has no end.
        """
        self.spent.iteration = iteration
        done = self.stages.progress
        self.pace = self.progress if done is None else done

    def iterations(self) -> Iterator[int]:
        """Yield 1, 2, ... until the budget is spent or a signal asks to stop; resume, evaluate,
        checkpoint and log around it (`genpolicy.training.loop`; a rehearsal does none of that).
        """
        return self._iterate(self)

    def plan(self, stages: Sequence[Stage]) -> None:
        """Give the method stages, each with an optimiser of its own. Call it before `iterations`."""
        self.stages = Stages(stages)
        self.optimizer = self.fresh_optimizer()

    def advance(
        self, through: bool = False, leave: Callable[[str], None] = lambda stage: None
    ) -> None:
        """Count an iteration of the stage. Where that was its last (or ``through``), call
        ``leave`` with its name and go on with the next one's fresh optimiser, or end the run.

        Where the stage averaged its weights, the averages are what goes on: they are what was
        evaluated and saved.
        """
        stage = self.stages.now.name
        if not self.stages.advance(through):
            return
        if self.stages.over:
            leave(stage)
            self.spent.over = True
        elif self.stages.now.name != stage:
            leave(stage)
            if self.optimizer.ema is not None:
                Weights(self.trainable, self.optimizer.ema).restore()
            self.optimizer = self.fresh_optimizer()

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
        policy: ChainPolicy | None = None,
        window: tuple[int, int] | None = None,
    ) -> Rollout:
        """Roll the policy out: ``groups`` = M prompts or start states of this iteration,
        ``members`` = N samples or episodes each.

        updates: how many minibatches the rollout will be split into (each gets whole groups, evenly
        over the processes). shared_prefix: the members of a group share everything before the
        window (prompts only). keep: episodes are written down as they end (`EpisodeStore`), and a
        run that was killed meanwhile plays only those that are missing. starts: reset seeds of the
        groups, if not the iteration's own (`starts`). policy: one that acts in the place of the one
        that learns. window: [low, high) steps at which the kernel acts, kept and trained.
        """
        window = window or self._draw_window()
        acting = (policy or self.policy).with_window(window)
        branch = window[0] if shared_prefix else None
        rollout = self.collector(
            acting,
            self.iteration,
            groups,
            members,
            updates=updates,
            branch_at=branch,
            keep=keep,
            starts=starts,
        )
        self.metrics.log_all(rollout.metrics())
        return rollout

    def starts(self, groups: int) -> list[int]:
        """The reset seeds of this iteration's groups."""
        seed = self.experiment.seed
        return [reset_seed(seed, self.iteration, group) for group in range(groups)]

    def redraw(
        self,
        condition: Condition,
        place: Tensor,
        total: int,
        *,
        number: int = 0,
        members: int = 1,
        branch_at: int | None = None,
    ) -> Rollout:
        """The policy's decisions where it is shown this process's B rows of ``condition``; nobody
        carries them out.

        place [B]: the rows' numbers among the ``total`` of all processes, group-major with
        ``members`` = N to a group; they name the noise. number: of this redrawing in its iteration.
        branch_at: the members of a group share their first ``branch_at`` steps, which are drawn as
        the others are, and only the steps after them are kept; `ValueError` where there are none,
        and for rows that are no whole groups.
        """
        first = place[::members, None]
        if members > 1 and not torch.equal(
            place, ((first - first % members) + torch.arange(members)).flatten()
        ):
            raise ValueError(
                f"place must hold whole groups of {members} consecutive numbers each, the first of"
                f" them a multiple of {members}"
            )
        low, high = self._draw_window()
        if branch_at is not None and not 0 <= branch_at < high:
            raise ValueError(
                f"branch_at is {branch_at}; it must be a step from 0 to {high - 1}, where the"
                " window's last noise is drawn"
            )
        self.metrics.phase("sample")
        policy = self.policy.with_window((low, high))
        groups = self.noise("redraw", place // members, number)
        noise = replace(groups, member=place % members)
        keep = None if branch_at is None else (max(branch_at, low), high)
        trajectory = policy.sample(
            condition, noise, members=members, branch_at=branch_at, keep=keep
        )
        self.metrics.phase(None)
        return unjudged(trajectory, place, total)

    def contexts(self, count: int) -> tuple[Context, Tensor]:
        """This process's share of ``count`` prompts, or recorded observations where the experiment
        names data, of this iteration, and their numbers among the ``count``; nothing is drawn by
        the policy.
        """
        place = self.mine(np.arange(count))
        if self.data is None:
            return self.collector.contexts(self.iteration, place, count), place
        rows = self.rows(len(self.data), count, "contexts")
        return shown(self.data, self.policy.model, rows), place

    def _draw_window(self) -> tuple[int, int]:
        """This iteration's window of steps."""
        size = self.experiment.chain.window_size
        return self._draws.window(self.iteration, self.window, size)

    # Drawing

    def noise(self, purpose: str, place: Tensor, number: int = 0) -> Noise:
        """Standard normal noise of the rows ``place`` [B], a pure function of purpose, seed,
        iteration, number and place.
        """
        return self._draws.noise(purpose, self.iteration, place, number)

    def rows(
        self, count: int, size: int | tuple[int, ...], purpose: str, number: int = 0
    ) -> Tensor:
        """Draw ``size`` of ``count`` rows with replacement; this process's share of the last
        dimension.
        """
        return self.mine(self.generator(purpose, number).integers(count, size=size))

    def generator(self, purpose: str, number: int = 0) -> np.random.Generator:
        """A generator for what all processes draw alike; `mine` takes this process's share."""
        return self._draws.generator(purpose, self.iteration, number)

    def mine(self, drawn: np.ndarray) -> Tensor:
        """This process's share of what all have drawn alike, of its last dimension."""
        share = drawn[..., self.processes.index :: self.processes.count]
        return torch.from_numpy(share.copy())

    # Learning

    def minibatches(
        self, rollout: Rollout, updates: int, epochs: int = 1, chosen: Tensor | None = None
    ) -> Iterator[Batch]:
        """`minibatch.rows`, ``epochs`` times; only of the ``chosen`` rows, bool [R]."""
        for epoch in range(epochs):
            yield from self._filled(minibatch.rows, rollout, updates, epoch, chosen)

    def pairs(
        self, rollout: Rollout, updates: int, epoch: int, chosen: Tensor | None = None
    ) -> Iterator[Batch]:
        """`minibatch.pairs` in an order that is the epoch's own."""
        return self._filled(minibatch.pairs, rollout, updates, epoch, chosen)

    def chains(
        self, rollout: Rollout, updates: int, epoch: int, chosen: Tensor | None = None
    ) -> Iterator[Batch]:
        """`minibatch.chains` in an order that is the epoch's own."""
        return self._filled(minibatch.chains, rollout, updates, epoch, chosen)

    def _filled(
        self,
        kind: minibatch.Pass,
        rollout: Rollout,
        updates: int,
        epoch: int,
        chosen: Tensor | None,
    ) -> Iterator[Batch]:
        """The minibatches of a pass that have a row in some process."""
        order = self.generator(f"pass over {kind.__name__}", epoch)
        batches = kind(rollout, updates, order, chosen)
        return (batch for batch in batches if self.processes.sum(float(len(batch))))

    def normalised(self, values: Tensor) -> Tensor:
        """(values - mean) / std over the rows [R] of all processes."""
        sums = torch.stack([torch.ones_like(values), values, values**2]).double().sum(1)
        count, first, second = self.processes.reduce(sums).tolist()
        if not count:
            return values
        mean = first / count
        return (values - mean) / (max(second / count - mean**2, 0.0) ** 0.5 + 1e-8)

    def verified(self, rollout: Rollout, log_ratio: LogRatio, tolerance: float) -> Rollout:
        """A rollout that the training forward replays to within a log-ratio of ``tolerance``."""
        return self.replay_check(self._acting(rollout), rollout, log_ratio, tolerance)

    def _acting(self, rollout: Rollout) -> ChainPolicy:
        """The policy with the window in which a rollout was drawn."""
        steps = rollout.trajectory.steps
        return self.policy.with_window((steps.start, steps.stop))

    def update(
        self,
        rollout: Rollout,
        batch: Batch,
        advantage: Tensor,
        loss: Loss,
        reference: Weights | None = None,
        also: Sequence[Optimizer] = (),
    ) -> dict[str, float]:
        """One optimiser step on the mean of ``loss`` over these rows and steps, in micro-batches,
        over all processes; returns the means of the loss and its metrics, and logs them as
        policy/NAME.

        advantage: of episodes [M,N], or of this process's rows [R]. reference: weights under which
        every step is scored too, without gradients. also: optimisers of other parts that the loss
        reaches, stepped together.
        """
        optimizers = [self.optimizer, *also]
        return self.updates.on_rollout(
            self._acting(rollout),
            rollout,
            batch,
            advantage,
            loss,
            reference,
            optimizers,
            self.pace,
        )

    def descend(
        self, losses: Losses, rows: int, name: str, optimizer: Optimizer | None = None
    ) -> dict[str, float]:
        """One step of ``optimizer`` (the policy's by default) on the mean of ``losses`` over this
        process's ``rows`` (there may be none) and everybody else's, in micro-batches; returns the
        means of the loss and its metrics, and logs them, lr and grad_norm as NAME/....
        """
        phase = f"update {name}" if optimizer else "update"
        chosen, model = optimizer or self.optimizer, self.policy.model
        return self.updates.on_rows(losses, rows, name, phase, chosen, self.pace, model)

    def fresh_optimizer(self) -> Optimizer:
        """The optimiser that the stage begins with."""
        fp16 = self.policy.model.precision == "fp16"
        return self.learner(self.trainable, self.stages.now.optimizer, fp16)

    def pin(self, iteration: int) -> None:
        """Keep the episodes of an iteration (of `collect` with ``keep``) as long as the run."""
        self.collector.pin(iteration)

    def kept(self, iteration: int) -> Any:
        """The episodes that were kept of an iteration, of all processes."""
        return self.collector.kept(iteration)

    def learner(
        self,
        parameters: Iterable[torch.nn.Parameter],
        settings: OptimizerConfig,
        fp16: bool = False,
    ) -> Optimizer:
        """An optimiser of its own for a critic or another part beside the policy; `register` it."""
        reduce = self.processes.reduce if self.processes.count > 1 else None
        return Optimizer(settings, list(parameters), fp16, reduce)

    @contextmanager
    def learning(self, weights: Weights, optimizer: Optimizer) -> Iterator[None]:
        """Learn with other weights and another optimiser in the policy's place."""
        own = self.optimizer
        with weights.using():
            self.optimizer = optimizer
            try:
                yield
            finally:
                self.optimizer = own

    # The policy's weights and parts, and the state of the run

    def weights(self) -> Weights:
        """A copy of the policy's weights as they are now; `register` it where it changes."""
        return Weights(self.trainable)

    def pool(self, size: int) -> Pool:
        """The last ``size`` copies of the policy's weights, the first taken now; `register` it."""
        return Pool(self.trainable, size)

    def register(self, **objects: Stateful) -> None:
        """Save and resume with the run what only trains. Call it before `iterations`.

        Raises `ValueError` for a name that something else has, and for a part of the policy.
        """
        self.state.register(objects)

    def attach(self, **parts: Part) -> None:
        """Give the policy that collects and the one that is deployed a part, saved with them and
        resumed with the run; a part of the same name is replaced.

        Raises `ConfigError` where it can't be saved or does not fit.
        """
        for name, part in parts.items():
            if self.policy.parts.get(name) is not part:
                require_savable(name, part, self.policy.model)
            try:
                policy = self.policy.attach(name, part)
                came = name in self.policy.parts and name not in self.state.parts
                self.state.own_part(name, part)
            except ValueError as error:
                raise ConfigError(f"the policy's part {name!r}: {error}") from None
            if came:
                self.say(f"the part {name} that the policy came with is replaced by the method's")
            self.policy = policy
            self.deployment.attach(name, part)

    def awaits(self, name: str) -> bool:
        """True where the run was resumed and its checkpoint has a part of this name that has not
        been attached again.
        """
        return name in self.state.unclaimed

    def save_point(self) -> tuple[Weights, Any]:
        """Everything that an update of the policy changes: its weights, its optimiser, their
        averages.
        """
        return self.weights(), copy.deepcopy(self.optimizer.state_dict())

    def rewind(self, point: tuple[Weights, Any]) -> None:
        """Undo every update since a `save_point`, to the bit."""
        weights, optimizer = point
        weights.restore()
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))

    # Evaluating and telling

    def milestone(self, name: str, best_of: int = 1) -> None:
        """Evaluate the policy as it stands, log NAME/metric, and keep it as stages/NAME; a
        rehearsal passes none (see `Deployment.milestone`).
        """
        if not self.rehearsal:
            self.deployment.milestone(name, self.iteration, best_of)

    def keep(self, name: str) -> None:
        """Save the policy as it stands as stages/NAME."""
        self.deployment.keep(name)

    def try_out(self, episodes: int, name: int) -> float:
        """The success rate (or mean return) of the deployed policy in real episodes, which count as
        any others that the run collects; of one ``name`` they always begin from the same starts.
        """
        seed = reset_seed(self.experiment.seed, name, -1 % 2**32)
        assert isinstance(self.evaluator, EpisodeEvaluator)
        return self.evaluator.try_out(self.deployed, self.processes, self.metrics, episodes, seed)

    def show(self, rollout: Rollout, advantage: Tensor) -> None:
        """Draw, where an evaluation is due, one group of pictures with its rewards and advantages
        [M,N].
        """
        if self.evaluation_due and not self.evaluator.of_actions:
            self.display.draw_group(rollout, advantage, self.iteration)

    @property
    def evaluation_due(self) -> bool:
        """True in the iterations after which ``eval.every`` asks for an evaluation."""
        every = self.experiment.eval.every
        return not self.rehearsal and bool(every) and self.iteration % every == 0

    def seen(self, samples: int) -> None:
        """Count the samples of an iteration that collects none itself."""
        self.metrics.collected += samples // self.processes.count

    def log(self, name: str, value: float) -> None:
        """Add a number to this iteration's metrics; several in one iteration are averaged."""
        self.metrics.log(name, value)

    def say(self, text: str) -> None:
        """Tell the person one line, above the progress bar."""
        self.display.say(text)

    @property
    def features(self) -> int:
        """The length F of what a critic sees of an observation or a prompt."""
        with torch.no_grad():
            model = self.policy.model
            return model.features(model.encode(self.collector.example())).shape[1]
