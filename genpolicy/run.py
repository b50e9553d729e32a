"""Run: the verbs that a method is written in. The only file that imports accelerate.

World size never enters a config: global sizes are stated, Run divides them and keeps groups whole. There is no wrapper around the
network: gradients are summed over processes by hand, so that a pipeline's own code keeps running.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import platform
import resource
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

import genpolicy
from genpolicy import checkpoint, config, report
from genpolicy.chain import Noise, Trajectory
from genpolicy.chain.values import Gaussian
from genpolicy.config import ConfigError, Experiment, choice, make
from genpolicy.build import deployed_sampler, load_rewards, make_policy, make_rewards, prompt_lines, save_policy
from genpolicy.evaluate import Evaluation, evaluate
from genpolicy.policy import ChainPolicy, swapped
from genpolicy.reward import Context, RewardError, WeightedRewards
from genpolicy.rollout import Judged, Rollout, Scored, collect, concatenate
from genpolicy.task import Task

Loss = Callable[[Scored], tuple[Tensor, dict[str, Tensor]]]
"""A scored step of b rows -> (loss [b], metrics by name [b]). Pure."""
LogRatio = Callable[[Gaussian, Gaussian, Tensor], Tensor]
REPLAY_CHECK = "replay check"
REDRAW = 30.0
"""Seconds between two drawings of the curves: one costs a second, which short runs would spend again and again."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


