"""Three ideas of methods to come, written in the public verbs: what they need is there already."""

import inspect
import json
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from genpolicy.chain.values import expand
from genpolicy.config import parse
from genpolicy.learning.advantage import group_relative, leave_one_out
from genpolicy.learning.objective import Scored, clip_metrics, clipped_surrogate, log_ratio
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.policy.weights import Weights
from genpolicy.rollout.rollout import Rollout
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run
from tests import toy, toy_control
from tests.invariants.test_control_run import same_state
from tests.invariants.test_same_run import largest_difference, metrics, weights
from tests.peers import peers, together
from tests.toy_control import GOAL, STATE


def times(run: Run, rollout: Rollout, number: int) -> Tensor:
    """A noise time for every row of a rollout, the same whatever the number of processes."""
    uniform = torch.from_numpy(run.generator("times", number).random(rollout.decisions.total))
    return run.policy.model.times(uniform[rollout.decisions.place])


@dataclass
class OldAverage:
    """Learn on the forward process from what a slow average of the policy has drawn.

    With r in [0, 1] how good a sample is, and predictions of x0 at the same noised sample,
    loss = r |new - x0|^2 + (1 - r) |2 old - new - x0|^2. forgets: the average is not saved.
    """

    groups: int = 8
    group: int = 8
    updates: int = 4
    decay: float = 0.5
    sign: float = 1.0
    forgets: bool = False

    needs: ClassVar[Needs] = Needs()

    def train(self, run: Run) -> None:
        old = run.weights()
        if not self.forgets:
            run.register(old=old)
        for _ in run.iterations():
            with old.using():
                rollout = run.collect(self.groups, self.group)
            better = self.sign * group_relative(rollout.rewards)
            good = rollout.rows(0.5 + better / 4).clamp(0, 1)
            for update in range(self.updates):
                self.learn(run, rollout, good, old, update)
            old.follow(self.decay)

    def learn(self, run: Run, rollout: Rollout, good: Tensor, old: Weights, update: int) -> None:
        model, chains = run.policy.model, rollout.trajectory
        t = times(run, rollout, update)
        eps = run.noise("renoised", rollout.decisions.place, update)(0, model.event_shape)
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        noised = expand(alpha, eps) * chains.x0 + expand(sigma, eps) * eps

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            x0, r = chains.x0[part], good[part]
            denoise = partial(model.denoise, noised[part], t[part], chains.condition[part])
            with torch.no_grad(), old.using():
                then = denoise().x0
            now = denoise().x0
            near = ((now - x0) ** 2).flatten(1).mean(1)
            far = ((2 * then - now - x0) ** 2).flatten(1).mean(1)
            moved = ((now - then) ** 2).detach().flatten(1).mean(1)
            return r * near + (1 - r) * far, {"moved": moved}

        run.descend(losses, len(good), "forward")


@dataclass
class PoolReference:
    """Prefer the best of a group to its worst, both drawn by an earlier policy out of a pool.

    With e the summed denoising error, loss = -log sigmoid(-beta / 2 (d_w - d_l)),
    d = e_new - e_reference of the winner and of the loser.
    """

    groups: int = 16
    group: int = 4
    updates: int = 4
    beta: float = 0.3
    sign: float = 1.0
    forgets: bool = False

    needs: ClassVar[Needs] = Needs(worlds=("prompts",))

    def train(self, run: Run) -> None:
        pool = run.pool(3)
        if not self.forgets:
            run.register(pool=pool)
        for _ in run.iterations():
            # all processes take the same member: `rows` would give each a share of one
            reference = pool[int(run.generator("reference").integers(len(pool)))]
            with reference.using():
                rollout = run.collect(self.groups, self.group)
            worth = self.sign * rollout.rewards[rollout.local]
            first = self.group * torch.arange(len(worth))
            clear = worth.amax(1) > worth.amin(1)  # the others prefer nothing
            won, lost = (first + worth.argmax(1))[clear], (first + worth.argmin(1))[clear]
            for update in range(self.updates):
                self.learn(run, rollout, won, lost, reference, update)
            pool.add(float(run.generator("kept").random()))

    def learn(
        self, run: Run, rollout: Rollout, won: Tensor, lost: Tensor, reference: Weights, update: int
    ) -> None:
        policy, chains = run.policy, rollout.trajectory
        t, place = times(run, rollout, update)[won], rollout.decisions.place[won]
        eps = run.noise("renoised", place, update)(0, policy.model.event_shape)

        def error(rows: Tensor, part: slice) -> Tensor:
            here = rows[part]
            condition, event = chains.condition[here], chains.x0[here]
            mean = policy.supervised_loss(condition, event, t[part], eps[part])
            return event[0].numel() * mean

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.no_grad(), reference.using():
                then = error(won, part) - error(lost, part)
            gap = error(won, part) - error(lost, part) - then
            return -logsigmoid(-0.5 * self.beta * gap), {"gap": gap.detach()}

        run.descend(losses, len(won), "preference")


