"""Samples that are kept for each version of a policy: what they follow from, and what they do not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from genpolicy.methods.parts.cached_samples import CachedSamples
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.policy.parts.refiner import Refiner
from genpolicy.training.run import Run
from tests import one_step

COUNT = 3
DATA = {"name": "tests.one_step:Both", "episodes": 20}
EVERY = torch.arange(20)


def made(folder: Path, **sections: Any) -> tuple[Run, CachedSamples]:
    """A run whose chain draws noise in every step, and its samples at the data's views."""
    chain = {"steps": 4, "kernel": {"name": "ddim", "eta": 1.0}}
    folder.mkdir(exist_ok=True)
    run, _ = one_step.prepared(folder, "diffusion", data=DATA, chain=chain, **sections)
    return run, CachedSamples(run, Experience(run, cut_fails=True), COUNT)


@pytest.fixture
def run_and_samples(tmp_path: Path) -> tuple[Run, CachedSamples]:
    return made(tmp_path)


def test_they_are_those_of_the_policy_named_by_version_view_and_number(run_and_samples) -> None:
    """One by one: view v's sample number m has the noise of place v and member m."""
    run, samples = run_and_samples
    conditions = samples.experience.conditions
    assert samples.at(EVERY).shape == (20, COUNT, 1, 1)
    for view in (0, 7, 19):
        for member in range(COUNT):
            noise = run.noise("cached samples", torch.tensor([view]), iteration=0)
            noise = replace(noise, member=torch.tensor([member]))
            with torch.no_grad():
                alone = run.policy.sample(conditions[view : view + 1], noise)
            mine = torch.tensor([view])
            assert torch.allclose(samples.at(mine)[:, member], alone.x0, atol=1e-5)
            assert alone.start is not None
            begun = alone.start / run.policy.chain.scale
            assert torch.allclose(samples.starts(mine)[:, member], begun, atol=1e-6)
    assert len(samples.starts(EVERY).unique()) == 20 * COUNT, "no two have the same noise"


def test_they_follow_from_the_seed_and_nothing_drawn_before(tmp_path: Path) -> None:
    _, first = made(tmp_path / "first")
    known, begun = first.at(EVERY), first.starts(EVERY)
    run, again = made(tmp_path / "again")
    torch.manual_seed(99)
    run.generator("something else").random(10)
    run.spent.iteration = 5  # they know the iteration of the last change, and no other
    assert torch.equal(again.at(EVERY), known)
    _, other = made(tmp_path / "other", seed=1)  # control
    assert float((other.starts(EVERY) - begun).abs().min()) > 1e-6


def test_another_version_has_other_samples(run_and_samples) -> None:
    run, samples = run_and_samples
    known = samples.starts(EVERY)
    run.spent.iteration = 2
    assert torch.equal(samples.starts(EVERY), known), "control: an iteration alone changes nothing"
    samples.renew()
    assert samples.version == 2
    assert float((samples.starts(EVERY) - known).abs().min()) > 1e-6


def test_they_come_back_to_the_bit_and_cost_nothing_twice(run_and_samples) -> None:
    run, samples = run_and_samples
    run.spent.iteration = 3
    samples.renew()
    before = run.policy.model.evaluations
    known, begun = samples.at(EVERY), samples.starts(EVERY)
    spent = run.policy.model.evaluations
    assert spent - before == 4 * 20 * COUNT
    state = samples.state_dict()
    run.spent.iteration = 8
    samples.renew()
    assert not torch.equal(samples.at(EVERY), known), "control"
    run.policy.model.evaluations = spent
    samples.load_state_dict(state)
    assert torch.equal(samples.at(EVERY), known)
    assert torch.equal(samples.starts(EVERY), begun)
    assert run.policy.model.evaluations == spent, "they were counted before the run was stopped"
    samples.renew()
    samples.at(EVERY)
    assert run.policy.model.evaluations > spent, "control: new ones are counted"


def test_new_recordings_leave_the_old_samples_as_they_are(run_and_samples) -> None:
    run, samples = run_and_samples
    known = samples.at(EVERY)
    run.collect(4, 1, keep=True)
    samples.experience.add(run.iteration)
    views = len(samples.experience.replay.views)
    assert views > 20
    assert samples.at(torch.arange(views)).shape[0] == views
    assert torch.equal(samples.at(EVERY), known)
    # ...also where all are drawn at once, as in a resumed run
    samples.load_state_dict(samples.state_dict())
    assert torch.equal(samples.at(EVERY), known)


def test_the_choice_of_a_critic_does_not_act_in_them(run_and_samples) -> None:
    run, samples = run_and_samples
    known = samples.at(EVERY)
    judged = replace(run.policy, judge=lambda features, event: event.flatten(1).sum(1))
    run.policy = replace(judged, best_of=4, refiner=Refiner(3, 0.5))
    samples.load_state_dict(samples.state_dict())
    assert torch.equal(samples.at(EVERY), known)
    noise = run.noise("control", EVERY)
    conditions = samples.experience.conditions
    with torch.no_grad():
        acted, plain = (p.sample(conditions, noise).x0 for p in (run.policy, judged))
    assert float(acted.mean()) > float(plain.mean()) + 0.1, "control: it acts in the policy"