class Stateful(Protocol):
    """Anything that `Run.register` saves and resumes."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


class Method(Protocol):
    """One paper: ``train(run)`` is its loop in the verbs of Run."""

    def train(self, run: "Run") -> None: ...


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

    phases: name -> (seconds, peak GB of memory). memory: whose. evaluation_seconds: of one evaluation, extrapolated from sampling.
    iterations, evaluations, seconds: of the whole budget, with its evaluations of the policy.
    """

    memory: str = "the accelerator's, peak of the phase" if torch.cuda.is_available() else "this process's, peak so far"
    samples: int = 0
    evaluations_per_sample: float = 0.0
    total_seconds: float = 0.0
    phases: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    evaluation_seconds: float = 0.0
    iterations: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0

    def project(self, experiment: Experiment) -> None:
        """Extrapolate to the budget: the replay check is made once, everything else at each iteration."""
        b, e = experiment.budget, experiment.eval
        once = self.phases.get(REPLAY_CHECK, (0.0, 0.0))[0]
        each, nfe = self.total_seconds - once, self.evaluations_per_sample * self.samples
        limits = ((b.iterations, 1), (b.nfe, nfe), (b.seconds, each))
        self.iterations = math.ceil(min(limit / cost for limit, cost in limits if limit is not None))
        self.evaluations = self.iterations * nfe
        drawn = sum(self.phases.get(name, (0.0, 0.0))[0] for name in ("sample", "decode", "reward"))
        self.evaluation_seconds = drawn * e.samples / self.samples
        evaluations = 2 + (max(self.iterations - 1, 0) // e.every if e.every else 0)
        self.seconds = once + self.iterations * each + evaluations * self.evaluation_seconds


class Run:
    """The state of one training run: policy, task, reward, optimiser, counters, folder."""

    def __init__(
        self,
        experiment: Experiment,
        policy: ChainPolicy,
        task: Task,
        reward: WeightedRewards,
        eval_prompts: Sequence[str],
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self.experiment, self.policy, self.task, self.reward = experiment, policy, task, reward
        self.eval_prompts, self.folder, self.accelerator = eval_prompts, folder, accelerator
        self.sampler = deployed_sampler(experiment.chain, experiment.eval.sampler)
        self.deployed = make_policy(policy.model, self.sampler)
        self.window = policy.chain.stochastic
        self.iteration = self.updates = 0
        self.seconds = 0.0
        self.trainable = list(policy.model.trainable().values())
        o = experiment.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trainable, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, foreach=True
        )
        self.scaler = torch.amp.GradScaler(policy.model.device.type, enabled=policy.model.precision == "fp16")
        self.ema = [p.detach().clone() for p in self.trainable] if o.ema else None
        self.micro_batch: int | None = None if experiment.micro_batch == "auto" else int(experiment.micro_batch)
        self.registered: dict[str, Stateful] = {}
        self.before: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.best = -math.inf
        self.replay_gap: float | None = None
        self._rescore: bool | None = None
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._clock: dict[str, float] = defaultdict(float)
        self._memory: dict[str, float] = defaultdict(float)
        self.rehearsal: Rehearsal | None = None
        self._stop = False
        self._drawn = 0.0
        self._evaluated_at = -1

    # ---------------------------------------------------------------- the loop

    def iterations(self) -> Iterator[int]:
        """Yield 1, 2, ... until the budget is spent or a signal asks to stop; resume, evaluate, checkpoint and log around it."""
        if self.rehearsal is not None:
            yield from self._rehearse(self.rehearsal)
            return
        self._resume()
        if self.accelerator.is_main_process:
            (self.folder / "config.yaml").write_text(config.to_yaml(self.experiment))
        if self.iteration == 0 and not self.before:
            self.before = self.evaluate()
            self._save()
        handlers = {s: signal.signal(s, self._request_stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            with self._bar() as bar:
                while self.progress < 1 and not self._stopping():
                    started = time.perf_counter()
                    evaluations = self.policy.model.evaluations
                    self.iteration += 1
                    yield self.iteration
                    self.seconds += time.perf_counter() - started
                    self._finish_iteration(evaluations, bar)
            self._save()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _rehearse(self, cost: "Rehearsal") -> Iterator[int]:
        """One iteration on the real sizes that leaves nothing behind: no file, and the weights as they were."""
        weights, evaluations = self.snapshot(), self.policy.model.evaluations
        self.iteration, started = 1, time.perf_counter()
        yield 1
        self._phase(None)
        cost.total_seconds = time.perf_counter() - started
        cost.samples = self._rows_collected * self.accelerator.num_processes
        cost.evaluations_per_sample = (self.policy.model.evaluations - evaluations) / max(self._rows_collected, 1)
        cost.phases = {name: (spent, self._memory[name]) for name, spent in self._clock.items()}
        self.restore(weights)

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, by whichever of its limits is nearest."""
        b = self.experiment.budget
        spent = ((self.iteration, b.iterations), (self.evaluations, b.nfe), (self.seconds, b.seconds))
        return max((done / limit for done, limit in spent if limit), default=0.0)

    @property
    def evaluations(self) -> float:
        """Network evaluations of training so far, all processes together, in rows."""
        return self._evaluations_before + self.policy.model.evaluations * self.accelerator.num_processes

    _evaluations_before = 0.0

    # ---------------------------------------------------------------- collecting

    def collect(self, groups: int, members: int, *, updates: int = 1, shared_prefix: bool = False) -> Rollout:
        """Roll the policy out: ``groups`` = M prompts of this iteration, ``members`` = N samples each.

        updates: how many minibatches the rollout will be split into (each gets whole groups, evenly over the processes).
        shared_prefix: the members of a group share everything before the window.
        """
        window = self._draw_window()
        policy = self.policy.with_window(window)
        local = self._local_groups(groups, updates)
        base = (self.iteration - 1) * groups
        prompts = tuple(self.task.reset(range(base, base + groups)).prompts)
        rows = [prompts[g] for g in local.tolist() for _ in range(members)]
        noise = Noise.rows(self.experiment.seed, self.iteration, local, members)

        def chunk(rows_: slice) -> Judged:
            context = Context(rows[rows_])
            branch = window[0] if shared_prefix else None
            return collect(
                policy, context, self.reward, noise[rows_], members=members, branch_at=branch, on_phase=self._phase
            )

        judged = concatenate(self._in_micro_batches(chunk, len(rows), members), policy)
        self._phase(None)
        self._rows_collected += len(rows)
        parts = {name: self._gather_groups(value.view(-1, members), updates) for name, value in judged.parts.items()}
        rewards = self.reward.total(parts)
        for name, value in {**parts, "total": rewards}.items():
            self.log(f"reward/{name}", value.mean().item())
        self.log("reward/total_ci95", 1.96 * rewards.mean(1).std().item() / math.sqrt(max(groups, 2)))
        self.log("reward/group_std_zero", (rewards.std(1, correction=0) == 0).double().mean().item())
        return Rollout(judged.trajectory, judged.context, judged.outputs, parts, rewards, prompts, local)

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

    def _local_groups(self, groups: int, updates: int) -> Tensor:
        world = self.accelerator.num_processes
        if groups % (updates * world):
            raise ConfigError(
                f"{groups} groups can't be split evenly into {updates} updates on {world} processes: "
                f"the number of groups must be a multiple of {updates * world}"
            )
        return torch.arange(groups).view(updates, world, -1)[:, self.accelerator.process_index].flatten()

    def _gather_groups(self, local: Tensor, updates: int) -> Tensor:
        """[m,N] of this process to [M,N] of all, in the groups' global order."""
        world = self.accelerator.num_processes
        if world == 1:
            return local
        gathered = self.accelerator.gather(local.to(self.accelerator.device)).cpu()
        return gathered.view(world, updates, -1, local.shape[1]).transpose(0, 1).reshape(-1, local.shape[1])

    def minibatches(self, rollout: Rollout, updates: int, epochs: int = 1) -> Iterator[slice]:
        """``epochs`` passes over the rollout in ``updates`` minibatches of whole groups: this process's rows of each."""
        rows = len(rollout.trajectory) // updates
        for _ in range(epochs):
            for update in range(updates):
                yield slice(update * rows, (update + 1) * rows)

    def verified(self, rollout: Rollout, log_ratio: LogRatio, tolerance: float) -> Rollout:
        """Replay must be exact: on the first rollout, |log-ratio| of unchanged weights must stay below ``tolerance``.

        Over it, the rollout's means are scored again with the training forward (counted as evaluations), from then on for every
        rollout; if even two training forwards disagree, the run refuses to start and names the step.
        """
        policy = self._window_of(rollout.trajectory)
        if self._rescore is None:
            self._phase(REPLAY_CHECK)
            counted = policy.model.evaluations
            gap, k = self._replay_gap(policy, rollout.trajectory, log_ratio)
            self.replay_gap = gap
            self._rescore = gap > tolerance
            if self._rescore:
                self.say(
                    f"replay: log-ratio {gap:.1e} at step {k} exceeds a tenth of the clip range ({tolerance:.1e}): log-probs are "
                    "scored again with the training forward (one more evaluation per trained step)"
                )
                gap, k = self._replay_gap(policy, self._scored_again(policy, rollout.trajectory), log_ratio)
                if gap > tolerance:
                    raise ConfigError(
                        f"replay is not exact: at step {k} two training forwards of the same state differ by a log-ratio of {gap:.1e}, "
                        f"more than a tenth of the clip range ({tolerance:.1e}); use precision fp32, a smaller window or a larger clip"
                    )
            policy.model.evaluations = counted
            self._phase(None)
        if not self._rescore:
            return rollout
        self._phase("rescore")
        return replace(rollout, trajectory=self._scored_again(policy, rollout.trajectory))

    def _replay_gap(self, policy: ChainPolicy, trajectory: Trajectory, log_ratio: LogRatio) -> tuple[float, int]:
        gaps = {}
        for k in trajectory.steps:

            def chunk(rows: slice, k: int = k) -> float:
                part = trajectory[rows]
                with torch.enable_grad():
                    new = policy.transition(part, k)
                return float(log_ratio(Gaussian(new.mean.detach(), new.std), part.acted(k), part.after(k)).abs().max())

            gaps[k] = max(self._in_micro_batches(chunk, len(trajectory), trajectory.shared))
        worst = max(gaps, key=lambda k: gaps[k])
        return gaps[worst], worst

    def _scored_again(self, policy: ChainPolicy, trajectory: Trajectory) -> Trajectory:
        means = []
        for k in trajectory.steps:

            def chunk(rows: slice, k: int = k) -> Tensor:
                return policy.transition(trajectory[rows], k).mean.detach()

            means.append(torch.cat(self._in_micro_batches(chunk, len(trajectory), trajectory.shared)))
        return replace(trajectory, mean=torch.stack(means, 1))

    def _window_of(self, trajectory: Trajectory) -> ChainPolicy:
        return self.policy.with_window((trajectory.steps.start, trajectory.steps.stop))

    # ---------------------------------------------------------------- updating

    def update(
        self, rollout: Rollout, rows: slice, advantage: Tensor, loss: Loss, reference: Sequence[Tensor] | None = None
    ) -> None:
        """One optimiser step on the mean of ``loss`` over these rows and the rollout's kept steps, in micro-batches, over all processes.

        advantage [M,N]. reference: a snapshot under which every step is scored too, without gradients.
        """
        self._phase("update")
        chains = rollout.trajectory[rows]
        policy, advantages = self._window_of(chains), rollout.rows(advantage)[rows]
        count = len(chains) * len(chains.steps) * self.accelerator.num_processes
        sums: dict[str, float] = {}

        def accumulate(part: slice) -> None:
            for k in chains.steps:
                value, metrics = loss(self._score(policy, chains[part], k, advantages[part], reference))
                self.scaler.scale(value.sum() / count).backward()
                for name, metric in {"loss": value, **metrics}.items():
                    sums[name] = sums.get(name, 0.0) + float(metric.detach().double().sum())

        def restart() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            sums.clear()

        restart()
        self._in_micro_batches(accumulate, len(chains), chains.shared, restart)
        self._apply_gradients()
        totals = self._sum(torch.tensor(list(sums.values()), dtype=torch.float64)) / count
        for name, value in zip(sums, totals.tolist(), strict=True):
            self.log(f"policy/{name}", value)
        self._phase(None)

    def _score(
        self, policy: ChainPolicy, batch: Trajectory, k: int, advantage: Tensor, reference: Sequence[Tensor] | None
    ) -> Scored:
        anchor = None
        if reference is not None:
            with torch.no_grad(), self.using(reference):
                anchor = policy.transition(batch, k)
        grid = policy.chain.grid
        return Scored(
            new=policy.transition(batch, k),
            old=batch.acted(k),
            reference=anchor,
            x=batch.after(k),
            advantage=advantage,
            std=policy.std(k),
            dt=float(grid[k] - grid[k + 1]),
            gain=policy.gain(k),
        )

    def _apply_gradients(self) -> None:
        if self.accelerator.num_processes > 1:
            flat = torch.cat([_gradient(p).flatten() for p in self.trainable])
            flat = self.accelerator.reduce(flat, "sum")
            for p, g in zip(self.trainable, flat.split([p.numel() for p in self.trainable]), strict=True):
                p.grad = g.view_as(p).clone()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.experiment.optimizer.max_grad_norm)
        if not self.scaler.is_enabled() and not bool(norm.isfinite()):
            raise FloatingPointError(
                f"the gradient is {float(norm)} at iteration {self.iteration}: nothing was applied; the last checkpoint is intact"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1
        if self.ema is not None:
            decay = min((1 + self.updates) / (10 + self.updates), self.experiment.optimizer.ema)
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.trainable], 1 - decay)
        self.log("grad_norm", float(norm))

    def _lr(self) -> float:
        o = self.experiment.optimizer
        rise = min(1.0, (self.updates + 1) / o.warmup) if o.warmup else 1.0
        return o.lr * rise * (o.final + (1 - o.final) * 0.5 * (1 + math.cos(math.pi * min(self.progress, 1.0))))

    def _in_micro_batches[T](
        self, work: Callable[[slice], T], rows: int, whole: int, restart: Callable[[], None] = lambda: None
    ) -> list[T]:
        """work(slice) over ``rows`` in micro-batches of whole groups; halved, from the start, when memory runs out."""
        while True:
            size = rows if self.micro_batch is None else max(self.micro_batch // whole, 1) * whole
            try:
                return [work(slice(start, min(start + size, rows))) for start in range(0, rows, size)]
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not any(text in str(error) for text in OUT_OF_MEMORY) or self.experiment.micro_batch != "auto":
                    raise
                if min(size, rows) <= whole:
                    raise ConfigError(
                        f"out of memory in phase {self._phase_name or 'sample'} with {whole} rows at a time, the smallest micro-batch: "
                        "lower the group size, the resolution, or set policy.gradient_checkpointing and policy.offload"
                    ) from error
                self.micro_batch = max(min(size, rows) // 2 // whole, 1) * whole
                self.say(f"out of memory: micro_batch is now {self.micro_batch} rows; global sizes are unchanged")
                restart()
                torch.cuda.empty_cache()

    # ---------------------------------------------------------------- snapshots and state

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

    def _resume(self) -> None:
        state = checkpoint.latest(self.folder)
        if state is None:
            if self.accelerator.is_main_process:
                report.truncate(self.folder, -1)
            return
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the checkpoint in {self.folder} does not fit this experiment (was its policy or method changed?): {error}"
            ) from error
        counters = state["counters"]
        self.iteration, self.updates, self.seconds = counters["iteration"], counters["updates"], counters["seconds"]
        self._evaluations_before, self.best = counters["evaluations"], counters["best"]
        self.before, self._rescore = counters["before"], counters["rescore"]
        self.last, self._evaluated_at = counters["last"], counters["evaluated_at"]
        if self.accelerator.is_main_process:
            report.truncate(self.folder, self.iteration)
        self.accelerator.wait_for_everyone()
        self.say(f"resumed at iteration {self.iteration}")

    def _restore(self, state: dict[str, Any]) -> None:
        for parameter, value in zip(self.trainable, state["parameters"], strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema = [value.to(p.device) for value, p in zip(state["ema"], self.trainable, strict=True)]
        for name, value in state["registered"].items():
            self.registered[name].load_state_dict(value)

    def _save(self) -> None:
        """Checkpoint, and the policy as it stands, written atomically by the main process."""
        if self.accelerator.is_main_process:
            counters = {
                "iteration": self.iteration,
                "updates": self.updates,
                "seconds": self.seconds,
                "evaluations": self.evaluations,
                "best": self.best,
                "before": self.before,
                "last": self.last,
                "evaluated_at": self._evaluated_at,
                "rescore": self._rescore,
            }
            state = {
                "parameters": [p.detach() for p in self.trainable],
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": self.ema,
                "registered": {name: value.state_dict() for name, value in self.registered.items()},
                "counters": counters,
            }
            checkpoint.write(self.folder, self.iteration, state)
            if self.iteration:
                with self._averaged():
                    save_policy(self.deployed, self.experiment, self.sampler, self.folder / "policy")
        self.accelerator.wait_for_everyone()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.using(self.ema)

    # ---------------------------------------------------------------- evaluating and telling

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the deployed sampler (with averaged weights, if any) on the fixed evaluation set; keep the best policy."""
        e = self.experiment.eval
        evaluations = self.policy.model.evaluations
        with self._averaged():
            result = evaluate(
                self.deployed,
                self.reward,
                prompts=self.eval_prompts,
                samples=e.samples,
                seed=e.seed,
                process=(self.accelerator.process_index, self.accelerator.num_processes),
                gather=self._gather_rows,
                batch=self.micro_batch or 256,
            )
            self.policy.model.evaluations = evaluations
            metrics = result.metrics()
            if self.accelerator.is_main_process:
                self._keep(result, metrics)
        self.last, self._evaluated_at = metrics, self.iteration
        return metrics

    def _keep(self, result: Evaluation, metrics: dict[str, Any]) -> None:
        select = self.experiment.eval.select or "reward/total"
        report.grid(result.outputs, result.prompts, self.folder / "samples" / str(self.iteration) / "grid.png")
        report.append(self.folder, {"iteration": self.iteration, **{f"eval/{k}": v for k, v in metrics.items()}})
        if self.iteration and metrics[select] > self.best:
            self.best = metrics[select]
            save_policy(self.deployed, self.experiment, self.sampler, self.folder / "policy_best")
        shown = "  ".join(f"{k.removeprefix('reward/')} {v:.3f}" for k, v in metrics.items() if k.startswith("reward/"))
        self.say(f"evaluation after {self.iteration} iterations ({result.samples} samples): {shown}")

    def show(self, rollout: Rollout, advantage: Tensor) -> None:
        """Where an evaluation is due, draw one group with its rewards and advantages [M,N]."""
        if self._evaluation_due() and self.accelerator.is_main_process:
            n = rollout.rewards.shape[1]
            group = int(rollout.local[0])
            report.group(
                rollout.outputs[:n],
                rollout.prompts[group],
                rollout.rewards[group],
                advantage[group],
                self.folder / "samples" / str(self.iteration) / "group.png",
            )

    def log(self, name: str, value: float) -> None:
        """Add a number to this iteration's metrics; several in one iteration are averaged."""
        self._metrics[name].append(value)

    def say(self, text: str) -> None:
        """One line to the person, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def _evaluation_due(self) -> bool:
        every = self.experiment.eval.every
        return self.rehearsal is None and bool(every) and self.iteration % every == 0

    def _finish_iteration(self, evaluations: float, bar: tqdm) -> None:
        metrics = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        rows = self._rows_collected or 1
        metrics["nfe_per_sample"] = (self.policy.model.evaluations - evaluations) / rows
        metrics["lr"] = self._lr()
        metrics.update({f"time/{phase}": spent for phase, spent in self._clock.items()})
        metrics["time_s"] = self.seconds
        metrics["memory/peak_gb"] = max(self._memory.values(), default=0.0)
        if self.accelerator.is_main_process:
            report.append(self.folder, {"iteration": self.iteration, **metrics})
            self.accelerator.log(metrics, step=self.iteration)
        self._metrics.clear()
        self._clock.clear()
        self._memory.clear()
        self._rows_collected = 0
        advance = min(self.progress, 1.0) * bar.total - bar.n
        reward = f"{metrics.get('reward/total', math.nan):.3f} ± {metrics.get('reward/total_ci95', math.nan):.3f}"
        bar.set_postfix_str(f"reward {reward}, {metrics['nfe_per_sample']:.1f} evaluations/sample", refresh=False)
        bar.update(advance)
        if self._evaluation_due() or self.progress >= 1:
            self.evaluate()
            if self.accelerator.is_main_process and self.progress < 1 and time.monotonic() - self._drawn > REDRAW:
                report.figures(self.folder)  # `finish` draws the last
                self._drawn = time.monotonic()
        if self.iteration % self.experiment.checkpoint_every == 0:
            self._save()

    _rows_collected = 0
    _phase_name: str | None = None
    _phase_started = 0.0

    def _phase(self, name: str | None) -> None:
        now = time.perf_counter()
        if self._phase_name is not None:
            self._clock[self._phase_name] += now - self._phase_started
            self._memory[self._phase_name] = max(self._memory[self._phase_name], _peak_gigabytes())
        self._phase_name, self._phase_started = name, now

    def _bar(self) -> tqdm:
        total = self.experiment.budget.iterations or 100
        return tqdm(
            total=total,
            initial=min(self.progress, 1.0) * total,
            desc=str(self.experiment.method["name"]),
            unit="it" if self.experiment.budget.iterations else "%",
            disable=not self.accelerator.is_main_process,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n:.0f}/{total} [{elapsed}<{remaining}] {postfix}",
            file=sys.stderr,
        )

    def _request_stop(self, number: int, _frame: Any) -> None:
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = True
        self.say(f"{signal.Signals(number).name}: finishing this iteration, saving, then stopping (again: stop at once)")

    def _stopping(self) -> bool:
        return bool(self._sum(torch.tensor([float(self._stop)]))[0] > 0)

    def _sum(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), "sum").cpu()

    def _gather_rows(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.gather(value.to(self.accelerator.device)).cpu()

    def finish(self, wall_time: float) -> Result:
        """The last evaluation, the figures and summary.json."""
        after = self.last if self._evaluated_at == self.iteration else self.evaluate()
        summary = {
            "asked": self.experiment.budget.__dict__,
            "iterations": self.iteration,
            "before": self.before,
            "after": after,
            "wall_time_s": wall_time,
            "training_s": self.seconds,
            "evaluations": self.evaluations,
            "replay_gap": self.replay_gap,
            "seeds": {"run": self.experiment.seed, "eval": self.experiment.eval.seed},
            "processes": self.accelerator.num_processes,
            "versions": {"python": platform.python_version(), **versions()},
        }
        if self.accelerator.is_main_process:
            report.figures(self.folder)
            report.write_json(self.folder / "summary.json", summary)
        self.accelerator.end_training()
        return Result(self.folder, self.before, after, summary)

    def require_density(self) -> None:
        """Raise unless every step of the window has a density: a likelihood method can't train a point."""
        for k in self.window:
            if self.policy.std(k) == 0:
                raise ConfigError(
                    f"step {k} of the window is deterministic (std 0) under kernel {self.experiment.chain.kernel}: a method that "
                    "needs likelihoods can't train it; use ddim with eta > 0, sde or cps, or another window"
                )
        if not self.window:
            raise ConfigError("the chain has no stochastic step to train: widen chain.window or use a kernel with noise")


def _peak_gigabytes() -> float:
    """The accelerator's memory at its highest since the last call; without one, this process's at its highest so far."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def train(experiment: Experiment | str | Path, overrides: Sequence[str] = ()) -> Result:
    """Run an experiment (an `Experiment`, a YAML's path, or a shipped config's name) to the end of its budget.

    A run's own config.yaml resumes that run. Raises `ConfigError` before any work starts if something does not fit.
    """
    started = time.perf_counter()
    resume = not isinstance(experiment, Experiment) and _is_run(Path(experiment))
    folder = Path(experiment).parent if resume else None
    if not isinstance(experiment, Experiment):
        experiment = config.load(experiment, overrides)
    folder = folder or Path(experiment.output)
    try:
        accelerator = Accelerator(log_with=experiment.trackers or None, project_dir=str(folder))
    except ValueError as error:
        raise ConfigError(f"the experiment: trackers: {error}") from None
    with _folder(folder, resume) if accelerator.is_main_process else contextlib.nullcontext():
        run, method = prepare(experiment, folder, accelerator)
        if experiment.trackers:
            accelerator.init_trackers("genpolicy", config=dataclasses.asdict(experiment))
        method.train(run)
        return run.finish(time.perf_counter() - started)


def rehearse(experiment: str | Path, overrides: Sequence[str] = ()) -> tuple[Experiment, Rehearsal]:
    """One real iteration of an experiment, its costs, and what its budget will cost; nothing is written."""
    asked = config.load(experiment, overrides)
    run, method = prepare(asked, Path(asked.output), Accelerator())
    run.rehearsal = Rehearsal()
    method.train(run)
    run.rehearsal.project(asked)
    return asked, run.rehearsal


@contextlib.contextmanager
def _folder(folder: Path, resume: bool) -> Iterator[None]:
    """Hold the run's folder. A new run that fails on bad input in its first iteration, or before, leaves nothing behind."""
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


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")
    return {"genpolicy": genpolicy.__version__, **{name: importlib.metadata.version(name) for name in packages}}


def evaluation_prompts(experiment: Experiment, task: Task) -> tuple[str, ...]:
    """The prompts of the evaluation set: its own file's, or the task's first ones, each once."""
    if experiment.eval.prompts is not None:
        return prompt_lines(experiment.eval.prompts)
    return tuple(dict.fromkeys(task.reset(range(experiment.eval.samples)).prompts))


def prepare(experiment: Experiment, folder: Path, accelerator: Accelerator) -> tuple[Run, Method]:
    """Build everything an experiment names; what does not fit raises before any work starts."""
    torch.manual_seed(experiment.seed)
    method = make("methods", experiment.method)
    task = make("tasks", experiment.task)
    reward = make_rewards(experiment.reward)
    prompts = evaluation_prompts(experiment, task)
    measured = [*(f"reward/{name}" for name in reward.rewards), "reward/total", "diversity"]
    choice("eval: select", experiment.eval.select or "reward/total", measured)
    load_rewards(reward)
    policy = make_policy(make("models", experiment.policy), experiment.chain)
    return Run(experiment, policy, task, reward, prompts, folder, accelerator), method
