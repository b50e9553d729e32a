"""FIND: its gradient and its calibration in a linear world whose answers are known, the pairing of
noise and reward, the bounds of a start, and that it improves a policy whose network stays.

The linear world: x_0 = a z + b, r = -|x_0 - x*|^2, so that for z ~ N(mu, sigma^2)

    J = E r = -|a mu + b - x*|^2 - a^2 |sigma|^2
    dJ/dmu = -2 a (a mu + b - x*),  dJ/dsigma = -2 a^2 sigma
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.chain.prior import Bounds, StandardNormal, bounded, typical
from genpolicy.chain.values import Gaussian
from genpolicy.cli.main import main
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.evaluation import metrics_file, pictures
from genpolicy.evaluation.prompt_scores import draw
from genpolicy.learning.critic import StateValue
from genpolicy.methods.find import ENTROPY, FIND, _inputs, _Steering
from genpolicy.methods.parts.drawn_starts import DrawnStarts, History
from genpolicy.models.toy import Toy
from genpolicy.policy.files import load
from genpolicy.policy.parts.learned_start import LearnedStart
from genpolicy.policy.parts.table_start import TableStart
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from tests import toy, toy_control
from tests.invariants.test_control_run import same_state
from tests.invariants.test_same_run import largest_difference, weights
from tests.peers import alike, peers, together
from tests.two_devices import DEVICE, TwoDevices

torch.set_num_threads(1)
A, B, GOAL = 1.5, 0.4, torch.tensor([1.0, -0.5, 0.2])
MU, SIGMA = torch.tensor([0.3, -0.2, 0.5]), torch.tensor([0.9, 0.7, 1.1])
ODE = {"steps": 4, "kernel": {"name": "ddim", "eta": 0.0}}
LEARNS = {"name": "find", "groups": 8, "group": 16, "lr": 1e-2, "history": 0}
FORMS = {"amortised": {}, "per prompt": {"prompts": 4}}


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """Draws no curves: they are tested elsewhere."""
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reward(z: Tensor) -> Tensor:
    return -(A * z + B - GOAL).square().sum(1)


def expected(mu: Tensor, sigma: Tensor) -> Tensor:
    return -(A * mu + B - GOAL).square().sum(-1) - A**2 * sigma.square().sum(-1)


# The gradient


def gradients(z: Tensor, r: Tensor, method: FIND) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the loss in mu and sigma, each of n draws, and their standard errors'
    largest value: [3], [3], [].
    """
    mu = MU.expand_as(z).clone().requires_grad_()
    sigma = SIGMA.expand_as(z).clone().requires_grad_()
    old = Gaussian(mu.detach(), sigma.detach())
    loss, _ = method.loss(Gaussian(mu, sigma), old, z, r - r.mean())
    found = torch.autograd.grad(loss.sum(), (mu, sigma))
    error = max(float((g.std(0) / len(z) ** 0.5).max()) for g in found)
    return found[0].mean(0), found[1].mean(0), torch.tensor(error)


def off_by(z: Tensor, r: Tensor) -> float:
    """How many standard errors the gradient is from the closed form's, at most."""
    of_mu, of_sigma, error = gradients(z, r, FIND(beta=0.0))
    right_mu, right_sigma = 2 * A * (A * MU + B - GOAL), 2 * A**2 * SIGMA
    return float(max((of_mu - right_mu).abs().max(), (of_sigma - right_sigma).abs().max()) / error)


def test_the_gradient_is_the_closed_form_of_a_linear_world():
    z = MU + SIGMA * torch.randn(200_000, 3, generator=generator())
    assert off_by(z, reward(z)) < 4
    stale = MU + SIGMA * torch.randn(200_000, 3, generator=generator(1))
    assert off_by(z, reward(stale)) > 20, "control: the reward of another draw"


def test_the_kl_has_its_weight_and_vanishes_at_the_standard_normal():
    z, none = torch.zeros(1, 3), torch.zeros(1)
    here = Gaussian(MU[None], SIGMA[None])
    exact = 0.5 * (MU**2 + SIGMA**2 - 1 - 2 * SIGMA.log()).sum()
    assert torch.allclose(FIND(beta=0.3).loss(here, here, z, none)[0], 0.3 * exact)
    standard = Gaussian(torch.zeros(1, 3), torch.ones(1, 3))
    assert FIND(beta=0.3).loss(standard, standard, z, none)[0] == 0


