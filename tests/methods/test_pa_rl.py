"""PA-RL (arXiv 2412.06685): which chunk is imitated, and what becomes of a policy that imitates it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config.errors import ConfigError
from genpolicy.learning.selection import drawn, standardised
from genpolicy.methods.pa_rl import PARL, _Improvement
from genpolicy.methods.parts.imitation import Imitation, recorded
from genpolicy.policy.parts.best_of import BestOf
from genpolicy.policy.parts.editor import Editor
from genpolicy.policy.parts.refiner import Refiner
from tests import one_step

N, K = 32, 5
GRID = 2000
Q = Callable[[Tensor, Tensor], Tensor]


def linear(features: Tensor, event: Tensor) -> Tensor:
    """Q = a."""
    return event.flatten(1).sum(1)


def peaked(features: Tensor, event: Tensor) -> Tensor:
    """Q = -(a - 1)^2, of events whose range is [-1, 1]."""
    return -(event.flatten(1).sum(1) - 1).square()


def flat(features: Tensor, event: Tensor) -> Tensor:
    """A critic that knows nothing."""
    return 0 * event.flatten(1).sum(1)


def improvement(folder: Path, q: Q, kind: str = "flow", **settings: Any) -> _Improvement:
    """PA-RL on the toy of one decision, after its first episodes, with ``q`` in the place of what
    it would have learned.
    """
    own = {"practice": {"first": 0}, "critic": {"hidden": 8, "members": 1, "subset": 1}}
    method = {"name": "pa_rl", "samples": N, "best": K, "updates": 40, "batch": 128, **own}
    run, built = one_step.prepared(
        folder, kind, method={**method, **settings}, optimizer={"lr": 3e-3, "weight_decay": 0.0}
    )
    assert isinstance(built, PARL)
    made = _Improvement(built, run)
    made._begin()
    known: Any = q
    made.critic.part = known
    run.policy = replace(run.policy, judge=q)
    return made


# -- the target of distillation --------------------------------------------------------------------


def uniform_samples(made: _Improvement) -> Tensor:
    """N samples from U(-1, 1) in the place of the policy's, at every view, [F,N,1,1]."""
    views = len(made.experience.replay.views)
    samples = 2 * torch.rand(views, N, 1, 1, generator=torch.Generator().manual_seed(1)) - 1
    cached: Any = made.world.samples
    cached.at = samples.__getitem__
    return samples


def targets(made: _Improvement, row: int) -> Tensor:
    """What is imitated at one recorded decision, by a grid of uniform numbers, [GRID]."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    return made.target(torch.full((GRID,), row), uniform).flatten()


def candidates(made: _Improvement, samples: Tensor, row: int) -> Tensor:
    """By hand: the K - 1 highest of the N samples, and the recorded action, [K]."""
    replay = made.experience.replay
    own = samples[replay.now[row]].flatten()
    return torch.cat([own.sort(descending=True).values[: K - 1], replay.event[row].flatten()])


@pytest.mark.parametrize("row", [0, 1])
def test_the_recorded_action_is_in_the_place_of_the_worst_that_is_kept(tmp_path, row) -> None:
    """Decision 0 was in the wrong mode, 1 in the right one; every candidate is drawn now and then,
    and no other sample.
    """
    made = improvement(tmp_path, linear, temperature=100.0)
    samples = uniform_samples(made)
    expected = candidates(made, samples, row)
    assert torch.allclose(targets(made, row).unique(), expected.unique())
    own = samples[made.experience.replay.now[row]].flatten()
    worst_kept = own.sort(descending=True).values[K - 1]
    assert not torch.isclose(targets(made, row).unique(), worst_kept).any(), "control"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_it_is_drawn_with_a_softmax_of_standardised_values(tmp_path, temperature) -> None:
    made = improvement(tmp_path, linear, temperature=temperature)
    expected = candidates(made, uniform_samples(made), 0)
    p = (standardised(expected[None].double()) / temperature).softmax(1)[0]
    found = targets(made, 0)
    frequency = torch.isclose(found[:, None], expected).double().mean(0)
    assert torch.allclose(frequency, p, atol=2 / GRID)
    assert not torch.allclose(frequency, expected.double().softmax(0), atol=0.02), "control: raw Q"


def test_the_size_of_rewards_does_not_matter(tmp_path: Path) -> None:
    found = []
    for scale in (1.0, 1000.0):
        folder = tmp_path / str(scale)
        folder.mkdir()
        made = improvement(folder, lambda f, e, scale=scale: scale * linear(f, e) - 3)
        uniform_samples(made)
        found.append(targets(made, 0))
    assert torch.equal(*found)
    # the control: the public code's softmax of Q itself is nearly an argmax at the larger scale
    values = candidates(made, uniform_samples(made), 0)[None]
    uniform = (torch.arange(GRID) + 0.5) / GRID
    raw = [drawn((s * values).expand(GRID, -1), uniform) for s in (1, 1000)]
    assert float((raw[0] != raw[1]).double().mean()) > 0.5


def test_candidates_are_refined_before_they_are_drawn(tmp_path: Path) -> None:
    """Each by the local step, in the actions' own units: rate x std^2 x dQ/da."""
    made = improvement(tmp_path, linear, steps=3, rate=0.05)
    samples = uniform_samples(made)
    event = made.experience.replay.event
    step = 0.05 * float(event.std(0, correction=0) ** 2)
    bound = float(event.abs().max())
    assert made.refiner == Refiner(3, pytest.approx(step), -bound, bound, refined=K)
    expected = (candidates(made, samples, 0) + 3 * step).clamp(max=bound)
    assert torch.allclose(targets(made, 0).unique(), expected.unique(), atol=1e-6)
    still = improvement(_made(tmp_path / "still"), linear, steps=0)
    samples = uniform_samples(still)
    assert torch.allclose(targets(still, 0).unique(), candidates(still, samples, 0).unique())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_bounds_are_those_of_what_was_recorded(tmp_path: Path) -> None:
    """...and not 1: a model that scales actions by their std has larger ones."""
    made = improvement(tmp_path, linear, steps=1)
    assert made.refiner.high == pytest.approx(1, abs=1e-4), "control: scaled by their range"
    replay = made.experience.replay
    made.experience._whole = replace(replay, event=2.5 * replay.event)
    made.run.policy = replace(made.run.policy, parts={})
    made.critic.part = BestOf(made.critic.q, 0.0)
    made._begin()
    assert made.refiner.high == pytest.approx(2.5, abs=1e-3)
    assert made.refiner.low == -made.refiner.high


