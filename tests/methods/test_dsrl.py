"""DSRL (arXiv 2506.15799) where everything is known: g(s, z) = mu + s z and a reward -(a - a*)^2.

The best noise is (a* - mu) / s, or the end of the range that is nearer to it.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Condition, Prediction
from genpolicy.config.errors import ConfigError
from genpolicy.learning.critic import Standard
from genpolicy.methods.dsrl import DSRL, _Steering
from genpolicy.policy.parts.learned_start import LearnedStart
from genpolicy.policy.parts.noise_actor import NoiseActor
from genpolicy.training.run import Run
from tests import one_step

BOUND, SLOPE = 1.5, 0.4
SMALL = {
    "practice": {"first": 100, "episodes": 10},
    "critic": {"first": 200, "updates": 100, "members": 2, "hidden": 32, "lr": 3e-3, "batch": 64},
    "lr": 3e-3,
    "batch": 64,
}


class Known:
    """Q(s, a) = -(a - a*)^2 as a critic of one network, [1,B]."""

    def __init__(self, best: float) -> None:
        self.best = best
        self.scale = Standard(2)

    def __call__(self, features: Tensor, event: Tensor) -> Tensor:
        return -(event.flatten(1) - self.best).square().T


def prepared(folder: Path, mean: float, **settings: Any) -> tuple[Run, DSRL]:
    """A run on the toy of one decision whose policy is mean + SLOPE z, in one step."""
    kept = {"samples": 4} if settings.get("form", "na") == "na" else {}
    method = {"name": "dsrl", "bound": BOUND, **SMALL, **kept, **settings}
    run, built = one_step.prepared(
        folder,
        method=method,
        chain={"steps": 1, "kernel": one_step.ODE},
        budget={"iterations": 3},
    )
    model: Any = run.policy.model

    def denoise(x: Tensor, t: Tensor, condition: Condition) -> Prediction:
        return Prediction(mean + SLOPE * x, x)

    model.denoise = denoise
    assert isinstance(built, DSRL)
    return run, built


def steered(folder: Path, mean: float, form: str, **settings: Any) -> tuple[Run, _Steering]:
    """The same after it has learned, and what it has learned with. Form sac learns all of it from
    its episodes; form na is given Q(s, a), so that what is seen is what it makes of it.
    """
    folder.mkdir(exist_ok=True)
    run, built = prepared(folder, mean, form=form, **settings)
    steering = _Steering(built, run)
    if form == "na":
        known: Any = Known(best_action(run))
        learned: Any = lambda following: None  # noqa: E731
        steering.world.critic.q, steering.world.learn = known, learned
    run.spent.iteration = 0
    with run:
        steering.train()
    return run, steering


def best_action(run: Run) -> float:
    """a* as the chain has it."""
    model: Any = run.policy.model
    return float(model.event(torch.full((1, 1, 1), one_step.MODE)))


def best_noise(run: Run, mean: float) -> float:
    """(a* - mu) / s."""
    return (best_action(run) - mean) / SLOPE


def noise(run: Run, steering: _Steering) -> Tensor:
    """The mode of z at some views."""
    actor = run.policy.parts["start"]
    assert isinstance(actor, NoiseActor)
    return actor.z(steering.world.experience.features[:50]).mode.detach().flatten()


@pytest.mark.parametrize("form", ["na", "sac"])
def test_the_actor_finds_the_best_noise(tmp_path: Path, form: str) -> None:
    run, steering = steered(tmp_path, 0.6, form)
    best = best_noise(run, 0.6)
    assert 0.6 < best < 1.1
    z = noise(run, steering)
    assert float((z - best).abs().mean()) < 0.2
    assert float((z + best).abs().mean()) > 1.0, "control: the other sign"
    if form == "sac":
        return

    # noise aliasing: Q_z(s, z) = Q(s, g(s, z)) where noises are drawn
    z = torch.linspace(-BOUND, BOUND, 31)[:, None]
    seen = steering.world.experience.features[:1].expand(31, -1)
    with torch.no_grad():
        found = steering.q_z(seen, z)
    expected = -(0.6 + SLOPE * z.flatten() - best_action(run)).square()
    spread = float(expected.max() - expected.min())
    error, wrong = ((q - expected).square().mean().sqrt() for q in (found, found.flip(1)))
    assert float(error) < 0.05 * spread
    assert float(wrong) > 0.3 * spread, "control: the sign of the noise turned around"


@pytest.mark.parametrize("form", ["na", "sac"])
def test_out_of_reach_it_goes_to_the_end_of_its_range(tmp_path: Path, form: str) -> None:
    run, steering = steered(tmp_path, -0.5, form)
    assert best_noise(run, -0.5) > 3
    z = noise(run, steering)
    assert float(z.max()) <= BOUND
    assert float(z.mean()) > 0.8 * BOUND


def test_what_is_carried_out_and_judged_is_what_the_sampler_makes_of_the_noise(
    tmp_path: Path,
) -> None:
    """The target's actions come of the actor's noise; half of the noises that Q_z learns from are
    the actor's, inside its range, and half N(0, I), each with the value of its own action.
    """
    run, built = prepared(tmp_path, 0.6)
    steering = _Steering(built, run)
    known: Any = Known(best_action(run))
    steering.world.critic.q = known
    run.attach(start=steering.actor)
    experience, views = steering.world.experience, torch.arange(built.critic.batch)
    features = experience.features[views]
    first, again = (steering._carried_out(views, features).flatten() for _ in range(2))
    assert float(((first - 0.6) / SLOPE).abs().max()) <= BOUND
    assert not torch.equal(first, again), "each time that it is asked other noise is drawn"
    with torch.no_grad():
        rows = torch.arange(built.batch)
        z, worth = steering._aliased(rows, 0)
    action = 0.6 + SLOPE * z.flatten()
    assert torch.allclose(worth, -(action - best_action(run)).square(), atol=1e-5)
    assert float(z[::2].abs().max()) <= BOUND < float(z[1::2].abs().max())
    assert float(z[1::2].std()) == pytest.approx(1.0, abs=0.2)
    plain, kept = steering.world.samples.starts(experience.replay.now[rows]), z[1::2]
    assert bool((plain[1::2] == kept[:, None]).any(1).all()), "and these are kept"


def test_numbers_that_are_padding_count_in_no_entropy(tmp_path: Path) -> None:
    """The actor's target is d (log bound - 1/2) of the numbers that its critic sees."""
    found = {}
    for padded in (False, True):
        (tmp_path / str(padded)).mkdir()
        policy = {**one_step.POLICIES["flow"]["policy"], "chunk": 2}
        run, built = one_step.prepared(
            tmp_path / str(padded), policy=policy, method={"name": "dsrl", **SMALL}
        )
        if padded:
            model: Any = run.policy.model
            model.scored = lambda value: value[:, :1]
        steering = _Steering(built, run)
        steering._begin()
        steering.world.updates = 1
        steering._steer()
        found[padded] = float(run.metrics.numbers["actor/entropy"][0]), steering.entropy.target
    assert found[False][1] == pytest.approx(2 * (math.log(BOUND) - 0.5))
    assert found[True] == pytest.approx([value / 2 for value in found[False]], abs=0.1)