def test_a_bad_draw_that_overshot_is_pulled_back_and_a_good_one_is_left():
    """PPO's min: the published clamp alone has no gradient on either side."""
    old = Gaussian(torch.zeros(2, 1), torch.ones(2, 1))
    mu = torch.full((2, 1), 1.0, requires_grad=True)  # the ratio of z = 2 is exp(1.5)
    z = torch.full((2, 1), 2.0)
    loss, metrics = FIND(beta=0.0).loss(Gaussian(mu, old.std), old, z, torch.tensor([1.0, -1.0]))
    (found,) = torch.autograd.grad(loss.sum(), mu)
    assert found[0] == 0
    assert found[1] > 1
    assert metrics["clip_fraction"].tolist() == [1, 0]


def descended(low: float, band: float | None) -> tuple[Tensor, Tensor]:
    """mu and sigma after 150 iterations of the linear world, [3] each."""
    start, method = LearnedStart(1, (3,), Bounds(low=low, band=band)), FIND(beta=0.0)
    optimizer = torch.optim.Adam(start.parameters(), lr=0.03)
    noise, seen = generator(), torch.zeros(128, 1)
    for _ in range(150):
        with torch.no_grad():
            old = start(seen, 1.0)
            z = old.sample(torch.randn(128, 3, generator=noise))
            r = reward(z)
        loss, _ = method.loss(start(seen, 1.0), old, z, (r - r.mean()) / r.std())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        end = start(seen[:1], 1.0)
    return end.mean[0], end.std[0]


def test_it_goes_to_the_optimum_and_the_least_std_stops_the_collapse():
    mu, sigma = descended(low=-4.0, band=None)
    assert torch.allclose(mu, (GOAL - B) / A, atol=0.05)
    assert float(sigma.max()) < 0.1, "control: nothing keeps it from collapsing"
    _, bounded = descended(low=math.log(0.3), band=None)
    assert float(bounded.min()) >= 0.3 - 1e-6
    mu, sigma = descended(low=math.log(0.3), band=0.1)
    assert float(sigma.min()) >= 0.3 - 1e-6
    assert 0.9 - 1e-5 <= float((mu**2 + sigma**2).mean()) <= 1.1 + 1e-5


# The typical set


def test_the_typical_set_holds_whatever_the_network_says_and_spares_the_std():
    draw = generator()
    size = torch.logspace(-2, 1, 40)[:, None, None]
    mean = (size * torch.randn(40, 2, 8, generator=draw)).requires_grad_()
    log_std = (0.7 * torch.randn(40, 2, 8, generator=draw) - 1).requires_grad_()
    std = bounded(log_std, -10.0, 0.5 * math.log(1.1)).exp()
    kept_mean, kept_std = typical(mean, std, 0.1)

    def norm(mean: Tensor, std: Tensor) -> Tensor:
        return (mean.square() + std.square()).flatten(1).mean(1)

    inside = norm(kept_mean, kept_std).detach()
    assert float(inside.min()) >= 0.9 - 1e-4
    assert float(inside.max()) <= 1.1 + 1e-4
    assert bool((kept_std >= std * (1 - 1e-5)).all())
    outside = norm(mean, std).detach()
    assert float(outside.min()) < 0.9, "control"
    assert float(outside.max()) > 1.1, "control"
    (kept_mean.sum() + kept_std.sum()).backward()
    assert bool(mean.grad.isfinite().all())
    assert bool(log_std.grad.isfinite().all())


def test_inside_the_band_nothing_changes_and_the_standard_normal_learns():
    mean = torch.zeros(2, 6, requires_grad=True)
    std = torch.ones(2, 6, requires_grad=True)
    kept_mean, kept_std = typical(mean, std, 0.1)
    assert torch.equal(kept_mean, mean)
    assert torch.equal(kept_std, std)
    (kept_mean.sum() + kept_std.sum()).backward()
    assert torch.equal(mean.grad, torch.ones(2, 6))
    assert torch.equal(std.grad, torch.ones(2, 6))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("band", [None, 0.1])