def test_with_one_candidate_it_is_the_recorded_action(tmp_path: Path) -> None:
    made = improvement(tmp_path, linear, best=1)
    uniform_samples(made)
    assert torch.equal(targets(made, 0).unique(), made.experience.replay.event[0].flatten())


# -- the bandit of two modes -----------------------------------------------------------------------


def clone(made: _Improvement, updates: int) -> None:
    """Imitates the data: half of the mass is in each mode."""
    data: Any = made.run.data
    Imitation(made.run, recorded(data, made.run.policy.model), len(data), 128)(updates)
    made.world.changed()


def mass(made: _Improvement) -> float:
    """The share of the policy's samples in the better mode, by 500 of them."""
    policy = replace(made.run.policy, best_of=1, refiner=None)
    rows = torch.arange(500)
    condition = made.experience.conditions[rows % 400]
    with torch.no_grad():
        x0 = policy.sample(condition, Noise.rows(9, 9, rows, 1), keep=(0, 0)).x0
    assert float((x0.abs() > 0.6).double().mean()) > 0.85, "it samples the modes, not between them"
    return float((x0 > 0).double().mean())


def distilled(made: _Improvement, rounds: int) -> list[float]:
    """The mass before and after each round of PA-RL's own distillation."""
    found = [mass(made)]
    for iteration in range(2, rounds + 2):
        made.run.spent.iteration = iteration
        made._distil()
        found.append(mass(made))
    return found


SETTINGS = {"samples": 8, "best": 4, "states": 400}
CLONING = {"diffusion": 400, "flow": 400, "tokens": 100}
"""Updates until each class samples both modes."""


@pytest.mark.parametrize("kind", CLONING)
def test_a_policy_of_two_modes_moves_to_the_better_one(tmp_path: Path, kind: str) -> None:
    made = improvement(tmp_path, peaked, kind, **SETTINGS)
    clone(made, CLONING[kind])
    found = distilled(made, 10)
    assert 0.4 < found[0] < 0.6
    assert max(found) == pytest.approx(found[-1], abs=0.03), "and stays there"
    assert found[-1] > 0.95


CONTROLS: dict[str, tuple[Q, dict[str, Any]]] = {
    "a critic that knows nothing": (flat, {}),
    # k of the N samples would favour the better mode at any temperature, so that all are kept
    "a temperature that tells nothing apart": (peaked, {"best": 8, "temperature": 1e6}),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_control_both_modes_stay(tmp_path: Path, control: str) -> None:
    q, own = CONTROLS[control]
    made = improvement(tmp_path, q, "tokens", **{**SETTINGS, **own})
    clone(made, CLONING["tokens"])
    assert all(0.25 < share < 0.75 for share in distilled(made, 4))


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"best": 9, "samples": 8}, "best is 9; it must be at most 8"),
        ({"temperature": 0.0}, "temperature"),
        ({"rate": 0.0}, "rate"),
        ({"gamma": 1.5}, "gamma"),
    ],
)
def test_settings_that_are_none_are_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        PARL(**settings)
    assert "\n" not in str(raised.value)


def test_a_policy_with_an_editor_is_refused_before_any_work(tmp_path: Path) -> None:
    made = improvement(tmp_path, linear, steps=1)
    run = made.run
    editor = Editor(run.features, 1, size=0.1)
    run.policy = replace(run.policy, parts={}).attach("editor", editor)
    with pytest.raises(ConfigError, match="its editor, would go on to act") as raised:
        _Improvement(made.settings, run)
    assert "\n" not in str(raised.value)


def test_without_a_local_step_that_of_an_earlier_run_ends(tmp_path: Path) -> None:
    """A policy that came with a refiner is moved no longer where ``steps`` is 0."""
    made = improvement(tmp_path, peaked)
    assert "refiner" not in made.run.policy.parts, "a policy that came without one gets none"
    critic = made.run.policy.parts["best_of"]
    assert isinstance(critic, BestOf)
    made.critic.part = critic
    made.run.attach(best_of=critic, refiner=Refiner(7, 0.5, refined=1))
    made._begin()
    refiner = made.run.policy.parts["refiner"]
    assert isinstance(refiner, Refiner)
    assert (refiner.steps, made.run.policy.refined) == (0, K)
