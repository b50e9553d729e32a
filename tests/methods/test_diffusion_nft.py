"""DiffusionNFT: its loss against closed forms, its old policy, and that the solver does not matter."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from genpolicy.chain.values import Prediction, output_gain
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.methods.diffusion_nft import MODES, SCHEDULES, DiffusionNFT
from genpolicy.rollout.minibatch import Batch
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from tests import toy, toy_control
from tests.invariants.test_same_run import largest_difference, weights
from tests.methods.test_laws import ODE, Turned, prepared
from tests.peers import alike, peers, together

HEUN = {"name": "heun"}

# -- the formulas ----------------------------------------------------------------------------------


def test_goodness_maps_the_bounds_to_zero_and_one():
    advantage = torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.5, 5.0, 9.0])
    found = DiffusionNFT().goodness(advantage)
    assert found.tolist() == pytest.approx([0, 0, 0.4, 0.5, 0.75, 1, 1])
    assert DiffusionNFT(advantage_clip=2.0).goodness(torch.tensor([1.0])).tolist() == [0.75]


@pytest.mark.parametrize(
    ("mode", "good"),
    [
        ("all", [0.1, 0.5, 0.7]),
        ("positive_only", [0.5, 0.5, 0.7]),
        ("negative_only", [0.1, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.6]),
        ("binary", [0.4, 0.5, 0.6]),
    ],
)
def test_each_mode_keeps_its_advantages(mode, good):
    found = DiffusionNFT(mode=mode).goodness(torch.tensor([-4.0, 0.0, 2.0]))
    assert found.tolist() == pytest.approx(good)
    assert mode in MODES


@pytest.mark.parametrize(
    ("old", "decays"),
    [
        ("on_policy", [0, 0, 0, 0, 0]),
        ("rising", [0, 0.075, 0.1, 0.5, 0.5]),
        ("delayed", [0, 0, 0.1875, 0.999, 0.999]),
    ],
)
def test_decay_of_the_old_policy(old, decays):
    method = DiffusionNFT(old=old)
    assert [method.decay(n) for n in (0, 75, 100, 500, 10**6)] == pytest.approx(decays)
    assert old in SCHEDULES


POSITIVE, GOOD = 0.3, {1.0: 0.9, -1.0: 0.35}
"""The share of the mode at +1 (the other is at -1), and how good each mode is."""
STATES = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
TIME = 0.6


def two_modes():
    """At x_t on a flow schedule: p(x0 | x_t), the targets u = eps - x0, and r, [X,2] each."""
    x0 = torch.tensor([1.0, -1.0], dtype=torch.float64)
    eps = (STATES[:, None] - (1 - TIME) * x0) / TIME
    share = torch.tensor([POSITIVE, 1 - POSITIVE], dtype=torch.float64)
    weight = (share.log() - eps**2 / 2).softmax(1)
    good = torch.tensor([GOOD[1.0], GOOD[-1.0]], dtype=torch.float64).expand_as(eps)
    return weight, eps - x0, good


def fixed_point(method, loss=None):
    """The output at which the expected loss is least, [X], and what the paper says it is.

    The plain loss is a square in it, so that its gradient is a line: two of them give its zero.
    """
    weight, target, good = two_modes()
    old = (weight * target).sum(1)
    alpha = (weight * good).sum(1)
    positive = (weight * good * target).sum(1) / alpha

    def gradient(value):
        out = torch.full_like(old, value).requires_grad_()
        errors = [(v[:, None] - target).reshape(-1, 1) for v in (out, old)]
        rows = good.reshape(-1), torch.full((errors[0].numel(),), -TIME, dtype=torch.float64)
        losses = (loss or method.loss)(*errors, None, *rows)[0].view_as(weight)
        return torch.autograd.grad((weight * losses).sum(), out)[0]

    at_0, at_1 = gradient(0.0), gradient(1.0)
    return -at_0 / (at_1 - at_0), old, alpha, positive


@pytest.mark.parametrize("b", [0.1, 1.0, 2.0])
def test_the_plain_form_is_least_where_the_paper_says(b):
    found, old, alpha, positive = fixed_point(DiffusionNFT(b=b, form="plain"))
    expected = old + 2 * alpha / b * (positive - old)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert (expected - old).abs().max() > 0.05 / b
    # control: neither the positive policy alone, nor half the step
    assert (found - positive).abs().max() > 1e-2
    assert (found - (old + alpha / b * (positive - old))).abs().max() > 1e-2


def test_control_a_negative_policy_that_is_not_mirrored_has_another_fixed_point():
    method = DiffusionNFT(b=0.5, form="plain")

    def wrong(now, old, first, good, gain):
        plus = (0.5 * now + 0.5 * old) ** 2
        minus = (0.5 * old - 0.5 * now) ** 2
        return (good * plus.mean(1) + (1 - good) * minus.mean(1), {})

    found, old, alpha, positive = fixed_point(method, wrong)
    assert (found - (old + 4 * alpha * (positive - old))).abs().max() > 1e-2


def errors(seed=0, rows=6):
    """Errors of the network, of old and of the first policy, r and gains."""
    drawn = torch.Generator().manual_seed(seed)
    three = [torch.randn(rows, 2, 5, generator=drawn, dtype=torch.float64) for _ in range(3)]
    good = torch.rand(rows, generator=drawn, dtype=torch.float64)
    return *three, good, -torch.rand(rows, generator=drawn, dtype=torch.float64)


def test_the_form_x0_by_hand():
    now, old, first, good, gain = errors()
    method = DiffusionNFT(b=0.4, beta=0.3)
    found, metrics = method.loss(now, old, first, good, gain)
    for row in range(len(good)):
        plus = gain[row] * (0.4 * now[row] + 0.6 * old[row])
        minus = gain[row] * (1.4 * old[row] - 0.4 * now[row])
        far = [(e**2).mean() / e.abs().mean() for e in (plus, minus)]
        value = 5 / 0.4 * (good[row] * far[0] + (1 - good[row]) * far[1])
        value = value + 0.3 * ((now[row] - first[row]) ** 2).mean()
        assert found[row] == pytest.approx(float(value))
    assert metrics["anchor"].tolist() == ((now - first) ** 2).flatten(1).mean(1).tolist()


def gradient(method, now, *rest):
    now = now.clone().requires_grad_()
    return torch.autograd.grad(method.loss(now, *rest)[0].sum(), now)[0]


def test_the_size_of_the_error_is_no_part_of_the_gradient_of_the_form_x0():
    """A row of one dim: |e|^2 / sg|e| has gradient 2 sign(e), and |e|^2 / |e| only half of it."""
    one = torch.tensor([[0.7]], dtype=torch.float64)
    gain = torch.tensor([-0.5], dtype=torch.float64)
    found = gradient(DiffusionNFT(beta=0.0), one, one, None, torch.ones(1), gain)
    assert found.item() == pytest.approx(5 * 2 * 0.5)


def test_the_form_x0_counts_near_and_far_misses_alike_and_the_plain_one_does_not():
    now, old, _, good, gain = errors()
    scaled = (10 * now, 10 * old, None, good, gain)
    for form, factor in (("x0", 1), ("plain", 10)):
        method = DiffusionNFT(form=form, beta=0.0)
        small = gradient(method, now, old, None, good, gain)
        assert torch.allclose(gradient(method, *scaled), factor * small)


@pytest.mark.parametrize("form", ["x0", "plain"])
def test_at_the_old_policy_the_gradient_is_2r_minus_1_whatever_b(form):
    now, _, _, good, gain = errors()
    rest = (now, None)
    method = DiffusionNFT(form=form, beta=0.0)
    whole = gradient(method, now, *rest, torch.ones_like(good), gain)
    for b in (0.1, 1.0, 3.0):
        found = gradient(replace(method, b=b), now, *rest, good, gain)
        assert torch.allclose(found, (2 * good - 1)[:, None, None] * whole)
    still = gradient(method, now, *rest, torch.full_like(good, 0.5), gain)
    assert still.abs().max() < 1e-12 < whole.abs().max()


def test_away_from_the_old_policy_an_indifferent_sample_pulls_back_to_it():
    now, old, _, good, gain = errors()
    method = DiffusionNFT(form="plain", beta=0.0)
    found = gradient(method, now, old, None, torch.full_like(good, 0.5), gain)
    assert torch.allclose(found, 5 * (now - old) / 5, atol=1e-9), "b = 1, mean over 10 dims"


def test_every_head_has_the_same_implicit_policies():
    """The same x0's, said by other heads: the form x0 is the same, the plain one weighs times."""
    drawn = torch.Generator().manual_seed(0)
    x0, eps, now, old = (torch.randn(4, 5, generator=drawn, dtype=torch.float64) for _ in range(4))
    sigma = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    alpha = (1 - sigma**2).sqrt()
    x = alpha[:, None] * x0 + sigma[:, None] * eps
    good = torch.tensor([0.1, 0.4, 0.8, 1.0], dtype=torch.float64)
    losses = {"x0": [], "plain": []}
    for kind in ("epsilon", "sample", "v_prediction"):
        gain, _ = output_gain(kind, alpha, sigma)
        outs = [(value - x0) / gain[:, None] for value in (now, old)]
        # the error is that of the head's own output: translated, it is the x0 that was said
        target = {"epsilon": eps, "sample": x0}.get(
            kind, alpha[:, None] * eps - sigma[:, None] * x0
        )
        said = Prediction.of(kind, target + outs[0], x, alpha, sigma)
        assert torch.allclose(said.x0.double(), now, atol=1e-5)
        for form, values in losses.items():
            values.append(DiffusionNFT(form=form, b=0.7).loss(*outs, None, good, gain)[0])
    assert all(torch.allclose(value, losses["x0"][0]) for value in losses["x0"])
    assert not torch.allclose(losses["plain"][0], losses["plain"][1])