@pytest.mark.parametrize("past", [-3.0, 0.5])
def test_a_sigma_past_its_bound_comes_back(past, band, cut):
    """Its parameter went past a bound on an earlier update, and now asks for the standard normal's.
    Where it is cut there is no gradient: the control.
    """
    log_std = torch.full((1, 4), past, requires_grad=True)
    bounds, mean = Bounds(low=-1.2, band=band, cut=cut), torch.full((1, 4), 0.95)
    optimizer = torch.optim.Adam([log_std], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (bounds(mean, log_std)[1].log() ** 2).sum().backward()
        optimizer.step()
    assert (float(log_std.detach().abs().max()) < 0.1) is not cut


def test_the_bound_keeps_zero_and_its_slope():
    value = torch.tensor([-50.0, -0.01, 0.0, 0.01, 50.0], requires_grad=True)
    kept = bounded(value, -1.2, 0.3)
    assert kept.detach()[[0, 2, 4]].tolist() == pytest.approx([-1.2, 0.0, 0.3], abs=1e-3)
    kept.sum().backward()
    assert value.grad[1:4].tolist() == pytest.approx([1.0, 1.0, 1.0], abs=2e-3)


# The calibration


def calibrated(rewards: Tensor, inputs: Tensor) -> StateValue:
    """g, fitted to rewards [n]."""
    torch.manual_seed(0)
    g = StateValue(inputs.shape[1], 64)
    optimizer = torch.optim.Adam(g.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (g(inputs) - rewards).square().mean().backward()
        optimizer.step()
    return g


def test_calibration_says_what_a_distribution_is_worth_and_quiets_the_gradient():
    """Four prompts whose rewards differ by their own constants; distributions on a line. g comes
    within a tenth of the rewards' std of E r, and the gradient's variance falls at least eightfold.
    """
    draw, worth = generator(), torch.tensor([-30.0, -10.0, 10.0, 30.0])
    prompt = torch.randint(4, (1024,), generator=draw)
    features = torch.nn.functional.one_hot(prompt, 4).float()
    mu = MU * torch.rand(1024, 1, generator=draw)
    sigma = SIGMA.expand_as(mu)
    z = mu + sigma * torch.randn(1024, 3, generator=draw)
    r = reward(z) + worth[prompt]
    inputs = _inputs(features, Gaussian(mu, sigma))
    g = calibrated(r, inputs)

    # at a distribution that it was not shown
    there = Gaussian((0.5 * MU).expand(4, 3), SIGMA.expand(4, 3))
    said = g(_inputs(torch.eye(4), there)).detach()
    right = expected(0.5 * MU, SIGMA) + worth
    assert float((said - right).abs().max()) < 0.1 * float(r.std())

    def variance(advantage: Tensor) -> float:
        score = (z - mu) / sigma**2
        return float((advantage[:, None] * score).var(0).sum())

    plain = variance(r - r.mean())
    assert variance(r - g(inputs).detach()) < plain / 8
    shuffled = calibrated(r[torch.randperm(1024, generator=draw)], inputs)
    assert variance(r - shuffled(inputs).detach()) > plain / 2, "control"


# The draws


def records(count: int, shift: float = 0.0) -> DrawnStarts:
    features = torch.randn(count, 2, generator=generator())
    mean = torch.full((count, 3), shift)
    z = mean + torch.randn(count, 3, generator=generator(1))
    return DrawnStarts(torch.arange(count), features, z, mean, torch.ones(count, 3), z.sum(1))


def test_draws_of_distributions_that_are_far_are_left_out_and_none_is_kept_too_long():
    start, history = LearnedStart(2, (3,)), History(2)
    for shift in (9.0, 0.1, 2.0):
        history.add(records(5, shift))
    assert [float(draws.mean[0, 0]) for draws in history.kept] == pytest.approx([0.1, 2.0])
    near = history.near(start, 0.5, torch.device("cpu"))  # .015 and 6 nats
    assert [len(draws) for draws in near] == [5, 0]
    none = History(0)
    none.add(records(5))
    assert none.kept == []


def test_draws_of_a_checkpoint_meet_a_start_on_another_device():
    kept, resumed = History(1), History(1)
    kept.add(records(5, 0.1))
    with TwoDevices():
        start = LearnedStart(2, (3,)).to(DEVICE)
        resumed.load_state_dict(kept.state_dict())
        assert [len(draws) for draws in resumed.near(start, 0.5, DEVICE)] == [5]


def test_a_record_keeps_its_row_through_picking_and_joining():
    two = DrawnStarts.cat([records(5), records(4, 1.0)])
    picked = two[torch.tensor([8, 0, 3, 6])]
    assert torch.equal(picked.returns, picked.z.sum(1))
    assert not torch.equal(picked.returns, two[torch.tensor([0, 8, 3, 6])].z.sum(1)), "control"


# In a run


def begun(folder, **method):
    """A run on the toy that has not begun, and its method."""
    raw = toy.experiment(
        folder,
        policy={"name": "toy"},
        chain=ODE,
        threads=1,
        eval={"every": 0, "samples": 8},
        method={**LEARNS, **method},
    )
    (folder / "run").mkdir()
    return prepare(parse.parse(raw), folder / "run", Processes(peers(1)[0]))


@pytest.mark.parametrize("form", FORMS)
def test_every_draw_stands_beside_the_reward_of_its_own_noise(tmp_path, monkeypatch, form):
    """...of this iteration and of those before: the frozen chain, begun at its z, says so again."""
    seen = {}
    monkeypatch.setattr(_Steering, "_tell", lambda self, fresh, draws: seen.update(draws=draws))
    run, method = begun(tmp_path, **FORMS[form], groups=4, group=2, history=3, far=100.0)
    with run:
        method.train(run)
    draws = seen["draws"]
    assert len(draws) == 4 * 8
    model, chain = run.policy.model, run.policy.chain
    conditions = model.encode(Context(toy.PROMPTS))
    prompt = torch.cdist(draws.features, conditions).argmin(1)
    noise = Noise.rows(0, 0, torch.arange(len(draws)), 1)
    with torch.no_grad():
        chains = chain.sample(
            run.policy.denoiser, conditions[prompt], noise, model.event_shape, start=(0, draws.z)
        )
        pictures = model.decode(chains.x0)
    again = toy.brightness(pictures, Context([toy.PROMPTS[p] for p in prompt.tolist()]))
    assert torch.allclose(again, draws.returns, atol=1e-5)
    assert not torch.allclose(again, draws.returns.roll(1), atol=1e-2), "control: another's reward"


def learned(folder, iterations: int = 30, **method):
    raw = toy.experiment(
        folder,
        policy={"name": "toy"},
        chain=ODE,
        threads=1,
        method={**LEARNS, **method},
        budget={"iterations": iterations},
        eval={"every": 0, "samples": 64},
    )
    return train(parse.parse(raw))


@pytest.mark.parametrize("form", FORMS)
def test_it_learns_where_to_begin_and_leaves_the_network_alone(tmp_path, form):
    result = learned(tmp_path, **FORMS[form])
    assert abs(result.before["reward/brightness"]) < 0.02
    assert result.after["reward/brightness"] > 0.05
    network = load(result.folder).model.trainable()
    assert all(torch.equal(network[name], p) for name, p in Toy().trainable().items())
    lines = [line for line in metrics_file.read(result.folder) if "start/entropy" in line]
    assert all(0.9 - 1e-4 < line["start/mean_square"] < 1.1 + 1e-4 for line in lines)
    assert all(line["start/entropy"] >= ENTROPY + math.log(0.3) for line in lines)
    assert lines[-1]["start/entropy"] < lines[0]["start/entropy"] < ENTROPY + 0.05


def test_control_with_the_reward_of_an_earlier_noise_it_learns_nothing(tmp_path, monkeypatch):
    """The released code's pairing: the newest noise beside the reward of the iteration before."""
    honest, before = _Steering._draws, []

    def stale(self, rollout, returns):
        before.append(returns)
        return honest(self, rollout, before[max(len(before) - 2, 0)])

    monkeypatch.setattr(_Steering, "_draws", stale)
    assert learned(tmp_path).after["reward/brightness"] < 0.025


def test_an_iteration_ends_where_the_start_has_gone_far_enough(tmp_path):
    for far, updates in ((1e-12, 2), (1e9, 16)):
        folder = tmp_path / str(updates)
        folder.mkdir()
        learned(folder, 2, far=far, epochs=4, minibatch=64)
        state = weights(folder / "run", 2)
        assert state["kept"]["start_optimizer"]["updates"] == updates


def test_a_prompt_without_a_row_starts_from_the_standard_normal(tmp_path):
    result = learned(tmp_path, 3, prompts=2)
    start = load(result.folder).parts["start"]
    assert isinstance(start, TableStart)
    assert len(start.keys) == 2
    policy = load(result.folder)
    features = policy.model.features(policy.model.encode(Context([*toy.PROMPTS, "another"])))
    with torch.no_grad():
        drawn = start(features, 2.0)
    moved = (drawn.mean.abs().flatten(1).amax(1) > 0).tolist()
    known = [float((start.keys - f).norm(dim=1).min()) < 1e-5 for f in features]
    assert moved == known
    assert sum(known) == 2
    other = known.index(False)
    assert bool((drawn.std[other] == 2).all())
    # a rounding of its features does not hide a prompt
    near = start(features * (1 + 1e-5), 2.0)
    assert torch.allclose(near.mean, drawn.mean)


# One run, however it is run


PLACES = {
    "amortised": (toy.experiment, {}),
    "per prompt": (toy.experiment, {"prompts": 3}),
    "robots": (toy_control.experiment, {}),
}
SMALL = {"name": "find", "groups": 4, "group": 2, "history": 2, "minibatch": 8, "far": 100.0}


def written(folder, place, **sections):
    experiment, method = PLACES[place]
    folder.mkdir()
    robots = place == "robots"
    raw = experiment(
        folder,
        chain=ODE,
        threads=1,
        method={**SMALL, **method},
        budget={"iterations": 4},
        checkpoint_every=2,
        eval={"every": 0, **({"episodes": 4} if robots else {"samples": 4})},
        **sections,
    )
    raw["policy"] |= {"family": "flow"} if robots else {"name": "toy"}
    return raw


def acted(policy, place) -> Tensor:
    rows = torch.arange(4)
    context = Context(list(toy.PROMPTS))
    if place == "robots":
        context, _, _ = toy_control.Recorded(episodes=4).rows(rows, policy.model.history, range(1))
    with torch.no_grad():
        return policy.sample(policy.model.encode(context), Noise.rows(0, 7, rows, 1)).x0


@pytest.mark.parametrize("place", PLACES)
def test_saved_loaded_and_resumed_it_is_the_same_to_the_bit(tmp_path, place):
    train(parse.parse(written(tmp_path / "whole", place)))
    raw = written(tmp_path / "broken", place)
    train(parse.parse({**raw, "budget": {"iterations": 2}}))
    half = load(tmp_path / "broken/run")
    resumed = tmp_path / "broken/run/config.yaml"
    resumed.write_text(resumed.read_text().replace("iterations: 2", "iterations: 4"))
    train(resumed)
    a, b = (weights(tmp_path / name / "run", 4) for name in ("whole", "broken"))
    assert len(a["kept"]["history"]) == 2
    a["kept"].pop("deployment"), b["kept"].pop("deployment")  # the stop was examined
    found = same_state(a, b)
    assert all(found.values()), found
    policies = [load(tmp_path / name / "run") for name in ("whole", "broken")]
    assert torch.equal(*(acted(policy, place) for policy in policies))
    assert not torch.equal(acted(half, place), acted(policies[0], place)), "control"


@pytest.mark.parametrize("form", FORMS)
def test_sample_draws_from_the_learned_start(tmp_path, form):
    result = learned(tmp_path, 6, **FORMS[form])
    prompts = tmp_path / "prompts.txt"
    asked = ["--prompts", str(prompts), "--n", "2", "--seed", "5", "--out", str(tmp_path / "out")]
    assert main(["sample", str(result.folder), *asked]) == 0
    found = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "out").glob("0*.png"))]
    policy = load(result.folder)
    assert np.array_equal(np.stack(found), pictures.pixels(draw(policy, toy.PROMPTS, 2, 5)))
    bare = replace(policy, chain=replace(policy.chain, prior=StandardNormal()))
    control = pictures.pixels(draw(bare, toy.PROMPTS, 2, 5))
    assert np.abs(np.stack(found).astype(int) - control).max() > 10


