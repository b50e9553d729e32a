"""Laws of every method, parametrised over the files in methods/: its ``needs`` say which of them
apply, and in which world.
"""

from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from genpolicy.cli.law_toys import taught
from genpolicy.config import errors, leaves, parse
from genpolicy.config.leaves import names
from genpolicy.config.origin import PERSON
from genpolicy.contracts.task import Context
from genpolicy.rollout.minibatch import Batch
from genpolicy.tasks._environments import Environments
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare, required
from genpolicy.training.processes import Processes
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run
from tests import toy, toy_control

torch.set_num_threads(1)
KERNELS = {
    "sde": {"name": "sde", "a": 0.7},
    "ddim": {"name": "ddim", "eta": 1.0},
    "cps": {"name": "cps", "a": 0.8},
}
ODE = {"name": "ddim", "eta": 0.0}
CLIP = {"reduce": "sum", "clip": 0.2}
WORLDS = {"prompts": toy.experiment, "robots": toy_control.experiment}
SHARED = ("flow_grpo", "grpo_guard")
"""The methods whose groups share a prefix and that keep near a reference: no need tells that."""


@dataclass
class Descends:
    """A method without likelihoods: it imitates the better ones of its own samples. A field called
    ``group`` promises nothing.
    """

    group: int = 4

    needs: ClassVar[Needs] = Needs()

    def train(self, run: Run) -> None:
        for _ in run.iterations():
            rollout = run.collect(4, self.group)
            chains = rollout.trajectory
            better = rollout.rows((rollout.rewards > rollout.rewards.mean()).float())
            t = torch.full((len(chains),), 0.5, dtype=torch.float64)
            noise = run.noise("descends", torch.arange(len(chains)))

            def losses(part, chains=chains, better=better, t=t, noise=noise):
                x0 = chains.x0[part]
                drawn = noise(0, run.policy.model.event_shape)[part]
                condition = chains.condition[part]
                squares = run.policy.supervised_loss(condition, x0, t[part], drawn, None)
                return better[part] * squares

            run.descend(losses, len(chains), "descends")


class Faint(Descends):
    """The negative control of `Descends`: its samples teach it nothing."""

    def train(self, run: Run) -> None:
        for _ in run.iterations():
            run.collect(4, self.group)


@dataclass
class Shown:
    """Captioned pictures in memory: white where it is bright, else black."""

    def __len__(self) -> int:
        return len(toy.PROMPTS)

    def pictures(self, index: Tensor) -> tuple[Context, Tensor]:
        captions = [toy.PROMPTS[row] for row in index.tolist()]
        values = torch.tensor([float("bright" in caption) for caption in captions])
        return Context(captions), values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


class TurnedWalk(toy_control.Walk):
    """The walk with its rewards' sign turned."""

    def step(self, action):
        frame, reward, *rest = super().step(action)
        return frame, -reward, *rest


@dataclass
class Turned(toy_control.Point):
    """The toy of control with its rewards' sign turned."""

    def environments(self, count: int, history: int) -> Environments:
        return Environments(
            lambda: TurnedWalk(self.ends), count, history, self.limit, self.instruction
        )


def needs_of(method):
    """The needs of a method with the settings that it has by default."""
    return required(leaves.make("methods", {"name": method}, PERSON))


def compares(needs):
    """True where the ratio laws apply: its noisy steps are trained from the first iteration. A
    method that also learns from data begins with those; it has tests of its own.
    """
    return (needs.likelihoods or needs.window) and not needs.data


def descends(needs):
    """True where the method only descends losses: it needs no noisy step."""
    return not (needs.likelihoods or needs.window)


def kernels(needs):
    """Names of kernels that give the method what it needs: without likelihoods the ODE does."""
    return list(KERNELS) if needs.likelihoods else ["ode"]


NEEDS = {name: needs_of(name) for name in names("methods")}
METHODS = [name for name, needs in NEEDS.items() if compares(needs)]
DESCENDING = [name for name, needs in NEEDS.items() if descends(needs)]
PLACES = [(m, world) for m in METHODS for world in NEEDS[m].worlds]
KERNELLED = [(m, kernel) for m in METHODS for kernel in kernels(NEEDS[m])]