# -- runs ------------------------------------------------------------------------------------------


def stand(folder, world="prompts", kernel=ODE, **settings):
    """A run at iteration 1, its method, and copies of its weights as old and reference."""
    folder.mkdir()
    run, _ = prepared(folder, "diffusion_nft", world, chain={"steps": 4, "kernel": kernel})
    method = DiffusionNFT(groups=4, group=4, times=3, **settings)
    return run, method, run.weights(), run.weights()


@pytest.mark.parametrize("world", ["prompts", "robots"])
def test_the_solver_does_not_matter_where_the_samples_are_the_same(tmp_path, world):
    """Each policy draws with a solver of its own; the second learns from its own rollout, and from
    one in which it has drawn what the first has.
    """
    found, first = {}, None
    for name, kernel in (("ddim", ODE), ("heun", HEUN), ("planted", HEUN)):
        run, method, *copies = stand(tmp_path / name, world, kernel)
        rollout = run.collect(2, 2)
        first = first or rollout
        if name == "planted":
            decisions = replace(rollout.decisions, place=first.decisions.place)
            trajectory = replace(
                rollout.trajectory, x0=first.trajectory.x0, condition=first.trajectory.condition
            )
            rollout = replace(rollout, trajectory=trajectory, decisions=decisions)
        rows = len(rollout.trajectory.x0)
        good = torch.linspace(0, 1, rows)
        method.learn(run, rollout, Batch(slice(0, rows)), good, *copies, 0)
        found[name] = run.weights().values
        if kernel == HEUN:
            assert len(rollout.trajectory.steps) == 0, "no step has a density"
    assert largest_difference(found["ddim"], found["planted"]) == 0
    assert largest_difference(found["ddim"], found["heun"]) > 0, "control: its own samples"