def test_a_start_of_an_older_version_draws_as_it_did(tmp_path):
    """Before there was a band, and before its bounds were smooth."""
    model, features = Toy(), torch.randn(3, 8, generator=generator(1))
    start = LearnedStart(8, model.event_shape, Bounds(low=-1.2))
    for parameter in start.parameters():
        torch.nn.init.normal_(parameter, generator=generator())
    start.save(tmp_path)
    file = tmp_path / "start.json"
    described = json.loads(file.read_text())
    del described["band"], described["cut"]
    file.write_text(json.dumps(described))
    drawn = LearnedStart.load(tmp_path, model)(features, 1.0)
    shape = (3, *model.event_shape)
    assert torch.equal(drawn.mean, start.mean(features).view(shape))
    assert torch.equal(drawn.std, start.log_std(features).view(shape).clamp(-1.2, 0.3).exp())
    assert not torch.equal(drawn.std, start(features, 1.0).std), "control"


@pytest.mark.parametrize("place", PLACES)
def test_two_processes_learn_the_start_of_one(tmp_path, monkeypatch, place):
    monkeypatch.setattr("genpolicy.training.loop.StopRequest", NoSignals)
    monkeypatch.setattr("genpolicy.methods.parts.baseline.StateValue", alike)
    starts = []
    for count in (1, 2):
        raw = written(tmp_path / str(count), place)
        accelerators = peers(count)
        folder = tmp_path / str(count) / "run"
        folder.mkdir()
        built = [prepare(parse.parse(raw), folder, Processes(each)) for each in accelerators]
        together([lambda b=b: b[1].train(b[0]) for b in built], accelerators)
        found = [list(run.policy.parts["start"].parameters()) for run, _ in built]
        assert largest_difference(found[0], found[-1]) == 0
        starts.append(found[0])
        for run, _ in built:
            run.evaluator.close()
    moved = max(float(p.abs().max()) for p in starts[0])
    assert moved > 1e-3
    assert largest_difference(*starts) < 1e-3 * moved


