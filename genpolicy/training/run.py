"""Run: the verbs that a method is written in.

World size never enters a config: global sizes are stated, Run divides them and keeps groups whole.
There is no wrapper around the network: gradients are summed over processes by hand, so that a
pipeline's own code keeps running.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from genpolicy.chain import Condition, Noise
from genpolicy.config.schema import Experiment, OptimizerConfig
from genpolicy.contracts.dataset import Dataset, Pictures
from genpolicy.contracts.task import Context, ControlTask, Task
from genpolicy.policy.parts_files import attached
from genpolicy.policy.policy import ChainPolicy, Part
from genpolicy.policy.weights import Pool, Weights
from genpolicy.rollout import minibatch
from genpolicy.rollout.episodes import reset_seed
from genpolicy.rollout.examples import shown
from genpolicy.rollout.minibatch import PASS, Batch, Batches, Chosen, Pass
from genpolicy.rollout.person import Intervention
from genpolicy.rollout.rollout import Rollout, unjudged
from genpolicy.training.budget import Spent
from genpolicy.training.checkpoint import RunState, Stateful
from genpolicy.training.collector import Collector, Request, acting
from genpolicy.training.deployment import Deployment
from genpolicy.training.draws import Draws
from genpolicy.training.evaluator import Evaluator
from genpolicy.training.learner import Learner
from genpolicy.training.optimizer import Optimizer
from genpolicy.training.redraw import redrawn, require_groups
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
    data: the recorded episodes or pictures, if the experiment names some. teacher: the policy that
        is distilled, if the policy section names one.
    learner: the weights that learn, the method's stages and their optimisers.
    micro_batches: work on rows, as many at once as memory allows.
    spent: counters. metrics: of the iteration that is running.
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
        teacher: ChainPolicy | None = None,
        iterate: Callable[["Run"], Iterator[int]],
        rehearsal: bool = False,
    ) -> None:
        self.experiment, self.policy, self.task = experiment, policy, task
        self.collector, self.evaluator, self.data = collector, evaluator, data
        self.teacher = teacher
        self.folder, self.processes = workspace.folder, workspace.processes
        self.metrics, self.display = workspace.metrics, workspace.display
        self.micro_batches = workspace.micro_batches
        self.spent = Spent()
        self.learner = Learner(policy.model, experiment.optimizer, workspace.processes)
        self.deployment = Deployment(
            experiment, policy, evaluator, workspace, self.learner.averaged
        )
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

    @property
    def stages(self) -> Stages:
        """The method's stages, and the place among them."""
        return self.learner.stages

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters of the policy's network that learn."""
        return self.learner.parameters

    # The loop

    def begin(self, iteration: int) -> None:
        """Begin an iteration; called by what stands around the method's loop."""
        self.spent.iteration = iteration
        self.learner.begin_iteration(self.progress)

    def iterations(self) -> Iterator[int]:
        """Yield 1, 2, ... until the budget is spent or a signal asks to stop; resume, evaluate,
        checkpoint and log around it (`genpolicy.training.loop`; a rehearsal does none of that).
        """
        return self._iterate(self)

    def plan(self, stages: Sequence[Stage]) -> None:
        """Give the method stages, each with an optimiser of its own; before `iterations`."""
        self.learner.plan(stages)

    def advance(
        self, through: bool = False, leave: Callable[[str], None] = lambda stage: None
    ) -> None:
        """Count an iteration of the stage. Where that was its last (or ``through``), call
        ``leave`` with its name and go on with the next one's fresh optimiser, or end the run.

        Where the stage averaged its weights, the averages are what goes on: they are what was
        evaluated and saved.
        """
        self.learner.advance(through, leave)
        self.spent.over = self.stages.over

    # Collecting

    def collect(
        self,
        groups: int,
        members: int,
        *,
        updates: int = 1,
        shared_prefix: bool = False,
        branch_at: int | None = None,
        keep: bool = False,
        starts: Sequence[int] | None = None,
        person: Intervention | None = None,
        policy: ChainPolicy | None = None,
        window: tuple[int, int] | None = None,
    ) -> Rollout:
        """Roll the policy out: ``groups`` = M prompts or start states of this iteration,
        ``members`` = N samples or episodes each.

        shared_prefix: the members of a group share everything before the window (prompts only).
        branch_at: they share their first ``branch_at`` steps, which are drawn as the others are,
        and only the steps after them are kept (prompts only).
        updates, keep, starts, person: see `Request`. policy: acts in the place of the one that
        learns. window: [low, high) steps at which the kernel acts, kept and trained.
        """
        window = window or self._draw_window()
        branch = window[0] if shared_prefix else branch_at
        request = Request(groups, members, updates, branch, keep, starts, person)
        acting = (policy or self.policy).with_window(window)
        rollout = self.collector(acting, self.iteration, request)
        self.metrics.log_all(rollout.metrics())
        return rollout

    def require_split(self, setting: str, groups: int, updates: int = 1) -> None:
        """Raise `ConfigError` where ``groups`` (of the ``setting``) don't split over processes."""
        self.processes.require_split(setting, groups, updates)

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
        the others are, and only the steps after them are kept, in the whole window and not in the
        iteration's own; `ValueError` where there are none, and for rows that are no whole groups.
        """
        require_groups(place, members)
        policy = self.policy
        if branch_at is None:
            policy = policy.with_window(self._draw_window())
        noise = self.noise("redraw", place // members, number)
        noise = replace(noise, member=place % members)
        self.metrics.phase("sample")
        trajectory = redrawn(policy, condition, noise, self.micro_batches, members, branch_at)
        self.metrics.phase(None)
        return unjudged(trajectory, place, total)

    def contexts(self, count: int) -> tuple[Context, Tensor]:
        """This process's share of this iteration's ``count`` prompts (recorded observations where
        there is data) and their numbers among the ``count``; the policy draws nothing.
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

    def counting(self, policy: ChainPolicy) -> AbstractContextManager[None]:
        """Count the network evaluations of a policy, which may be another than the one that learns,
        while the block runs.
        """
        return acting(policy, self.policy.model, self.metrics)

    # Drawing

    def noise(
        self, purpose: str, place: Tensor, number: int = 0, iteration: int | None = None
    ) -> Noise:
        """Standard normal noise of the rows ``place`` [B], a pure function of purpose, seed,
        iteration (by default this one's), number and place.
        """
        at = self.iteration if iteration is None else iteration
        return self._draws.noise(purpose, at, place, number)

    def rows(
        self, count: int, size: int | tuple[int, ...], purpose: str, number: int = 0
    ) -> Tensor:
        """This process's share of ``size`` rows of ``count``, drawn with replacement."""
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
        self, rollout: Rollout, updates: int, epochs: int = 1, chosen: Chosen = None, of: str = PASS
    ) -> Batches:
        """`minibatch.rows`, ``epochs`` times; only of the ``chosen`` rows, bool [R]. of: the
        order's purpose, where the policy is not the only one that passes over rows.
        """
        for epoch in range(epochs):
            yield from self._pass(minibatch.rows, rollout, updates, epoch, chosen, of)

    def pairs(self, rollout: Rollout, updates: int, epoch: int, chosen: Chosen = None) -> Batches:
        """`minibatch.pairs` in an order of the epoch's own, which no other rollout's may share."""
        return self._pass(minibatch.pairs, rollout, updates, epoch, chosen, PASS)

    def chains(self, rollout: Rollout, updates: int, epoch: int, chosen: Chosen = None) -> Batches:
        """`minibatch.chains` in an order of the epoch's own, as `pairs`."""
        return self._pass(minibatch.chains, rollout, updates, epoch, chosen, PASS)

    def _pass(
        self, kind: Pass, rollout: Rollout, updates: int, epoch: int, chosen: Chosen, purpose: str
    ) -> Batches:
        """The minibatches of a pass that have a row in some process."""
        order = self.generator(f"{purpose} {kind.__name__}", epoch)
        batches = kind(rollout, updates, order, chosen)
        return (batch for batch in batches if self.processes.sum(float(len(batch))))

    def normalised(self, values: Tensor) -> Tensor:
        """(values - mean) / std over the rows [R] of all processes."""
        return self.processes.normalised(values)

    def verified(self, rollout: Rollout, log_ratio: LogRatio, tolerance: float) -> Rollout:
        """A rollout that the training forward replays to within a log-ratio of ``tolerance``."""
        return self.replay_check(self._acting(rollout), rollout, log_ratio, tolerance)

    def _acting(self, rollout: Rollout) -> ChainPolicy:
        """The policy on the chain, and with the window, that a rollout was drawn with."""
        steps = rollout.trajectory.steps
        return self.policy.along(rollout.trajectory).with_window((steps.start, steps.stop))

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

        advantage: of episodes [M,N], or [M,N,m] where the loss takes several, or of this process's
        rows [R]. reference: weights under which
        every step is scored too, without gradients. also: optimisers of other parts that the loss
        reaches, stepped together.
        """
        optimizers, policy = [self.learner.optimizer, *also], self._acting(rollout)
        return self.updates.on_rollout(
            policy, rollout, batch, advantage, loss, reference, optimizers, self.learner.pace
        )

    def descend(
        self, losses: Losses, rows: int, name: str, optimizer: Optimizer | None = None
    ) -> dict[str, float]:
        """One step of ``optimizer`` (the policy's by default) on the mean of ``losses`` over this
        process's ``rows`` (there may be none) and everybody else's, in micro-batches; returns the
        means of the loss and its metrics, and logs them, lr and grad_norm as NAME/....
        """
        phase = f"update {name}" if optimizer else "update"
        chosen, model = optimizer or self.learner.optimizer, self.policy.model
        return self.updates.on_rows(losses, rows, name, phase, chosen, self.learner.pace, model)

    def pin(self, iteration: int) -> None:
        """Keep the episodes of an iteration (of `collect` with ``keep``) as long as the run."""
        self.collector.pin(iteration)

    def kept(self, iteration: int) -> Any:
        """The episodes that were kept of an iteration, of all processes."""
        return self.collector.kept(iteration)

    def new_optimizer(
        self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerConfig
    ) -> Optimizer:
        """An optimiser of its own for a critic or another part beside the policy; `register` it."""
        return self.learner.new_optimizer(parameters, settings)

    def learning(self, weights: Weights, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Learn with other weights and another optimiser in the policy's place."""
        return self.learner.using(weights, optimizer)

    # The policy's weights and parts, and the state of the run

    def weights(self) -> Weights:
        """A copy of the policy's weights as they are now; `register` it where it changes."""
        return Weights(self.trainable)

    def pool(self, size: int) -> Pool:
        """A uniform sample of at most ``size`` copies of the policy's weights, the first taken now;
        `register` it.
        """
        return Pool(self.trainable, size)

    def register(self, **objects: Stateful) -> None:
        """Save and resume with the run what only trains. Call it before `iterations`.

        Raises `ValueError` for a name that something else has, and for a part of the policy.
        """
        self.state.register(objects)

    def attach(self, **parts: Part) -> None:
        """Give the policy that collects and the one that is deployed a part, saved with them and
        resumed with the run; a part of the same name is replaced.

        Raises `ConfigError` where it can't be saved or fit, `ValueError` where another owns it.
        """
        for name, part in parts.items():
            policy = attached(self.policy, name, part)
            if name in self.policy.parts and name not in self.state.parts:
                self.say(f"the part {name} that the policy came with is replaced by the method's")
            self.state.own_part(name, part)
            self.policy = policy
            self.deployment.attach(name, part)

    def choose_among(self, samples: int) -> None:
        """Let the policy that collects and the one that is deployed draw ``samples`` per decision,
        of which their critic, a part, picks the one that is carried out. It is not saved with the
        run: a resumed one says it again when it attaches the critic.
        """
        self.policy = replace(self.policy, best_of=samples)
        self.deployment.choose_among(samples)

    def awaits(self, name: str) -> bool:
        """True where the checkpoint has a part of this name that is not attached again yet."""
        return name in self.state.unclaimed

    def save_point(self) -> tuple[Weights, Any]:
        """Everything that an update of the policy changes: weights, optimiser, averages."""
        return self.learner.save_point()

    def rewind(self, point: tuple[Weights, Any]) -> None:
        """Undo every update since a `save_point`, to the bit."""
        self.learner.rewind(point)

    # Evaluating and telling

    def milestone(self, name: str, best_of: int = 1) -> None:
        """Evaluate the policy as it stands, and keep it (`Deployment.milestone`)."""
        if not self.rehearsal:
            self.deployment.milestone(name, self.iteration, best_of)

    def keep(self, name: str) -> None:
        """Save the policy as it stands as stages/NAME."""
        self.deployment.keep(name)

    def try_out(self, episodes: int, name: int) -> float:
        """The success rate (or mean return) of the deployed policy: the mean of `outcomes`."""
        return float(self.outcomes(episodes, name).mean())

    def outcomes(self, episodes: int, name: int) -> Tensor:
        """Success (or return) of the deployed policy in real episodes, [E] fp64, which count as any
        others that the run collects; of one ``name`` they always begin from the same starts.
        """
        seed = reset_seed(self.experiment.seed, name, -1 % 2**32)
        found = self.evaluator.try_out(self.deployed, self.processes, self.metrics, episodes, seed)
        return torch.tensor(self.processes.agreed(found.tolist()), dtype=torch.float64)

    def show(self, rollout: Rollout, advantage: Tensor) -> None:
        """Draw one group of pictures with its advantages [M,N] where an evaluation is due."""
        if self.evaluation_due and not self.evaluator.of_actions:
            self.display.draw_group(rollout, advantage, self.iteration)

    @property
    def evaluation_due(self) -> bool:
        """True in the iterations after which ``eval.every`` asks for an evaluation."""
        every = self.experiment.eval.every
        return not self.rehearsal and bool(every) and self.iteration % every == 0

    def seen(self, samples: int) -> None:
        """Count recorded samples that were learned from: they are no decisions, and an iteration's
        own count where it collects none.
        """
        self.metrics.seen += self.processes.share(samples)

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
