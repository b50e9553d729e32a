"""Speed beside others that do the same work, in CPU time of one thread on one machine.

    python -m benchmarks.speed                                # a, b and c: two minutes
    python -m benchmarks.speed --only a c --repeats 200
    python -m benchmarks.speed --only d --against CHECKOUT    # another checkout of this repository

a: one decision of 40 environments by a small network, beside DPPO's arithmetic
   (`benchmarks.two_network_sampler`).
b: one decision of LeRobot's DiffusionPolicy, beside LeRobot (needs lerobot).
c: one update of implicit Q-learning, beside plain torch (needs metaworld).
d: one iteration of the quickstart's pictures, beside another checkout.

Both sides of a row run in turn, first one, then the other, then in the opposite order. In a, b
and c they must agree in what they compute before they are timed; d says what both did. A ratio
below 1 means that genpolicy, or this checkout, is the faster one. The interval is that of the
median at 95 %, by order statistics.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

import genpolicy
from benchmarks.two_network_sampler import Actor, Tables, TwoNetworkSampler
from genpolicy.chain import DDIM, Chain, FloorStd, Noise
from genpolicy.config.parse import load
from genpolicy.contracts.task import Context
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.models.lerobot_diffusion import LeRobotDiffusion
from genpolicy.models.mlp import MLP
from genpolicy.policy.parts.base import Base
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.replay import Replay
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.run import Run

STATE, WORLD = "observation.state", "observation.environment_state"
WARM_UP = 3
"""Untimed calls of both sides before the first timed one."""
COLUMNS = ("work", "ours, min", "other, min", "ratio of minima", "median ratio [95 %]", "n")


@dataclass(frozen=True)
class Comparison:
    """Seconds of the same work, ours [n] and the other's [n], call by call in turn."""

    work: str
    ours: list[float]
    other: list[float]

    def row(self) -> str:
        """One row of the table; times in milliseconds."""
        ratios = sorted(a / b for a, b in zip(self.ours, self.other, strict=True))
        n = len(ratios)
        reach = 0.98 * math.sqrt(n)
        low = ratios[max(math.floor(n / 2 - reach), 0)]
        high = ratios[min(math.ceil(n / 2 + reach), n) - 1]
        ours, other = min(self.ours), min(self.other)
        cells = [
            self.work,
            f"{1000 * ours:.2f} ms",
            f"{1000 * other:.2f} ms",
            f"{ours / other:.3f}",
            f"{median(ratios):.3f} [{low:.3f}, {high:.3f}]",
            str(n),
        ]
        return f"| {' | '.join(cells)} |"


def compare(
    work: str, ours: Callable[[], object], other: Callable[[], object], repeats: int, parts: int = 1
) -> Comparison:
    """``repeats`` timed calls of each, in turn; a call does the work ``parts`` times."""
    for _ in range(WARM_UP):
        ours()
        other()
    mine: list[float] = []
    theirs: list[float] = []
    for repeat in range(repeats):
        pair = [(ours, mine), (other, theirs)]
        for call, seconds in pair if repeat % 2 == 0 else reversed(pair):
            began = time.process_time()
            call()
            seconds.append((time.process_time() - began) / parts)
    return Comparison(work, mine, theirs)


def require_close(what: str, ours: Tensor, other: Tensor, tolerance: float) -> None:
    """Both sides compute the same, or their times may not be compared."""
    apart = float((ours - other).abs().max())
    if not apart <= tolerance:
        raise SystemExit(f"{what}: the two sides are {apart:.1e} apart, more than {tolerance:.0e}")


def weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Statistics:
    """The part of a data set that a fresh model asks for: shapes, and values of unit spread."""

    shapes: dict[str, tuple[int, ...]]

    @property
    def stats(self) -> dict[str, dict[str, Tensor]]:
        values = {"min": -1.0, "q01": -1.0, "mean": 0.0, "std": 1.0, "q99": 1.0, "max": 1.0}
        return {
            name: {statistic: torch.full(shape, value) for statistic, value in values.items()}
            for name, shape in self.shapes.items()
        }


# -- a: sampling a small network

ENVIRONMENTS, SEEN, CHUNK, ACTION = 40, 39, 4, 4
STEPS, TRAINED = 20, 10
FLOOR = 0.1


def small_policy(hidden: int, blocks: int) -> ChainPolicy:
    """A fresh MLP whose last steps are trained and whose first ones belong to a frozen base."""
    model = MLP(hidden=hidden, blocks=blocks, chunk=CHUNK)
    model.initialise(Statistics({STATE: (SEEN,), "action": (ACTION,)}))
    grid = model.grid(STEPS)
    base = {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in model.trainable().items()}
    kernel, window = FloorStd(DDIM(1.0), FLOOR), (STEPS - TRAINED, STEPS)
    chain = Chain(model.schedule, grid, kernel, window)
    return ChainPolicy(model, chain).attach("base", Base(base, float(grid[window[0]])))


