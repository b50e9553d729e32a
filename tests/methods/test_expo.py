"""EXPO (arXiv 2507.07986): edits of at most ``size``, worth more than the best of the samples.

Q = -(a - 1)^2 and a base policy N(0, .1^2): the best edit of every sample is +size.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.config.errors import ConfigError
from genpolicy.methods.expo import EXPO, _Editing
from genpolicy.policy.parts.refiner import Refiner
from genpolicy.policy.policy import ChainPolicy
from tests import one_step

N, SIZE = 8, 0.3


def near_one(features: Tensor, event: Tensor) -> Tensor:
    """Q = -(a - 1)^2."""
    return -(event.flatten(1).sum(1) - 1).square()


def editing(folder: Path, **settings: Any) -> _Editing:
    """EXPO on the toy of one decision after its first episodes; its critic knows Q, and its policy
    samples N(0, .1^2) at every view.
    """
    critic = {"hidden": 8, "members": 1, "subset": 1}
    own = {"samples": N, "edited": N, "size": SIZE, "lr": 3e-3, "batch": 64}
    method = {"name": "expo", "practice": {"first": 0}, "critic": critic, **own, **settings}
    run, built = one_step.prepared(folder, method=method)
    assert isinstance(built, EXPO)
    made = _Editing(built, run)
    made._begin()
    critic, cached = made.world.critic, made.world.samples
    known: Any = lambda features, event: near_one(features, event)[None]  # noqa: E731
    critic.q = known
    views = len(made.world.experience.replay.views)
    drawn = 0.1 * torch.randn(views, N, 1, 1, generator=torch.Generator().manual_seed(1))
    sampled: Any = drawn.__getitem__
    cached.at = sampled
    run.policy = replace(run.policy, judge=near_one)
    return made


def taught(folder: Path, updates: int = 200, **settings: Any) -> _Editing:
    made = editing(folder, **settings)
    made._edit(updates)
    return made


def base(rows: int = 300) -> Tensor:
    """Fresh samples of the base policy, a row's N one after the other."""
    return 0.1 * torch.randn(rows * N, 1, 1, generator=torch.Generator().manual_seed(2))


def picked(policy: ChainPolicy, events: Tensor) -> tuple[Tensor, Tensor]:
    features = torch.zeros(len(events) // N, 1)
    return policy.chosen(features, events)


def test_an_edited_action_is_near_a_sample_and_worth_more_than_the_best(tmp_path: Path) -> None:
    made = taught(tmp_path)
    events = base()
    x0, best = picked(made.run.policy, events)
    distance = (x0 - events[best]).abs()
    assert float(distance.max()) <= SIZE + 1e-6
    plain, _ = picked(replace(made.run.policy, refiner=None), events)
    seen = torch.zeros(len(x0), 1)
    assert bool((near_one(seen, x0) > near_one(seen, plain)).all())
    assert float((x0 - plain).mean()) > 0.8 * SIZE, "nearly the whole bound in the right direction"


def test_control_an_editor_that_has_not_learned_is_best_of_n(tmp_path: Path) -> None:
    """...and one of the wrong sign is too: of a sample and its edit the better one is taken."""
    made = editing(tmp_path)
    events = base()
    plain = picked(replace(made.run.policy, refiner=None), events)
    assert all(map(torch.equal, picked(made.run.policy, events), plain))
    with torch.no_grad():
        made.editor.actor.readout.bias[:1] = -3.0
    assert float(made.editor.edits(torch.zeros(1, 1), events[:1]).mode.detach()) < -0.9 * SIZE
    assert all(map(torch.equal, picked(made.run.policy, events), plain))


def test_without_a_size_it_is_best_of_n(tmp_path: Path) -> None:
    made = taught(tmp_path, size=1e-6)
    events = base()
    x0, best = picked(made.run.policy, events)
    plain, places = picked(replace(made.run.policy, refiner=None), events)
    assert torch.equal(best, places)
    assert torch.allclose(x0, plain, atol=2e-6)


def test_edits_are_clipped_to_the_actions_range(tmp_path: Path) -> None:
    """...before they are valued, so that no edit is worth what can't be carried out."""
    made = taught(tmp_path)
    events = torch.full((N, 1, 1), 0.95)
    with torch.no_grad():
        made.editor.actor.readout.bias[:1] = 5.0
    bound = float(made.world.experience.replay.event.abs().max())
    assert bound == pytest.approx(1, abs=1e-4)
    assert float(made.editor.moved(events, torch.full_like(events, SIZE)).max()) == bound
    assert float(picked(made.run.policy, events)[0].max()) == bound
    made.editor.clip_at(2.0)
    assert float(made.editor.moved(events, torch.full_like(events, SIZE)).max()) > bound, "control"


def test_only_the_highest_valued_are_edited(tmp_path: Path) -> None:
    made = taught(tmp_path, edited=2)
    assert made.run.policy.refined == 2
    assert made.run.policy.best_of == N
    asked = []
    editor = made.editor
    forward = editor.forward

    def watched(policy: ChainPolicy, features: Tensor, event: Tensor) -> Tensor:
        asked.append(event)
        return forward(policy, features, event)

    acting: Any = watched
    events = base(3)
    picked(replace(made.run.policy, refiner=acting), events)
    (edited,) = asked
    highest = events.view(3, N).sort(1, descending=True).values[:, :2]
    assert torch.equal(edited.view(3, 2), highest)


@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_alpha_brings_the_entropy_to_its_target(tmp_path: Path, alpha: float) -> None:
    """-d/2 + d log size, from an alpha that is too small and from one that is too large."""
    made = taught(tmp_path, 450, alpha=alpha, lr=1e-2)
    target = -0.5 + math.log(SIZE)
    assert made.entropy.target == pytest.approx(target)
    metrics = made.run.metrics.numbers["editor/entropy"]
    assert sum(metrics[-50:]) / 50 == pytest.approx(target, abs=0.3)


def test_numbers_that_are_padding_count_in_no_entropy(tmp_path: Path) -> None:
    """An edit of them changes nothing that is carried out: entropy there is none of the actor's."""
    found = {}
    for padded in (False, True):
        folder = tmp_path / str(padded)
        folder.mkdir()
        policy = {**one_step.POLICIES["flow"]["policy"], "chunk": 2}
        method = {"name": "expo", "practice": {"first": 0}, "size": SIZE, "samples": N}
        run, built = one_step.prepared(folder, method=method, policy=policy)
        if padded:
            model: Any = run.policy.model
            model.scored = lambda value: value[:, :1]
        made = _Editing(built, run)
        made._begin()
        made._edit(1)
        found[padded] = float(run.metrics.numbers["editor/entropy"][0]), made.entropy.target
    assert found[True][1] == pytest.approx(-0.5 + math.log(SIZE))
    assert found[True] == pytest.approx([value / 2 for value in found[False]], abs=0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"edited": 9, "samples": 8}, "edited is 9"), ({"size": 0.0}, "size"), ({"lr": 0.0}, "lr")],
)
def test_settings_that_are_none_are_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        EXPO(**settings)
    assert "\n" not in str(raised.value)


def test_a_policy_with_a_refiner_is_refused_before_any_work(tmp_path: Path) -> None:
    made = editing(tmp_path)  # control: this one came without
    run = made.run
    run.policy = replace(run.policy, parts={}).attach("refiner", Refiner(1, 0.1))
    with pytest.raises(ConfigError, match="its refiner, would go on to act") as raised:
        _Editing(made.settings, run)
    assert "\n" not in str(raised.value)
