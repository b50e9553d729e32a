"""Distillation: each loss on a teacher of two modes that is known in closed form, beside the variants
that are known to be wrong, and a run on the toy of control.
"""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from genpolicy.chain import DDIM, Chain, Mean, Noise, Prediction
from genpolicy.chain.chain import ODE
from genpolicy.chain.values import expand
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.methods.parts.distillation import distance, following, jump, noised, solve
from genpolicy.models.mlp import MLP
from genpolicy.policy.files import load, save_policy, saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.training.experiment import train
from tests import toy_control
from tests.toy_control import cloned, experiment, prepared

POSITIVE, SPREAD = 0.3, 0.05
"""The share of the mode at +.8 (the other is at -.8), and the std inside each."""
STUDENT = {"steps": 1, "kernel": {"name": "consistency"}}
QUICK = {"name": "consistency", "batch": 512, "updates": 50, "minibatch": 256}


class Oracle(MLP):
    """A model of actions that are +.8 or -.8 in all dims, whatever is seen: E[x0 | x_t] exactly."""

    def denoise(self, x, t, condition):
        self.evaluations += len(x)
        alpha, sigma = (expand(f(t), x) for f in (self.schedule.alpha, self.schedule.sigma))
        variance = (alpha * SPREAD) ** 2 + sigma**2
        logits, means = [], []
        for share, mode in ((POSITIVE, 0.8), (1 - POSITIVE, -0.8)):
            off = x - alpha * mode
            square = (off**2 / variance).flatten(1).sum(1)
            logits.append(math.log(share) - square / 2)
            means.append(mode + alpha * SPREAD**2 / variance * off)
        weight = expand(torch.stack(logits).softmax(0)[0], x)
        x0 = weight * means[0] + (1 - weight) * means[1]
        return Prediction(x0, (x - alpha * x0) / sigma)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The folder of a policy of the toy of control."""
    return cloned(tmp_path_factory.mktemp("clone"), family="vp", hidden=64, blocks=2)


def oracle(policy: ChainPolicy, steps: int = 20) -> ChainPolicy:
    """The oracle's ODE, in the shapes of a policy."""
    model = policy.model
    model.__class__ = Oracle
    model.clip = None
    return ChainPolicy(model, Chain(model.schedule, model.grid(steps), ODE))


def distilled(folder, clone, iterations=16, **sections):
    """A run that distils the oracle, trained; and noise of 1000 rows with their condition."""
    run, method = prepared(
        folder,
        **{
            "policy": {"name": "mlp", "teacher": clone, "prediction_type": "sample"},
            "chain": STUDENT,
            "method": QUICK,
            "optimizer": {"lr": 2e-3, "final": 0.0},
            "budget": {"iterations": iterations},
            **sections,
        },
    )
    run.teacher = oracle(run.teacher)
    method.train(run)
    return run


def drawn(run, policy=None):
    """1000 samples of a run's student, or of another policy from the same noise."""
    context, place = run.contexts(1000)
    policy = policy or run.policy
    return policy.sample(
        policy.model.encode(context), Noise(7, 0, place, torch.zeros_like(place)), keep=(0, 0)
    ).x0.flatten(1)


def modes(x):
    """The share of samples nearer to the mode at +.8, and of those that are .3 off any mode."""
    away = torch.minimum((x - 0.8).abs().amax(1), (x + 0.8).abs().amax(1))
    return float((x.mean(1) > 0).float().mean()), float((away > 0.3).float().mean())


# -- the modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "iterations"), [("same_noise", 16), ("full_solve", 16), ("consistency", 48)]
)
def test_a_student_of_one_step_keeps_both_modes(tmp_path, clone, loss, iterations):
    run = distilled(tmp_path, clone, iterations, method={**QUICK, "loss": loss})
    share, off = modes(drawn(run))
    taught, never = modes(drawn(run, run.teacher))
    assert never < 0.01
    assert abs(share - taught) < 0.05
    assert off < 0.15  # the ODE's map has a cliff between the modes


def test_the_mean_of_a_kernel_loses_the_smaller_mode_and_a_network_without_noise_both(
    tmp_path, clone
):
    """A student can keep what its teacher has: the ODE has both modes, the mean of DDPM's steps one.
    A network that sees no noise has nothing to tell the modes by.
    """
    run = distilled(
        tmp_path,
        clone,
        policy={
            "name": "mlp",
            "teacher": clone,
            "pretrained": None,
            "family": "gaussian",
            "chunk": 2,
        },
        data={"name": "tests.toy_control:Recorded", "skill": 0.15},  # the clone's own
    )
    mean = Chain(run.teacher.model.schedule, run.teacher.chain.grid, Mean(DDIM(1.0)), (0, 20))
    share, off = modes(drawn(run, replace(run.teacher, chain=mean)))
    assert (share, off) == (0.0, 0.0)
    assert modes(drawn(run))[1] > 0.9


def test_one_step_of_the_teacher_itself_misses_every_mode(tmp_path, clone):
    run = distilled(tmp_path, clone, iterations=1)
    _, off = modes(drawn(run, oracle(run.teacher, steps=1)))
    assert off > 0.9


