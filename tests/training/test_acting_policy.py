"""Another policy collects: its rollout is scored along the chain that drew it, and it counts."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator

from genpolicy.chain import CPS, Chain
from genpolicy.config import parse
from genpolicy.evaluation import metrics_file
from genpolicy.learning.objective import log_ratio
from genpolicy.models.toy import Toy
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rollout.minibatch import Batch
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run
from tests import toy, toy_control

WORLDS = {"prompts": toy.experiment, "robots": toy_control.experiment}
GRPO = {"name": "flow_grpo", "groups": 4, "group": 2, "clip": 0.2, "advantage": "group"}
CHAIN = {"steps": 4, "kernel": {"name": "ddim", "eta": 1.0}}


def prepared(folder, world: str) -> Run:
    """A run at iteration 1, without a loop around it."""
    raw = WORLDS[world](folder, method=GRPO, chain=CHAIN)
    run, _ = prepare(parse.parse(raw), folder / "run", Processes(Accelerator(cpu=True)))
    run.begin(1)
    return run


def others(policy: ChainPolicy) -> dict[str, ChainPolicy]:
    """The same network on other chains."""
    chain, grid = policy.chain, policy.model.grid
    return {
        "grid": replace(policy, chain=replace(chain, grid=grid(4, 0.7))),
        "more steps": replace(policy, chain=replace(chain, grid=grid(8))),
        "kernel": replace(policy, chain=replace(chain, kernel=CPS(0.5))),
    }


def away(step):
    """The log-ratio as a loss, and how far from 0 it is."""
    found = log_ratio(step.new, step.old, step.x, reduce="sum")
    return 0.0 * found, {"away": found.detach().abs()}


def replayed(run: Run, rollout) -> float:
    """How far from 0 the log-ratio of unchanged weights is, by `Run.update`."""
    rows = len(rollout.trajectory)
    return run.update(rollout, Batch(slice(0, rows)), torch.zeros(rows), away)["away"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["grid", "more steps", "kernel"])
def test_a_rollout_is_scored_along_the_chain_that_drew_it(tmp_path, world, name):
    run = prepared(tmp_path, world)
    rollout = run.collect(4, 2, policy=others(run.policy)[name])

    def ratio(new, old, x):
        return log_ratio(new, old, x, reduce="sum")

    assert run.verified(rollout, ratio, 1e-3) is rollout
    assert replayed(run, rollout) < 1e-4
    unsaid = replace(rollout, trajectory=replace(rollout.trajectory, chain=None))
    # control: along the chain of the policy that learns
    with pytest.raises(ValueError, match="the std has not changed"):
        replayed(run, unsaid)
    run.evaluator.close()


@pytest.mark.parametrize("k", [1, torch.arange(8) % 3])
def test_the_numbers_of_a_scored_step_are_those_of_the_chain_that_drew_it(tmp_path, k):
    run = prepared(tmp_path, "prompts")
    other = others(run.policy)["grid"]
    trajectory = run.collect(4, 2, policy=other).trajectory
    step, own = (p.score(trajectory, k, torch.zeros(8)) for p in (run.policy, other))
    for name in ("std", "dt", "gain"):
        assert torch.equal(getattr(step, name), getattr(own, name))
    assert torch.equal(step.new.mean, own.new.mean)
    grid = other.chain.grid
    dt = torch.as_tensor(step.dt)
    assert torch.equal(dt, (grid[k] - grid[k + 1]).float())
    assert not torch.allclose(dt, run.policy.chain.grid.diff()[k].float().neg()), "control"


def test_a_rollout_of_the_runs_own_policy_is_scored_by_that_policy(tmp_path):
    """...also where a copy of it collected, and where the window is drawn anew."""
    run = prepared(tmp_path, "prompts")
    for policy, window in ((None, None), (replace(run.policy), (1, 3))):
        rollout = run.collect(4, 2, policy=policy, window=window)
        acting = run.policy.with_window(window or (0, 3))
        assert acting.along(rollout.trajectory) is acting
        assert replayed(run, rollout) < 1e-4
    assert run.policy.along(replace(rollout.trajectory, chain=None)) is run.policy
    other = others(run.policy)["kernel"]
    assert run.policy.along(run.collect(4, 2, policy=other).trajectory) is not run.policy


def test_a_rollout_on_another_noise_schedule_is_not_scored(tmp_path):
    run = prepared(tmp_path, "prompts")
    model: Any = Toy(family="vp")
    chain = Chain(model.schedule, model.grid(4), run.policy.chain.kernel)
    rollout = run.collect(4, 2, policy=ChainPolicy(model, chain))
    with pytest.raises(ValueError, match="drawn on another noise schedule"):
        replayed(run, rollout)
    other = replace(run.policy, model=Toy(seed=5))  # control: another object of the same schedule
    replayed(run, run.collect(4, 2, policy=replace(other, chain=others(other)["grid"].chain)))


@dataclass
class Teaching:
    """``method: {name: "tests.training.test_acting_policy:Teaching"}``: another network acts.

    teacher: another model acts beside the one that learns, in the same rollouts otherwise.
    """

    teacher: bool = True

    needs: ClassVar[Needs] = Needs()

    def train(self, run: Run) -> None:
        model: Any = toy.ToyModel(seed=5)
        policy = replace(run.policy, model=model) if self.teacher else None
        for _ in run.iterations():
            run.collect(4, 2, policy=policy)
            run.collect(4, 2)


@pytest.mark.parametrize("teacher", [True, False])
def test_the_evaluations_of_another_model_count(tmp_path, teacher):
    name = "tests.training.test_acting_policy:Teaching"
    raw = toy.experiment(
        tmp_path,
        method={"name": name, "teacher": teacher},
        chain=CHAIN,
        budget={"nfe": 100},
        eval={"every": 0, "samples": 4},
    )
    result = train(parse.parse(raw))
    assert result.summary["evaluations"] == 2 * 2 * 8 * 4, "two iterations of two rollouts"
    found = [row for row in metrics_file.read(result.folder) if "nfe_per_sample" in row]
    assert [row["nfe_per_sample"] for row in found] == [4, 4]


def test_a_window_beyond_the_steps_of_the_run_is_scored_too(tmp_path):
    """Eight steps, of which the run's own four have no sixth."""
    run = prepared(tmp_path, "prompts")
    rollout = run.collect(4, 2, policy=others(run.policy)["more steps"], window=(5, 7))
    assert rollout.trajectory.steps == range(5, 7)
    assert replayed(run, rollout) < 1e-4