def section(method, **sizes):
    """A method's section with those of the sizes that it knows."""
    known = {f.name for f in fields(leaves.leaf("methods", method, PERSON))}
    given = {**CLIP, **sizes, **(OFF_POLICY if "practice" in known else {})}
    return {
        "name": method,
        **{name: value for name, value in given.items() if name in known},
    }


SMALL = {
    "groups": 4,
    "group": 4,
    "size": 1,
    "episodes": 16,
    "warm_up": 0,
    "entropy": 0.0,
    "epochs": 1,
    "updates": 1,
    "minibatch": 10**6,
    "judge": {"episodes": 16, "critic_updates": 5},
}


OFF_POLICY = {
    "practice": {"first": 4, "episodes": 4},
    "critic": {"first": 4, "updates": 4, "batch": 32, "members": 2},
    "samples": 3,
    "best": 2,
    "edited": 2,
    "every": 1,
    "states": 16,
}
"""The sizes of methods that learn from everything that was done; their data says what came of it.
"""


def prepared(tmp_path, method, world=None, **sections):
    """A run at iteration 1 in the method's first world, or in ``world``, and the method."""
    needs = needs_of(method)
    world = world or needs.worlds[0]
    raw = WORLDS[world](tmp_path, method=section(method, **SMALL), **sections)
    if "practice" in raw["method"] and world == "robots":
        raw["data"] = {"name": "tests.rl100_toy:Outcomes"}
    if world == "robots":
        raw["policy"]["family"] = "flow"
    elif needs.data:
        raw["data"] = {"name": f"{__name__}:Shown"}
    if needs.teacher:
        name = {"prompts": "toy", "robots": "mlp"}[world]
        own = {"family": "flow", **raw["policy"], "name": name}
        raw |= taught(own, tmp_path, toy_control.Recorded())
        raw["method"]["minibatch"] = 64
    run, built = prepare(parse.parse(raw), tmp_path / "run", Processes(Accelerator(cpu=True)))
    run.spent.iteration = 1
    return run, built


def once(run, method, advantage=lambda value: value):
    """One iteration of a method, without what a run does around it: the means of its updates of the
    policy. Its advantages are changed by ``advantage``; the gradients of the last update stay with
    the parameters.
    """
    found, honest = [], run.update

    def update(rollout, batch, values, *arguments, **options):
        found.append(honest(rollout, batch, advantage(values), *arguments, **options))
        return found[-1]

    run.update, run.iterations = update, lambda: iter([1])
    run.learner.optimizer.settings = replace(
        run.learner.optimizer.settings, lr=1e-12, weight_decay=0.0
    )
    method.train(run)
    assert found, "an iteration updates the policy"
    return found


def chain(method, kernel="ddim", **options):
    noisy = NEEDS[method].likelihoods
    return {
        "steps": 5,
        "kernel": KERNELS[kernel] if noisy else ODE,
        "window": [1, 3],
        **options,
    }


def largest(run):
    return max(float(p.grad.abs().max()) for p in run.trainable)


@pytest.mark.parametrize(
    ("method", "kernel", "world"),
    [(m, kernel, world) for m, kernel in KERNELLED for world in NEEDS[m].worlds],
)
def test_the_first_pass_has_ratio_one_and_no_clipping(tmp_path, method, kernel, world):
    run, built = prepared(tmp_path, method, world, chain=chain(method, kernel))
    (first,) = once(run, built)
    assert first["ratio_mean"] == pytest.approx(1.0, abs=1e-6 if world == "prompts" else 1e-4)
    assert first["clip_fraction"] == 0
    assert run.replay_check.gap < 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("method", SHARED)