def test_actions_are_a_function_of_noise_alone(tmp_path: Path) -> None:
    """A chain with noise of its own is refused in one sentence, before any work."""
    kernel = {"name": "ddim", "eta": 1.0}
    for name, refused in (("ode", False), ("noisy", True)):
        (tmp_path / name).mkdir()
        chain = {"steps": 4, "kernel": kernel if refused else one_step.ODE}
        policy = one_step.POLICIES["diffusion"]["policy"]
        run, built = one_step.prepared(
            tmp_path / name, "diffusion", policy=policy, chain=chain, method={"name": "dsrl"}
        )
        if not refused:
            _Steering(built, run)
            continue
        with pytest.raises(ConfigError, match="the chain draws noise of its own") as raised:
            _Steering(built, run)
        assert "\n" not in str(raised.value)


def test_a_target_that_no_entropy_can_reach_is_refused() -> None:
    for target in (math.inf, -math.inf):
        with pytest.raises(ConfigError, match=r"target is .*inf"):
            DSRL(target=target)
    assert DSRL(target=-3.0).target == -3.0, "control"


def test_form_sac_without_recorded_noises_is_refused(tmp_path: Path) -> None:
    """Demonstrations have none; form na learns from them all the same."""
    for form in ("na", "sac"):
        (tmp_path / form).mkdir()
        settings = {**SMALL, "practice": {"first": 0, "episodes": 4}}
        settings["critic"] = {**SMALL["critic"], "first": 2, "updates": 2}
        run, built = prepared(tmp_path / form, 0.6, form=form, **settings)
        run.spent.iteration = 0
        with run:
            if form == "na":
                built.train(run)
                continue
            run.iterations = pytest.fail  # what is wrong is told before the first evaluation
            with pytest.raises(ConfigError, match="form sac learns from recorded noises") as raised:
                built.train(run)
        assert "\n" not in str(raised.value)


def test_a_policy_that_was_steered_before_goes_on(tmp_path: Path) -> None:
    run, built = prepared(tmp_path, 0.6)
    model = run.policy.model
    own = NoiseActor(run.features, model.event_shape, BOUND)
    run.policy = run.policy.attach("start", own)
    assert _Steering(built, run).actor is own, "control"


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (lambda f, shape: NoiseActor(f, shape, 2.0), "bound is 1.5, and .* noise_actor has 2"),
        (lambda f, shape: LearnedStart(f, shape), "came with a learned_start"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, start: Any, said: str) -> None:
    run, built = prepared(tmp_path, 0.6)
    other = start(run.features, tuple(run.policy.model.event_shape))
    run.policy = run.policy.attach("start", other)
    with pytest.raises(ConfigError, match=said) as raised:
        _Steering(built, run)
    assert "\n" not in str(raised.value)


def test_sac_holds_down_values_of_noises_and_not_of_actions(tmp_path: Path) -> None:
    """With Cal-QL's term: what the policy samples are its noises, as what is recorded."""
    critic: Any = {**SMALL["critic"], "kind": "cal_ql"}
    run, built = prepared(tmp_path, 0.6, form="sac", critic=critic, samples=4)
    steering = _Steering(built, run)
    steering.world.episodes.gather()
    asked: list[Any] = []

    def learn(replay: Any, *rest: Any) -> None:
        asked.extend([replay, rest[-1]])

    watched: Any = learn
    steering.world.critic.learn = watched
    steering.world.updates = 0
    steering._learn_noise()
    replay, samples = asked
    known = steering.world.experience.replay.start.isfinite().flatten(1).all(1)
    assert torch.equal(replay.event, steering.world.experience.replay.start[known])
    views = torch.arange(5)
    assert torch.equal(samples(views), steering.world.samples.starts(views))
    assert not torch.equal(samples(views), steering.world.samples.at(views)), "control"