def fitted(folder, clone, target, head="sample", updates=400):
    """The one-step samples of a student that is fitted to ``target(teacher, noise)``, a pair of
    where it jumps from and where to; and the teacher's from the same noise.
    """
    section = {"name": "mlp", "teacher": clone, "prediction_type": head}
    run, _ = prepared(folder, policy=section, chain=STUDENT, method=QUICK)
    teacher, model = oracle(run.teacher), run.policy.model
    optimizer = torch.optim.Adam(run.trainable, lr=2e-3)
    context, place = run.contexts(256)
    condition = model.encode(context)
    for update in range(updates):
        rows = Noise(1, update, place, torch.zeros_like(place))
        with torch.no_grad():
            x, wanted = target(teacher, condition, rows)
        said = jump(run.policy, x, torch.ones(256).double(), condition)
        optimizer.zero_grad()
        distance(said, wanted, 0.0).mean().backward()
        optimizer.step()
    with torch.no_grad():
        noise = Noise(2, 0, place, torch.zeros_like(place))
        z = noise(-1, model.event_shape)
        found = jump(run.policy, z, torch.ones(256).double(), condition)
        return found.flatten(1), teacher.sample(condition, noise, keep=(0, 0)).x0.flatten(1)


def together(teacher, condition, rows):
    """The right target: the teacher's sample from the very noise that the student sees."""
    taught = teacher.sample(condition, rows, keep=(0, 0))
    return taught.start, taught.x0


def apart(teacher, condition, rows):
    """The teacher's sample from other noise."""
    x, target = together(teacher, condition, rows)
    return x, target.roll(1, 0)


def anchored(teacher, condition, rows):
    """A sample noised to the noisiest time, which is to be told from that noise (DSM)."""
    _, x0 = together(teacher, condition, rows)
    return noised(teacher, x0, torch.ones(len(x0)).double(), rows(99, x0.shape[1:])), x0


def test_the_same_noise_keeps_the_modes_and_other_noise_or_a_denoising_anchor_averages_them(
    tmp_path, clone
):
    right, _ = fitted(tmp_path, clone, together)
    assert modes(right)[1] < 0.15
    for wrong in (apart, anchored):
        found, _ = fitted(tmp_path, clone, wrong)
        assert modes(found)[1] > 0.9
        assert found.mean(0).abs().max() < 0.8  # near the average of the modes


def test_a_head_of_epsilon_is_amplified_until_nothing_is_learned_and_is_refused(tmp_path, clone):
    wrong, taught = fitted(tmp_path, clone, together, head="epsilon", updates=200)
    right, _ = fitted(tmp_path, clone, together, updates=200)
    assert distance(right, taught, 0.0).mean() < 0.3
    assert distance(wrong, taught, 0.0).mean() > 10
    run, method = prepared(
        tmp_path, policy={"name": "mlp", "teacher": clone}, chain=STUDENT, method=QUICK
    )
    with pytest.raises(ConfigError, match=r"head says epsilon.*set policy\.prediction_type"):
        method.train(run)


def test_the_polish_brings_a_student_that_averages_back_to_the_modes(tmp_path, clone):
    """Loss score alone moves samples from between the modes to them."""
    few = {**QUICK, "loss": "score", "updates": 25, "fakes": 3}
    polished = distilled(tmp_path, clone, iterations=20, method=few)
    assert modes(drawn(polished))[1] < 0.3


# -- the pieces ------------------------------------------------------------------------------------


def test_a_solve_from_a_time_of_the_grid_is_the_rest_of_the_teachers_sampler(tmp_path, clone):
    run, _ = prepared(
        tmp_path,
        policy={"name": "mlp", "teacher": clone, "prediction_type": "sample"},
        chain=STUDENT,
        method=QUICK,
    )
    teacher = oracle(run.teacher, 8)
    context, place = run.contexts(6)
    condition = teacher.model.encode(context)
    noise = Noise(3, 0, place, torch.zeros_like(place))
    whole = teacher.sample(condition, noise, keep=(0, 8))
    k = torch.tensor([0, 3, 7, 3, 1, 0])
    found = solve(teacher, whole.before(k), teacher.chain.grid[k], condition, noise)
    assert torch.allclose(found, whole.x0, atol=1e-6)
    # a step of it is the next state
    assert torch.allclose(
        following(teacher, whole.before(k), k, condition), whole.after(k), atol=1e-6
    )
    # between two times of the grid the first step is shorter
    t = torch.full((6,), 0.6, dtype=torch.float64)
    below = teacher.chain.below(t[0])
    assert below.K == 5
    assert below.grid[1:].tolist() == teacher.chain.grid[4:].tolist()
    assert solve(teacher, whole.before(3), t, condition, noise).shape == whole.x0.shape


def test_the_window_of_a_chain_that_is_entered_later_keeps_its_steps():
    schedule = MLP().schedule
    chain = Chain(schedule, schedule.grid(10), ODE, window=(4, 9))
    assert list(chain.below(chain.grid[6]).stochastic) == [0, 1, 2]
    assert list(chain.below(chain.grid[2]).stochastic) == [2, 3, 4, 5, 6]
    assert chain.below(chain.grid[0]) is chain