def test_a_shared_prefix_has_ratio_one_too(tmp_path, method, kernel):
    run, built = prepared(tmp_path, method, chain=chain(method, kernel))
    rollout = run.collect(4, 4, shared_prefix=True)
    chains, policy = rollout.trajectory, run.policy.with_window((1, 3))
    for k in chains.steps:
        new = policy.transition(chains, k)
        assert built.log_ratio(new, chains.acted(k), chains.after(k)).abs().max() == 0
        scored = policy.score(chains, k, rollout.rows(torch.randn(4, 4)), None)
        _, metrics = built.loss(scored)
        assert metrics["clip_fraction"].sum() == 0
        assert (metrics["ratio_mean"] == 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_control_after_an_update_the_ratio_is_not_one(tmp_path, method):
    run, built = prepared(tmp_path, method, chain=chain(method))
    built.epochs = 2
    run.experiment.optimizer.lr = 0.05
    found, honest = [], run.update
    run.update = lambda *arguments, **options: (
        found.append(honest(*arguments, **options)) or found[-1]
    )
    run.iterations = lambda: iter([1])
    built.train(run)
    assert found[0]["log_ratio_square"] < 1e-8 < found[-1]["log_ratio_square"]
    assert found[-1]["clip_fraction"] > 0


@pytest.mark.parametrize(("method", "world"), PLACES)
def test_zero_advantage_gives_zero_gradient_and_a_real_one_does_not(tmp_path, method, world):
    for name, change in (("zero", torch.zeros_like), ("real", torch.randn_like)):
        folder = tmp_path / name
        folder.mkdir()
        run, built = prepared(folder, method, world, chain=chain(method))
        once(run, built, change)
        assert (largest(run) > 0) == (name == "real")


@pytest.mark.parametrize("method", SHARED)
def test_kl_to_the_start_is_zero_at_first_and_grows(tmp_path, method):
    run, built = prepared(tmp_path, method, chain={"steps": 5, "kernel": KERNELS["sde"]})
    built.beta = 0.1
    reference, rollout = run.weights(), run.collect(4, 4)
    advantage = torch.randn(4, 4)
    before = run.policy.score(rollout.trajectory, 1, rollout.rows(advantage), reference)
    assert built.loss(before)[1]["kl"].abs().max() == 0
    run.update(rollout, Batch(slice(0, 16)), advantage, built.loss, reference)
    after = run.policy.score(rollout.trajectory, 1, rollout.rows(advantage), reference)
    assert built.loss(after)[1]["kl"].min() > 0


LEARNING = {
    "groups": 8,
    "group": 16,
    "size": 3,
    "updates": 2,
    "advantage": "group",
    "episodes": 128,
    "warm_up": 1,
    "minibatch": 192,
    "epochs": 1,
    "critic_lr": 1e-2,
    "std_low": 0.2,
    "std_high": 0.5,
    "entropy": 0.0,
    "noise_lr": 1e-3,
}


PATIENCE = {"dppo": 25, "reinflow": 15}
"""Iterations until a toy is solved, where that is less than `LONG`."""
LONG = 60


def solved(tmp_path, method, kernel, right=True):
    """Trains on the toy of the method's first world: bright prompts want white and dark ones black;
    a slow point wants to reach its goal. Not ``right``: the reward's sign is turned.
    """
    noisy = NEEDS[method].likelihoods
    own_noise = {} if noisy else {"window": [0, 4]}
    common = {
        "chain": {"steps": 4, "kernel": KERNELS[kernel] if noisy else ODE, **own_noise},
        "method": section(method, **LEARNING),
        "budget": {"iterations": PATIENCE.get(method, LONG)},
    }
    if NEEDS[method].worlds[0] == "prompts":
        raw = toy.experiment(
            tmp_path,
            optimizer={"lr": 1e-2},
            eval={"every": 0, "samples": 64},
            reward={"tests.toy:brightness": 1.0 if right else -1.0},
            **common,
        )
        return train(parse.parse(raw)), "reward/brightness"
    raw = toy_control.experiment(
        tmp_path,
        policy={"name": "mlp", "pretrained": toy_control.cloned(tmp_path, family="flow")},
        task={"name": "tests.toy_control:Point" if right else f"{__name__}:Turned"},
        optimizer={"lr": 1e-3},
        eval={"every": 0, "episodes": 40},
        environments=40,
        **common,
    )
    return train(parse.parse(raw)), "success_rate"


@pytest.mark.parametrize(("method", "kernel"), KERNELLED)
def test_a_toy_with_one_right_answer_is_solved(tmp_path, method, kernel):
    """The mean reward must rise from 0 to at least a third of its maximum; success by a fifth."""
    result, metric = solved(tmp_path, method, kernel)
    if metric == "success_rate":
        assert result.after[metric] > result.before[metric] + 0.2
    else:
        assert abs(result.before[metric]) < 0.05
        assert result.after[metric] > 0.15


@pytest.mark.parametrize("method", METHODS)
def test_wrong_sign_fails_where_the_method_succeeds(tmp_path, method):
    """The negative control of the test above:
    with the reward's sign turned, the policy learns the opposite.
    """
    result, metric = solved(tmp_path, method, "ddim", right=False)
    if metric == "success_rate":
        assert result.after[metric] < result.before[metric] - 0.2
    else:
        assert result.after[metric] < -0.1


# -- methods that only descend --------------------------------------------------------------------


def moved(tmp_path, method, world):
    """True where an iteration of the method moves the weights, or a part that it attached, with the
    numbers that it logs; of methods whose first one criticises, the second.
    """
    run, built = prepared(tmp_path, method, world, chain={"steps": 5, "kernel": ODE})
    before, attach, attached = run.weights(), run.attach, {}

    def watched(**parts):
        attach(**parts)
        attached.update({name: deepcopy(part.state_dict()) for name, part in parts.items()})

    run.attach = watched
    count = 2 if hasattr(built, "practice") else 1

    def iterations():
        for iteration in range(1, count + 1):
            run.begin(iteration)
            yield iteration

    run.iterations = iterations
    built.train(run)
    changed = any(
        not torch.equal(old, new.detach())
        for old, new in zip(before.values, run.trainable, strict=True)
    )
    for name, state in attached.items():
        now = run.policy.parts[name].state_dict()
        changed = changed or any(not torch.equal(state[key], now[key]) for key in state)
    return changed, run.metrics.close()


@pytest.mark.parametrize(
    ("method", "world"),
    [
        (method, world)
        for method in [*DESCENDING, f"{__name__}:Descends"]
        for world in needs_of(method).worlds
    ],
)
def test_an_iteration_moves_weights_or_parts_and_logs_finite_numbers(tmp_path, method, world):
    changed, metrics = moved(tmp_path, method, world)
    assert changed
    assert metrics
    assert all(torch.tensor(value).isfinite() for value in metrics.values())


def test_control_a_method_that_does_nothing_moves_nothing(tmp_path):
    assert not moved(tmp_path, f"{__name__}:Faint", "prompts")[0]


def test_a_field_called_group_brings_no_law_of_ratios():
    needs = needs_of(f"{__name__}:Descends")
    assert descends(needs)
    assert not compares(needs)
    assert kernels(needs) == ["ode"]
    assert compares(Needs(likelihoods=True))  # control: with likelihoods they do apply
    assert {"dppo", "flow_grpo", "grpo_guard", "reinflow"} <= set(METHODS)
    assert "bc" in DESCENDING
    assert set(METHODS).isdisjoint(DESCENDING)


@pytest.mark.parametrize(("method", "weight"), [("flow_grpo", "std/dt"), ("grpo_guard", "1/dt")])
def test_step_weights_reach_the_loss(tmp_path, method, weight):
    run, plain = prepared(tmp_path, method)
    weighted = leaves.make("methods", {"name": method, "weight": weight, **CLIP}, PERSON)
    rollout, advantage = run.collect(4, 4), torch.randn(4, 4)
    step = run.policy.score(rollout.trajectory, 1, rollout.rows(advantage), None)
    ratio = {"std/dt": step.std / step.dt, "1/dt": abs(step.gain) / step.dt}[weight]
    assert torch.allclose(weighted.loss(step)[0], plain.loss(step)[0] * ratio, rtol=1e-5)
    assert (abs(ratio - 1) > 0.01).all()


@pytest.mark.parametrize(("updates", "epochs"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_minibatches_partition_the_rollout(tmp_path, updates, epochs):
    run, _ = prepared(tmp_path, "flow_grpo")
    rollout = run.collect(4, 4, updates=updates)
    rows = [r for b in run.minibatches(rollout, updates, epochs) for r in range(16)[b.rows]]
    assert rows == list(range(16)) * epochs


def test_micro_batches_do_not_change_the_update(tmp_path):
    runs = []
    for micro_batch in ("auto", 4, 1):
        folder = tmp_path / str(micro_batch)
        folder.mkdir()
        run, built = prepared(folder, "flow_grpo", micro_batch=micro_batch)
        rollout = run.collect(4, 4, shared_prefix=False)
        run.update(rollout, Batch(slice(0, 16)), torch.arange(16.0).view(4, 4) - 7.5, built.loss)
        runs.append([p.detach().clone() for p in run.trainable])
    for other in runs[1:]:
        assert max(float((a - b).abs().max()) for a, b in zip(runs[0], other, strict=True)) < 1e-6


def test_gradient_is_the_mean_over_rows_and_steps(tmp_path):
    """The gradient that `update` applies is, by hand,
    that of the mean loss over every row and every kept step.
    """
    run, built = prepared(tmp_path, "flow_grpo")
    rollout, advantage = run.collect(4, 4), torch.arange(16.0).view(4, 4) - 7.5
    chains = rollout.trajectory
    losses = [
        built.loss(run.policy.score(chains, k, rollout.rows(advantage), None))[0]
        for k in chains.steps
    ]
    expected = torch.autograd.grad(torch.stack(losses).mean(), run.trainable)
    norm = torch.stack([g.norm() for g in expected]).norm()
    expected = [g / max(1.0, float(norm)) for g in expected]
    run.update(rollout, Batch(slice(0, 16)), advantage, built.loss)
    for parameter, gradient in zip(run.trainable, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_published_kl_is_dt_times_the_true_one(tmp_path):
    run, built = prepared(tmp_path, "flow_grpo")
    built.beta = 1.0
    published = replace(built, kl_form="published")
    reference, rollout, advantage = run.weights(), run.collect(4, 4), torch.zeros(4, 4)
    for p in run.trainable:
        p.data += 0.01
    step = run.policy.score(rollout.trajectory, 1, rollout.rows(advantage), reference)
    assert torch.allclose(built.loss(step)[0] * step.dt, published.loss(step)[0], rtol=1e-5)


def test_replay_check_rescoring_and_refusal(tmp_path):
    """A network that does not repeat itself is rescored if its forwards agree, and refused,
    with the step named, if not.
    """
    run, built = prepared(tmp_path, "flow_grpo")
    rollout = run.collect(4, 4)
    shifted = replace(
        rollout, trajectory=replace(rollout.trajectory, mean=rollout.trajectory.mean + 0.05)
    )
    rescored = run.verified(shifted, built.log_ratio, built.clip / 10)
    assert run.replay_check.again
    assert torch.allclose(rescored.trajectory.mean, rollout.trajectory.mean, atol=1e-6)
    run.replay_check.again = None
    honest = run.policy.model.denoise

    def noisy(x, t, condition):
        prediction = honest(x, t, condition)
        return replace(prediction, x0=prediction.x0 + 0.1 * torch.randn_like(x))

    run.policy.model.denoise = noisy
    with pytest.raises(errors.ConfigError, match=r"replay is not exact: at step \d"):
        run.verified(run.collect(4, 4), built.log_ratio, built.clip / 10)


def test_window_draws_stay_inside_and_repeat(tmp_path):
    run, _ = prepared(tmp_path, "flow_grpo", chain={"steps": 8, "window": [1, 6], "window_size": 2})
    drawn = []
    for iteration in range(1, 200):
        run.spent.iteration = iteration
        low, high = run._draw_window()
        assert 1 <= low < high <= 6
        assert high - low == 2
        drawn.append(low)
    assert set(drawn) == {1, 2, 3, 4}
    run.spent.iteration = 7
    assert run._draw_window()[0] == drawn[6]