@dataclass
class BranchedDecisions:
    """Draw several continuations of recorded decisions' chains from a step that is drawn, and make
    those that a known critic values above the others likelier.
    """

    states: int = 24
    samples: int = 6
    clip: float = 0.2
    sign: float = 1.0

    needs: ClassVar[Needs] = Needs(worlds=("robots",), data=True, likelihoods=True)

    def train(self, run: Run) -> None:
        experience = Experience(run, cut_fails=False)
        for _ in run.iterations():
            branch = int(run.generator("branch").integers(run.window.start, run.window.stop))
            rollout, index = experience.redraw(
                self.states, 0, samples=self.samples, branch_at=branch
            )
            actions = run.policy.model.decode(rollout.trajectory.x0)
            value = self.value(experience, index, actions)
            run.log("branch/value", float(value.mean()))
            better = self.sign * leave_one_out(value.view(-1, self.samples)).flatten()
            self.learn(run, rollout, better)
            run.seen(self.states * self.samples)

    def learn(self, run: Run, rollout: Rollout, better: Tensor) -> None:
        # rows are picked out of groups that share their start
        apart = replace(rollout, trajectory=replace(rollout.trajectory, shared=1))
        advantage = run.normalised(better)
        for batch in run.minibatches(apart, 2, epochs=2, chosen=better > 0):
            run.update(apart, batch, advantage, self.loss)

    def value(self, experience: Experience, index: Tensor, actions: Tensor) -> Tensor:
        """Minus the squared distance of the mean action from half of the way to the goal, [R]."""
        now, seen = experience.replay.now[index], experience.replay.views.observation
        wanted = 0.5 * (seen[GOAL][now, -1] - seen[STATE][now, -1])
        return -((actions.mean(1) - wanted) ** 2).sum(1)

    def loss(self, step: Scored) -> tuple[Tensor, dict[str, Tensor]]:
        log_rho = log_ratio(step.new, step.old, step.x, reduce="sum")
        surrogate = clipped_surrogate(log_rho, step.advantage, self.clip)
        return surrogate.loss, clip_metrics(log_rho, step.advantage, surrogate)


METHODS = (OldAverage, PoolReference, BranchedDecisions)
PROMPTS = (OldAverage, PoolReference)
ITERATIONS = {OldAverage: 25, PoolReference: 15, BranchedDecisions: 20}


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


def experiment(folder, method, iterations, **settings):
    """A raw experiment of a method of this file, in the world that it needs."""
    own = {
        "method": {"name": f"{__name__}:{method.__name__}", **settings},
        "budget": {"iterations": iterations},
    }
    if method in PROMPTS:
        return toy.experiment(folder, eval={"every": 0, "samples": 64}, **own)
    data = {"name": "tests.rl100_toy:Outcomes", "episodes": 12}
    rest = {"data": data, "eval": {"every": 0, "episodes": 2}, "environments": 2}
    return toy_control.experiment(folder, **rest, **own)


def trained(folder, method, iterations, **settings):
    """The result of a whole run in a folder of its own."""
    folder.mkdir()
    return train(parse.parse(experiment(folder, method, iterations, **settings)))


def rise(result):
    """The gain of a run: in the deployed policy's reward, or in the value of redrawn decisions."""
    if "reward/brightness" in result.after:
        return result.after["reward/brightness"] - result.before["reward/brightness"]
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    values = [line["branch/value"] for line in map(json.loads, lines) if "branch/value" in line]
    return sum(values[-4:]) / 4 - sum(values[:4]) / 4


# They are written in the public verbs

PRIVATE, WRITTEN = re.compile(r"\._"), re.compile(r"\brun\.[\w.]+(\[.*\])?\s*[-+*/|]?=(?!=)")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_no_private_attribute_and_writes_into_no_run(method):
    source = inspect.getsource(method)
    assert not PRIVATE.findall(source)
    assert not WRITTEN.findall(source)


def test_control_what_is_forbidden_would_be_found():
    assert PRIVATE.search("low, high = run._draw_window()")
    for line in ("run.policy = other", "run.spent.over = True", "run.metrics.numbers['a'] += 1"):
        assert WRITTEN.search(line)
    for line in ("if run.iteration == 1:", "run.collect(4, policy=other)", "x = run.window"):
        assert not WRITTEN.search(line)