def dppo(policy: ChainPolicy, hidden: int, blocks: int) -> TwoNetworkSampler:
    """DPPO's sampler on the same two networks and the same noise levels."""
    size = CHUNK * ACTION, SEEN, hidden, blocks
    frozen, tuned = Actor(*size), Actor(*size)
    base = policy.parts["base"]
    assert isinstance(base, Base)
    for actor, values in (
        (frozen, list(base.weights.values())),
        (tuned, list(policy.model.trainable().values())),
    ):
        for parameter, value in zip(actor.parameters(), values, strict=True):
            parameter.data.copy_(value)
    times = policy.chain.grid.flip(0)
    position = (100 * times[1:]).round() - 1  # of the hundred levels that the model knows
    tables = Tables.of(policy.model.schedule.alpha(times) ** 2, position)
    return TwoNetworkSampler(frozen, tuned, tables, TRAINED, FLOOR)


@torch.no_grad()
def require_same_steps(
    policy: ChainPolicy, sampler: TwoNetworkSampler, condition: Tensor, noise: Noise
) -> None:
    """The published form of the floor, step by step: the same mean and std from the same state."""
    kernel = FloorStd(DDIM(1.0), FLOOR, consistent=False)
    published = replace(policy, chain=replace(policy.chain, kernel=kernel))
    chains = published.sample(condition, noise)
    for k in chains.steps:
        level = torch.full((len(condition),), STEPS - 1 - k)
        mean, std = sampler.transition(chains.before(k), level, condition)
        acted = chains.acted(k)
        require_close(f"a, mean of step {k}", acted.mean, mean, 1e-4)
        require_close(f"a, std of step {k}", acted.std, std, 1e-6)


def sampling(repeats: int) -> Iterator[Comparison]:
    """Times the way from the normalised observation to the chunk and the kept steps. Both sides
    draw their noise: ours row by row from a counter, DPPO's from torch's stream.
    """
    for hidden, blocks in ((512, 1), (256, 2)):
        policy = small_policy(hidden, blocks)
        sampler = dppo(policy, hidden, blocks)
        condition = torch.randn(ENVIRONMENTS, SEEN)
        noise = Noise.rows(0, 0, torch.arange(ENVIRONMENTS), 1)
        require_same_steps(policy, sampler, condition, noise)
        counted = [0, 0]
        before = policy.model.evaluations
        policy.sample(condition, noise)
        counted[0] = round((policy.model.evaluations - before) / ENVIRONMENTS)
        handles = [
            actor.register_forward_hook(lambda *_, c=counted: c.__setitem__(1, c[1] + 1))
            for actor in (sampler.frozen, sampler.tuned)
        ]
        sampler.sample(condition, policy.model.event_shape)
        for handle in handles:
            handle.remove()
        size = f"K {STEPS}, K' {TRAINED}, {weights(sampler.tuned) / 1e6:.2f} M weights"
        evaluations = f"evaluations {counted[0]} against {counted[1]}"
        yield compare(
            f"a: sampling, {ENVIRONMENTS} environments, {size}; {evaluations}",
            lambda p=policy, c=condition, n=noise: p.sample(c, n),
            lambda p=policy, c=condition, s=sampler: s.sample(c, p.model.event_shape),
            repeats,
        )


# -- b: LeRobot's DiffusionPolicy

SOLVER_STEPS = 10
UNET = {
    "n_obs_steps": 2,
    "horizon": 16,
    "n_action_steps": 8,
    "down_dims": [64, 128, 256],
    "diffusion_step_embed_dim": 64,
    "noise_scheduler_type": "DDIM",
    "num_inference_steps": SOLVER_STEPS,
    "pretrained_backbone_weights": None,
}
"""Keys of LeRobot's DiffusionConfig."""