def test_a_sample_is_noised_at_times_of_the_grid_each_once(tmp_path):
    run, method, old, reference = stand(tmp_path / "run")
    asked, honest = [], run.policy.model.denoise

    def denoise(x, t, condition):
        asked.append(t.clone())
        return honest(x, t, condition)

    rollout = run.collect(4, 4)
    run.policy.model.denoise = denoise
    method.learn(run, rollout, Batch(slice(0, 16)), torch.ones(16), old, reference, 0)
    grid = run.policy.chain.grid[:-1].tolist()
    calls = len(asked) // 3
    times = torch.cat([asked[3 * call] for call in range(calls)]).view(16, 3).tolist()
    assert all(len(set(row)) == 3 and set(row) <= set(grid) for row in times)
    assert len({tuple(row) for row in times}) > 4, "each sample has an order of its own"
    for call in range(calls):  # old, reference and network see the same
        assert torch.equal(asked[3 * call], asked[3 * call + 1])
        assert torch.equal(asked[3 * call], asked[3 * call + 2])


@pytest.mark.parametrize("form", ["x0", "plain"])
def test_without_differences_of_reward_nothing_moves_at_first(tmp_path, form):
    run, method, old, reference = stand(tmp_path / "run", form=form)
    rollout = run.collect(4, 4)
    for good, moves in ((0.5, False), (0.9, True)):
        rows = Batch(slice(0, 16)), torch.full((16,), good)
        run.learner.optimizer.zero_grad()
        found = {}
        run.updates.metrics.log_all = found.update
        method.learn(run, rollout, *rows, old, reference, 0)
        assert (found["nft/grad_norm"] > 1e-6) == moves


def collected(folder, decay, iterations=3):
    """What each iteration of a run draws, with this d(n)."""
    run, method, *_ = stand(folder)
    method.decay = lambda n: decay
    drawn, honest = [], run.collect

    def collect(*arguments, **options):
        drawn.append(honest(*arguments, **options))
        return drawn[-1]

    def numbers():
        for run.spent.iteration in range(1, iterations + 1):
            yield run.spent.iteration

    run.collect, run.iterations = collect, numbers
    method.train(run)
    return [rollout.trajectory.x0 for rollout in drawn], run