# They learn

LEAST = {OldAverage: 0.08, PoolReference: 0.1, BranchedDecisions: 0.1}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_better_comes_more_often(tmp_path, method):
    up = rise(trained(tmp_path / "up", method, ITERATIONS[method]))
    down = rise(trained(tmp_path / "down", method, ITERATIONS[method], sign=-1.0))
    assert up > LEAST[method]
    assert down < -0.08


# They resume


def resumed(folder, method, **settings):
    """Compares a run that was stopped after 3 of 8 iterations with one that was not. Returns, for
    each part of the last state, True where they are equal; True where the metrics are; and the
    state.
    """
    whole = trained(folder / "whole", method, 8, **settings).folder
    broken = trained(folder / "broken", method, 3, **settings).folder
    config = broken / "config.yaml"
    config.write_text(config.read_text().replace("iterations: 3\n", "iterations: 8\n"))
    assert train(config).summary["iterations"] == 8
    a, b = weights(whole, 8), weights(broken, 8)
    for state in (a, b):
        state["kept"].pop("deployment")  # the stop was evaluated
    return same_state(a, b), learned(whole) == learned(broken), a


def learned(folder):
    """The metrics of a run's iterations."""
    return [line for line in metrics(folder) if not any(name.startswith("eval/") for name in line)]


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, method):
    verdicts, logged, state = resumed(tmp_path, method)
    assert all(verdicts.values()), verdicts
    assert logged
    name = {OldAverage: "old", PoolReference: "pool", BranchedDecisions: "experience"}[method]
    assert name in state["kept"]


@pytest.mark.parametrize("method", PROMPTS)
def test_control_weights_that_are_not_registered_are_missed(tmp_path, method):
    verdicts, logged, _ = resumed(tmp_path, method, forgets=True)
    assert not verdicts["parameters"]
    assert not logged


# They are the same on two processes


def on_processes(folder, count, method, sections=None, **settings):
    """The weights of so many processes after two iterations, the updates,
    and their rows of each.
    """
    accelerators, works = peers(count), []
    for index, accelerator in enumerate(accelerators):
        place = folder / f"{count}-{index}"
        place.mkdir(parents=True)
        raw = experiment(place, method, 2, **settings)
        raw |= {"optimizer": {"lr": 1e-3, "eps": 1e-4}, **(sections or {})}
        run, made = prepare(parse.parse(raw), place / "run", Processes(accelerator))
        works.append(partial(two_iterations, run, made))
    return together(works, accelerators)


def two_iterations(run, method):
    descend, rows = run.descend, []

    def iterations():
        for iteration in (1, 2):
            run.begin(iteration)
            yield iteration

    def watched(losses, count, name):
        rows.append(count)
        return descend(losses, count, name)

    run.iterations, run.descend = iterations, watched
    method.train(run)
    return run.weights().values, run.learner.optimizer.updates, rows


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_what_one_learns(tmp_path, method):
    ((one, updates, _),) = on_processes(tmp_path, 1, method)
    assert updates > 2
    ((other, *_),) = on_processes(tmp_path / "turned", 1, method, sign=-1.0)
    assert largest_difference(one, other) > 1e-4, "control: another run is another"
    for values, count, _ in on_processes(tmp_path, 2, method):
        assert count == updates
        assert largest_difference(values, one) < 1e-5


def judged(reward):
    """Sections of a run whose rewards are often all the same in a group."""
    return {"reward": {f"tests.toy:{reward}": 1.0}, "eval": {"every": 0, "samples": 4}}


def test_two_processes_learn_what_one_learns_where_one_of_them_has_no_pair(tmp_path):
    some = {"sections": judged("brightness_strict"), "groups": 4, "group": 8}
    ((one, updates, rows),) = on_processes(tmp_path, 1, PoolReference, **some)
    two = on_processes(tmp_path, 2, PoolReference, **some)
    shares = list(zip(two[0][2], two[1][2], strict=True))
    assert [a + b for a, b in shares] == rows
    assert any(0 in share and sum(share) for share in shares), "else this says nothing"
    for values, count, _ in two:
        assert count == updates
        assert largest_difference(values, one) < 1e-5


@pytest.mark.parametrize("count", [1, 2])
def test_where_nobody_has_a_pair_nothing_is_learned(tmp_path, count):
    for values, updates, rows in on_processes(
        tmp_path, count, PoolReference, sections=judged("constant")
    ):
        assert set(rows) == {0}
        assert updates == 0
        assert largest_difference(values, toy_weights()) == 0


def toy_weights():
    """The parameters that a toy begins with."""
    return [value.detach() for value in toy.ToyModel().trainable().values()]