class NoSignals:
    """Stands in for `StopRequest` in a thread, which can't receive any."""

    asked = False

    def __init__(self, say) -> None: ...

    def __enter__(self) -> "NoSignals":
        return self

    def __exit__(self, *_: object) -> None: ...


# What it refuses


def test_what_does_not_fit_is_one_sentence(tmp_path):
    raw = written(tmp_path / "robots", "robots")
    raw["method"]["prompts"] = 3
    with pytest.raises(ConfigError, match="a robot sees something else in every decision"):
        train(parse.parse(raw))
    first = written(tmp_path / "first", "per prompt")
    train(parse.parse({**first, "budget": {"iterations": 1}}))
    second = written(tmp_path / "second", "amortised")
    second["policy"] = {"name": "toy", "pretrained": str(tmp_path / "first/run/policy")}
    with pytest.raises(ConfigError, match="came with a table_start, and prompts = None asks for"):
        train(parse.parse(second))
    second["method"]["prompts"] = 2
    with pytest.raises(ConfigError, match="a table of 3 starts, which are not those of the task"):
        train(parse.parse(second))
    second["method"]["prompts"] = 3
    train(parse.parse({**second, "budget": {"iterations": 1}}))  # control
    with pytest.raises(ValueError, match="two rows of a table of starts have the same features"):
        TableStart(torch.ones(2, 3), (2,))
    for wrong in (
        {"band": 1.0},
        {"least_std": 1.0},
        {"clip": 0.0},
        {"history": -1},
        {"reduce": "none"},
    ):
        with pytest.raises(ConfigError, match=f"method find: {next(iter(wrong))} is"):
            FIND(**wrong)