def test_the_old_policy_is_the_one_that_acts(tmp_path):
    kept, trained = collected(tmp_path / "kept", 1.0)
    fresh, *_ = stand(tmp_path / "fresh")
    for iteration, x0 in enumerate(kept, 1):
        fresh.spent.iteration = iteration
        assert torch.equal(fresh.collect(4, 4).trajectory.x0, x0), "d = 1: it never changes"
    assert largest_difference(fresh.weights().values, trained.weights().values) > 0
    followed, _ = collected(tmp_path / "followed", 0.0)
    assert torch.equal(followed[0], kept[0])
    assert not torch.equal(followed[2], kept[2]), "control: d = 0 follows at once"


CRITIC = {"advantage": "critic", "critic": {"epochs": 2, "warm_up": 1}}


def test_a_critic_tells_decisions_of_one_episode_apart_and_a_group_does_not(tmp_path):
    run, *_ = stand(tmp_path / "run", "robots")
    rollout = run.collect(4, 4, updates=1)
    episode = rollout.decisions.last.int().cumsum(0) - rollout.decisions.last.int()
    spread = {}
    for kind in ("group", "critic"):
        good = DiffusionNFT(advantage=kind).judge(run)(rollout)
        assert good.shape == (len(rollout.trajectory.x0),)
        spread[kind] = max(
            float(good[episode == e].max() - good[episode == e].min()) for e in episode.unique()
        )
    assert spread["group"] == 0 < spread["critic"]


def learned(folder, count, world, seed=0):
    """The weights of each of so many processes after two iterations."""
    accelerators, works = peers(count), []
    raw_of = toy.experiment if world == "prompts" else toy_control.experiment
    sizes = {"groups": 4, "group": 3, "updates": 2, "epochs": 2, "b": 0.5, "form": "plain"}
    sizes = {**sizes, **(CRITIC if world == "robots, critic" else {})}
    for index, accelerator in enumerate(accelerators):
        place = folder / f"{count}-{index}"
        place.mkdir(parents=True)
        raw = raw_of(
            place,
            method={"name": "diffusion_nft", **sizes},
            chain={"steps": 4, "kernel": ODE},
            optimizer={"lr": 1e-3, "eps": 1e-4},
            budget={"iterations": 2},
            seed=seed,
        )
        run, method = prepare(parse.parse(raw), place / "run", Processes(accelerator))
        works.append(partial(two_iterations, run, method))
    return together(works, accelerators)


def two_iterations(run, method):
    def iterations():
        for iteration in (1, 2):
            run.begin(iteration)
            yield iteration

    run.iterations = iterations
    method.train(run)
    return run.weights().values


@pytest.mark.parametrize("world", ["prompts", "robots", "robots, critic"])
def test_two_processes_learn_what_one_learns(tmp_path, monkeypatch, world):
    monkeypatch.setattr("genpolicy.methods.parts.baseline.StateValue", alike)
    (one,) = learned(tmp_path, 1, world)
    (other,) = learned(tmp_path / "other", 1, world, seed=1)
    for values in learned(tmp_path, 2, world):
        assert largest_difference(values, one) < 1e-5
    assert largest_difference(one, other) > 1e-4, "control: another seed is another run"


def test_a_resumed_run_goes_on_with_its_critic(tmp_path):
    method = {"name": "diffusion_nft", "groups": 4, "group": 2, "form": "plain", **CRITIC}
    folders = []
    for name, first in (("whole", 4), ("broken", 2)):
        (tmp_path / name).mkdir()
        raw = toy_control.experiment(
            tmp_path / name,
            method=method,
            chain={"steps": 4, "kernel": ODE},
            optimizer={"lr": 3e-3},
            budget={"iterations": first},
            eval={"every": 0, "episodes": 4},
        )
        folders.append(train(parse.parse(raw)).folder)
    half = weights(folders[1], 2)["parameters"]
    config = folders[1] / "config.yaml"
    config.write_text(config.read_text().replace("iterations: 2", "iterations: 4"))
    train(config)
    whole, broken = (weights(f, 4)["parameters"] for f in folders)
    assert largest_difference(whole, broken) == 0 < largest_difference(whole, half)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_resumed_run_goes_on_with_its_old_policy(tmp_path, forgets):
    method = {"name": "diffusion_nft", "groups": 4, "group": 4, "old": "rising"}
    common = {"method": method, "optimizer": {"lr": 3e-3}, "chain": {"steps": 4, "kernel": ODE}}
    folders = []
    for name, first in (("whole", 6), ("broken", 3)):
        (tmp_path / name).mkdir()
        raw = toy.experiment(tmp_path / name, **common, budget={"iterations": first})
        raw["eval"] = {"every": 0, "samples": 4}
        folders.append(train(parse.parse(raw)).folder)
    whole, broken = folders
    if forgets:
        file = broken / "checkpoints/3/state.pt"
        state = torch.load(file, weights_only=True)
        state["kept"]["old"]["values"] = [v + 0.1 for v in state["kept"]["old"]["values"]]
        torch.save(state, file)
    config = broken / "config.yaml"
    config.write_text(config.read_text().replace("iterations: 3", "iterations: 6"))
    train(config)
    found = largest_difference(*(weights(f, 6)["parameters"] for f in (whole, broken)))
    assert (found == 0) != forgets