def test_the_pseudo_huber_distance_by_hand():
    said, target = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert distance(said, target, 0.0).item() == pytest.approx(4.5)
    assert distance(said, target, 2.0).item() == pytest.approx(math.sqrt(4.5 + 4) - 2)


# -- the run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("visits", [None, {"episodes": 10}, {"episodes": 10, "actor": "teacher"}])
def test_a_student_of_one_step_succeeds_as_its_teacher(tmp_path, visits):
    teacher = toy_control.cloned(tmp_path / "teacher", family="flow", hidden=64)
    seen = {"data": None} if visits else {}
    raw = experiment(
        tmp_path,
        policy={"name": "mlp", "teacher": teacher},
        chain=STUDENT,
        method={**QUICK, **({"visits": visits} if visits else {})},
        optimizer={"lr": 1e-3, "final": 0.0},
        budget={"iterations": 6},
        eval={"every": 0, "episodes": 100},
        **seen,
    )
    result = train(parse.parse(raw))
    student, own = load(result.folder), load(teacher)
    assert result.after["success_rate"] > 0.15
    assert student.chain.K == 1
    assert not student.parts
    assert own.chain.K > 1
    # what is saved names no teacher, and acts without it
    assert '"teacher":' not in (result.folder / "policy" / "genpolicy.json").read_text()


@pytest.mark.parametrize("change", ["moved", "another", "another sampler"])
def test_a_run_goes_on_with_the_teacher_that_taught_so_far(tmp_path, clone, change):
    teacher = tmp_path / "teacher"
    shutil.copytree(clone, teacher)
    raw = experiment(
        tmp_path,
        policy={"name": "mlp", "teacher": {"path": str(teacher)}, "prediction_type": "sample"},
        chain=STUDENT,
        method=QUICK,
        budget={"iterations": 2},
        checkpoint_every=1,
    )
    run = train(parse.parse(raw)).folder
    asked = ["--budget.iterations=3"]
    if change == "moved":
        teacher.rename(tmp_path / "elsewhere")
        where = tmp_path / "elsewhere"
        asked += [f"--policy.teacher.path={where}", f"--policy.pretrained={where}"]
        assert train(run / "config.yaml", asked).summary["iterations"] == 3
        return
    if change == "another sampler":
        asked += ["--policy.teacher.steps=2"]
    else:  # under the same name
        found = saved(teacher)
        other = found.load()
        for parameter in other.model.trainable().values():
            parameter.data += 0.1
        shutil.rmtree(teacher)
        save_policy(other, {"name": "mlp"}, found.sampler, teacher)
    with pytest.raises(ConfigError, match=r"policy\.teacher is another policy, or has another"):
        train(run / "config.yaml", asked)


def test_what_does_not_fit_is_said_before_any_work(tmp_path, clone):
    policy = {"name": "mlp", "teacher": clone, "prediction_type": "sample"}

    def trained(method, sections):
        asked = {"policy": policy, "chain": STUDENT, "method": method, **sections}
        run, made = prepared(tmp_path, **asked)
        made.train(run)

    def refused(match, method=QUICK, **sections):
        with pytest.raises(ConfigError, match=match):
            trained(method, sections)

    refused("learns from a teacher: name its folder", policy={"name": "mlp", "pretrained": clone})
    refused("method bc learns from no teacher", method={"name": "bc"})
    refused(
        "no saved policy|no such folder", policy={**policy, "teacher": str(tmp_path / "nowhere")}
    )
    refused(
        "draws noise at its steps",
        policy={**policy, "teacher": {"path": clone, "kernel": {"name": "ddim", "eta": 1.0}}},
    )
    refused("no states to be taught at", data=None)
    fresh = {**policy, "pretrained": None, "chunk": 2}
    other = {"name": "tests.toy_control:Recorded", "episodes": 3}
    refused("another meaning in actions", policy=fresh, data=other)
    refused("start alike", policy={**policy, "teacher": {"path": clone, "start": 0.5}})
    refused(
        "take loss same_noise",
        chain={"steps": 3, "kernel": {"name": "consistency"}},
        method={**QUICK, "loss": "full_solve"},
    )
    refused("stepz.*did you mean steps", policy={**policy, "teacher": {"path": clone, "stepz": 3}})
    refused("its sampler is 'trust'", policy={**policy, "teacher": {"path": clone, "trust": True}})
    heun = {"path": clone, "kernel": {"name": "heun"}}
    averaged = {**QUICK, "loss": "consistency"}
    refused("heun is a solver", policy={**policy, "teacher": heun}, method=averaged)
    flow = {"name": "mlp", "teacher": clone, "pretrained": None, "family": "flow", "chunk": 2}
    own = {"name": "tests.toy_control:Recorded", "skill": 0.15}
    solved = {**QUICK, "loss": "full_solve"}
    refused("noise schedule is not its teacher's", policy=flow, data=own, method=solved)