def lerobot(repeats: int) -> Iterator[Comparison]:
    """Two rows. The chain: `policy.sample` from the encoded observation, beside LeRobot's
    `diffusion.generate_actions`, which also joins the normalised vectors (no network). The whole
    decision: from the raw observation to a chunk in the environment's units, beside LeRobot's
    preprocessor, `predict_action_chunk` (what `select_action` calls when its queue is empty) and
    postprocessor. Each side draws its own initial noise.
    """
    model = LeRobotDiffusion(config=UNET, train="denoiser", spacing="lerobot", device="cpu")
    model.initialise(Statistics({STATE: (4,), WORLD: (35,), "action": (ACTION,)}))
    theirs = model.policy
    theirs.reset()
    chain = Chain(model.schedule, model.grid(SOLVER_STEPS), DDIM(0.0))
    policy = ChainPolicy(model, chain)
    observation = {
        name: torch.rand(1, model.history, *shape) for name, shape in model.shapes.items()
    }
    context, noise = Context(["reach"], observation), Noise.rows(0, 0, torch.arange(1), 1)
    condition = model.encode(context)
    batch = model.processors.pre(dict(observation))

    start = torch.randn(1, *model.event_shape)
    ours = model.decode(policy.sample(condition, noise, start=(0, start)).x0)
    other = model.processors.post(theirs.predict_action_chunk(batch, noise=start.clone()))
    require_close("b, actions", ours, other, 1e-5)

    size = f"{weights(theirs.diffusion.unet) / 1e6:.1f} M U-Net, {SOLVER_STEPS} DDIM steps, 1 row"

    @torch.no_grad()
    def generate() -> Tensor:
        return theirs.diffusion.generate_actions(batch)

    yield compare(
        f"b: chain of a {size}", lambda: policy.sample(condition, noise), generate, repeats
    )

    @torch.no_grad()
    def decide() -> Tensor:
        return model.decode(policy.sample(model.encode(context), noise).x0)

    def decide_in_lerobot() -> Tensor:
        seen = model.processors.pre(dict(observation))
        return model.processors.post(theirs.predict_action_chunk(seen))

    yield compare(f"b: decision of a {size}", decide, decide_in_lerobot, repeats)


# -- c: the update of a critic

DECISIONS, UPDATES = 512, 25
GAMMA = 0.99


def replay() -> Replay:
    """Decisions of 16 episodes with random content."""
    row = torch.arange(DECISIONS)
    length = DECISIONS // 16
    last = row % length == length - 1
    return Replay(
        views=Context([""] * (DECISIONS + 1)),
        now=row,
        after=row + 1,
        event=torch.rand(DECISIONS, CHUNK, ACTION) * 2 - 1,
        rewards=torch.rand(DECISIONS, CHUNK).double(),
        executed=torch.full((DECISIONS,), CHUNK),
        terminated=last,
        success=last,
        episode=row // length,
        first=row % length == 0,
    )


class PlainCritic:
    """The same update by hand: the same networks, losses, rows, clipping and AdamW."""

    def __init__(self, run: Run, value: ActionValue) -> None:
        self.run, self.expectile = run, value.expectile
        self.pessimism, self.polyak, self.batch = value.pessimism, value.polyak, value.batch
        self.q, self.v = copy.deepcopy(value.q), copy.deepcopy(value.v)
        self.target = copy.deepcopy(value.target)
        self.parameters = [*self.q.parameters(), *self.v.parameters()]
        settings = value.optimizer.settings
        self.bound = settings.max_grad_norm
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=True,
        )

    def learn(self, data: Replay, features: Tensor, updates: int) -> None:
        for critic in (self.q, self.target, self.v):
            critic.scale.fit(features)
        steps = torch.arange(data.rewards.shape[1])
        for rows in self.run.rows(len(data), (updates, self.batch), "critic"):
            now, after = features[data.now[rows]], features[data.after[rows]]
            event, executed = data.event[rows], data.executed[rows]
            with torch.no_grad():
                values = self.target(now, event)
                lower = values.mean(0) - self.pessimism * values.std(0, correction=0)
                counts = steps < executed[:, None]
                rewards = (data.rewards[rows].float() * counts * GAMMA**steps).sum(1)
                rest = GAMMA**executed * self.v(after) * ~data.terminated[rows]
                y = rewards + rest
            error = lower - self.v(now)
            asymmetry = (self.expectile - (error < 0).float()).abs()
            loss = (asymmetry * error**2).mean()
            loss = loss + ((self.q(now, event) - y) ** 2).sum(0).mean()
            self.adamw.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.bound)
            self.adamw.step()
            with torch.no_grad():
                for slow, fast in zip(self.target.parameters(), self.q.parameters(), strict=True):
                    slow.lerp_(fast, self.polyak)