# -- learning --------------------------------------------------------------------------------------

PICTURES = {"groups": 8, "group": 16, "updates": 2, "advantage": "group", "advantage_clip": 2.0}


@pytest.mark.parametrize("form", ["x0", "plain"])
@pytest.mark.parametrize("right", [True, False])
def test_bright_prompts_become_white_and_dark_ones_black(tmp_path, form, right):
    raw = toy.experiment(
        tmp_path,
        chain={"steps": 4, "kernel": HEUN},
        method={"name": "diffusion_nft", **PICTURES, "form": form, "b": 0.5},
        optimizer={"lr": 1e-2},
        eval={"every": 0, "samples": 64},
        reward={"tests.toy:brightness": 1.0 if right else -1.0},
        budget={"iterations": 40},
    )
    result = train(parse.parse(raw))
    assert abs(result.before["reward/brightness"]) < 0.05
    after = result.after["reward/brightness"]
    assert after > 0.15 if right else after < -0.1, "control: the reward's sign is turned"


BY_VALUE = {
    **{"groups": 64, "group": 1, "updates": 8, "epochs": 2, "b": 1.0, "advantage": "critic"},
    "critic": {"gamma": 0.8, "epochs": 20},
}
JUDGES = {"group": ({"group": 8}, 3e-3), "critic": (BY_VALUE, 1e-3)}


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("right", [True, False])
def test_a_slow_point_learns_to_reach_its_goal(tmp_path, right, judge):
    settings, rate = JUDGES[judge]
    raw = toy_control.experiment(
        tmp_path,
        policy={"name": "mlp", "pretrained": toy_control.cloned(tmp_path, family="vp")},
        task={"name": "tests.toy_control:Point" if right else f"{Turned.__module__}:Turned"},
        chain={"steps": 4, "kernel": ODE},
        method={"name": "diffusion_nft", **PICTURES, "form": "plain", "b": 0.3, **settings},
        optimizer={"lr": rate},
        eval={"every": 0, "episodes": 40},
        environments=40,
        budget={"iterations": 30 if right else 15},
    )
    result = train(parse.parse(raw))
    before, after = result.before["success_rate"], result.after["success_rate"]
    assert after > before + 0.2 if right else after <= before, (before, after)


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"mode": "some"}, "mode is 'some'"),
        ({"form": "y"}, "form is 'y'"),
        ({"old": "new"}, "old is 'new'"),
        ({"b": 0.0}, "b is 0.0"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"group": 1}, "group is 1"),
        ({"times": 0}, "times is 0"),
        ({"advantage": "critic", "combine": "z_sum"}, "leave combine at sum"),
        ({"advantage": "best"}, "advantage is 'best'"),
        ({"groups": 5, "updates": 2}, "groups is 5"),
    ],
)
def test_settings_that_mean_nothing_are_one_sentence(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DiffusionNFT(**wrong)


def test_guidance_is_refused(tmp_path):
    run, method, *_ = stand(tmp_path / "run")
    run.policy = replace(run.policy, guidance=2.0)
    with pytest.raises(ConfigError, match=r"chain.guidance is 2"):
        method.train(run)


def test_a_head_that_amplifies_x0_takes_the_plain_form(tmp_path):
    raw = toy_control.experiment(
        tmp_path, chain={"steps": 4, "kernel": ODE}, method={"name": "diffusion_nft"}
    )
    run, method = prepare(parse.parse(raw), tmp_path / "run", Processes(peers(1)[0]))
    with pytest.raises(ConfigError, match="set form to plain"):
        method.require_teachable(run.policy)
    DiffusionNFT(form="plain").require_teachable(run.policy)
