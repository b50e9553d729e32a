"""The time that robot learning takes, and that of an update beside the published arithmetic.

    python -m benchmarks.robots            # two minutes on two cores

Part 1: DPPO on MetaWorld, peg-insert-side, with a fresh network: environment steps, decisions and
updates a second, and the shares of simulating, sampling and updating, with the simulations in this
process and in two workers. Part 2: one update on 5000 (decision, step) pairs with DPPO's hopper
network (11 observations, chunks of 4 x 3 actions, 20 steps, three layers of 512): ours, through
Run.update and the value's; the arithmetic that irom-princeton/dppo does for it, re-enacted from its
formulas (network, value and log-probability of every pair, the discounts listed in Python, two Adam
steps); and the floor, forward and backward of the same network with nothing around it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from genpolicy.config import parse, schema
from genpolicy.learning.critic import StateValue
from genpolicy.rollout.minibatch import Batch
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import start_processes
from genpolicy.training.run import Run

PAIRS, REPEATS, EPISODES = 5000, 7, 40


@dataclass
class Blank:
    """A data set without episodes: shapes, and statistics that leave numbers as they are."""

    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    stats: dict[str, dict[str, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = {name: (size,) for name, size in self.sizes.items()}
        unit = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
        self.stats = {
            n: {k: torch.full((s,), v) for k, v in unit.items()} for n, s in self.sizes.items()
        }

    def __len__(self) -> int:
        return 0


def prepared(
    task: dict[str, Any], sizes: dict[str, int], policy: dict[str, Any], steps: int
) -> tuple[Run, Any]:
    floor = {"name": "floorstd", "floor": 0.1, "kernel": {"name": "ddim", "eta": 1.0}}
    raw = {
        "policy": {"name": "mlp", **policy},
        "task": task,
        "data": {"name": "benchmarks.robots:Blank", "sizes": sizes},
        "method": {"name": "dppo", "episodes": EPISODES},
        "chain": {"steps": steps, "kernel": floor, "window": [0, steps]},
        "optimizer": {"lr": 1e-4},
        "threads": 1,
    }
    experiment = parse.parse(raw)
    run, method = prepare(experiment, Path("unused"), start_processes(experiment, None))
    run.spent.iteration = 1
    return run, method


def where_time_goes(workers: int) -> None:
    task = {"name": "metaworld", "env": "peg-insert-side-v3", "workers": workers}
    sizes = {"observation.state": 4, "observation.environment_state": 35, "action": 4}
    run, method = prepared(task, sizes, {}, 10)
    with run:
        environments = run.collector.environments
        simulate, own = 0.0, environments.step

        def timed(*args: Any) -> Any:
            nonlocal simulate
            began = time.perf_counter()
            try:
                return own(*args)
            finally:
                simulate += time.perf_counter() - began

        environments.step = timed  # type: ignore[method-assign]
        began = time.perf_counter()
        rollout = run.collect(EPISODES, 1)
        collect = time.perf_counter() - began
        advantage = torch.randn(len(rollout.trajectory))
        began, updates = time.perf_counter(), 0
        for batch in run.pairs(rollout, len(advantage) * 10 // 1024, 0):
            run.update(rollout, batch, advantage, method.loss)
            updates += 1
        update = time.perf_counter() - began
        steps, decisions = run.metrics.env_steps, len(rollout.trajectory)
        print(
            f"  workers {workers}: {steps / collect:6.0f} env steps/s,"
            f" {decisions / collect:5.0f} decisions/s with the policy;"
            f" simulating {simulate / collect:.0%}, sampling {1 - simulate / collect:.0%} of it; "
            f"{updates / update:4.0f} updates/s of 1024 pairs\n"
            f"             an iteration of {steps:.0f} steps and 5 epochs: collect {collect:.2f} s,"
            f" update {5 * update:.2f} s"
        )


def hopper() -> tuple[Run, Any, Rollout]:
    sizes = {"observation.state": 11, "action": 3}
    run, method = prepared(
        {"name": "gymnasium", "env": "Hopper-v5"}, sizes, {"hidden": 512, "blocks": 1}, 20
    )
    return run, method, run.collect(EPISODES, 1)


def milliseconds(work: Callable[[], object]) -> float:
    """The fastest of `REPEATS`, after one to warm up: other processes only ever add time."""
    work()
    spent: list[float] = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        spent.append(1000 * (time.perf_counter() - began))
    return min(spent)


def updates() -> None:
    run, method, rollout = hopper()
    rows = torch.randint(len(rollout.trajectory), (PAIRS,))
    k = torch.randint(20, (PAIRS,))
    advantage, returns = torch.randn(len(rollout.trajectory)), torch.randn(PAIRS)
    model, chains = run.policy.model, rollout.trajectory
    value = StateValue(11)
    critic = run.new_optimizer(value.parameters(), schema.OptimizerConfig(lr=1e-3))
    seen = chains.condition[rows]
    network = list(model.trainable().values())

    def ours() -> None:
        run.update(rollout, Batch(rows, k), advantage, method.loss)
        run.descend(lambda part: (value(seen[part]) - returns[part]) ** 2, PAIRS, "critic", critic)

    x, after = chains.before(0)[rows], chains.after(0)[rows]
    t = run.policy.chain.grid[k]
    alpha, sigma = (
        f(t).float()[:, None, None] for f in (model.schedule.alpha, model.schedule.sigma)
    )
    adam = torch.optim.AdamW(network, lr=1e-4)
    value_adam = torch.optim.AdamW(value.parameters(), lr=1e-3)
    old = torch.zeros(PAIRS)

    def published() -> None:
        x0 = ((x - sigma * model.denoise(x, t, seen).eps) / alpha).clamp(-1, 1)
        eps = (x - alpha * x0) / sigma
        mean, std = x0 * 0.9 + eps * 0.1, torch.full_like(x, 0.1)
        log_prob = torch.distributions.Normal(mean, std).log_prob(after).clamp(-5, 2).mean((1, 2))
        discount = torch.tensor([0.99 ** (20 - int(i) - 1) for i in k])
        weighed, ratio = advantage[rows] * discount, (log_prob - old).exp()
        bound = 0.01 * torch.expm1(3 * k / 19) / torch.expm1(torch.tensor(3.0))
        policy_loss = torch.maximum(
            -weighed * ratio, -weighed * ratio.clamp(1 - bound, 1 + bound)
        ).mean()
        loss = policy_loss + 0.5 * 0.5 * ((value(seen) - returns) ** 2).mean()
        adam.zero_grad()
        value_adam.zero_grad()
        loss.backward()
        adam.step()
        value_adam.step()

    def floor() -> None:
        loss = model.denoise(x, t, seen).eps.square().mean()
        torch.autograd.grad(loss, network)

    weights = sum(p.numel() for p in network)
    found = {
        name: milliseconds(work)
        for name, work in (("ours", ours), ("published", published), ("floor", floor))
    }
    run.__exit__()
    print(f"  {weights / 1e3:.0f} thousand weights, one thread, fastest of {REPEATS}:")
    for name, spent in found.items():
        print(
            f"  {name:<10} {spent:7.1f} ms   {spent / found['published']:5.2f} x the published"
            " arithmetic"
        )


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("1. DPPO on MetaWorld, 20 environments side by side, chunks of 4, 10 denoising steps")
    for workers in (0, 2):
        where_time_goes(workers)
    print("2. an update on 5000 pairs, DPPO's hopper network")
    updates()


if __name__ == "__main__":
    main()