def critic(repeats: int) -> Iterator[Comparison]:
    """`ActionValue.learn` of UPDATES updates, through `Run.descend`, per update; its preparation
    (standardising, the returns of 512 decisions) is in it. Weights of both sides are compared after
    the first call.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"--output={folder}/run", "--environments=1"]
        run, _ = prepare(
            load("quickstart_robot", settings),
            Path(folder) / "run",
            Processes(Accelerator(cpu=True)),
        )
        with run:
            value = ActionValue(run, GAMMA)
            plain = PlainCritic(run, value)
            data, features = replay(), torch.randn(DECISIONS + 1, run.features)
            value.learn(data, features, UPDATES)
            plain.learn(data, features, UPDATES)
            pairs = zip(value.q.parameters(), plain.q.parameters(), strict=True)
            for number, (ours, other) in enumerate(pairs):
                require_close(f"c, weight {number} of Q", ours.detach(), other.detach(), 1e-4)
            size = f"{value.batch} rows, {weights(plain.q) + weights(plain.v):,} weights"
            yield compare(
                f"c: update of Q and V, {size}",
                lambda: value.learn(data, features, UPDATES),
                lambda: plain.learn(data, features, UPDATES),
                repeats,
                UPDATES,
            )


# -- d: the quickstart's pictures in another checkout

POLL = 0.005
"""Seconds between two looks at a process's metrics."""


@dataclass(frozen=True)
class Child:
    """The quickstart's training in a process of its own, one iteration at a time."""

    checkout: Path
    folder: Path
    process: psutil.Popen

    @classmethod
    @contextlib.contextmanager
    def started(cls, checkout: Path, folder: Path, iterations: int) -> Iterator["Child"]:
        """A process that is ended with the block."""
        command = [sys.executable, "-m", "genpolicy", "train", "quickstart"]
        command += [f"--budget.iterations={iterations}", "--eval.every=0", "--eval.samples=44"]
        command += ["--threads=1", f"--output={folder}"]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        with open(folder.with_suffix(".log"), "w") as log:
            process = psutil.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log)
        process.suspend()
        try:
            yield cls(checkout, folder, process)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def reach(self, iteration: int) -> float:
        """Runs it until it has written the metrics of ``iteration``, and suspends it; returns its
        CPU seconds so far.
        """
        self.process.resume()
        while len(self.metrics()) < iteration:
            if self.process.poll() is not None:
                log = self.folder.with_suffix(".log").read_text()
                raise SystemExit(f"training in {self.checkout} ended early:\n{log[-2000:]}")
            time.sleep(POLL)
        self.process.suspend()
        spent = self.process.cpu_times()
        return spent.user + spent.system

    def metrics(self) -> list[dict[str, float]]:
        """The whole lines of metrics.jsonl that belong to iterations, not to evaluations."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if "nfe_per_sample" in row]


def against(checkout: Path, iterations: int) -> Iterator[Comparison]:
    """``iterations`` of each checkout after the first, which warms up: A B B A ..., the one that
    does not run is suspended. Start-up and evaluations are not in them. The row names what both did
    in their first iteration.
    """
    here = Path(genpolicy.__file__).resolve().parents[1]
    seconds: tuple[list[float], list[float]] = ([], [])
    with (
        tempfile.TemporaryDirectory() as folder,
        Child.started(here, Path(folder) / "ours", iterations + 2) as ours,
        Child.started(checkout, Path(folder) / "other", iterations + 2) as other,
    ):
        spent = [ours.reach(1), other.reach(1)]
        for iteration in range(iterations):
            order = (0, 1) if iteration % 2 == 0 else (1, 0)
            for side in order:
                now = (ours, other)[side].reach(iteration + 2)
                seconds[side].append(now - spent[side])
                spent[side] = now
        first = ours.metrics()[0], other.metrics()[0]
    done = ", ".join(
        f"{what} {first[0][key]:.4g} against {first[1][key]:.4g}"
        for what, key in (("evaluations per sample", "nfe_per_sample"), ("reward", "reward/total"))
    )
    yield Comparison(f"d: iteration of the quickstart's pictures; {done}", *seconds)


PARTS: dict[str, Callable[[int], Iterator[Comparison]]] = {
    "a": sampling,
    "b": lerobot,
    "c": critic,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "d"], help="default: all")
    parser.add_argument(
        "--repeats", type=int, default=60, help="timed calls of each side (default: %(default)s)"
    )
    parser.add_argument("--against", type=Path, help="another checkout of this repository, for d")
    parser.add_argument(
        "--iterations", type=int, default=24, help="of each checkout in d (default: %(default)s)"
    )
    args = parser.parse_args()
    chosen = args.only or [*PARTS, *(["d"] if args.against else [])]
    if "d" in chosen and args.against is None:
        parser.error("d needs --against, another checkout of this repository")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, 1 thread, CPU time\n\n| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for part in chosen:
        if part == "d":
            found = against(args.against.resolve(), args.iterations)
        else:
            found = PARTS[part](args.repeats)
        for comparison in found:
            print(comparison.row(), flush=True)


if __name__ == "__main__":
    main()
