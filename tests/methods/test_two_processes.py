"""Every method of groups learns on two processes what it learns on one. Those that learn a value
have a test of their own, in processes of their own (tests/invariants/test_control_run.py): its
weights are drawn from torch's global generator, which threads share.
"""

from functools import partial

import pytest

from genpolicy.config import parse
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from tests.methods.test_laws import METHODS, NEEDS, SMALL, WORLDS, chain, section
from tests.methods.test_seams import largest_difference
from tests.peers import peers, together

VALUED = {("dppo", "prompts"), ("dppo", "robots"), ("reinflow", "robots"), ("b2_diffurl", "robots")}
PLACES = [(m, world) for m in METHODS for world in NEEDS[m].worlds if (m, world) not in VALUED]
SIZES = {**SMALL, "updates": 2, "epochs": 2}


def learned(folder, count, method, world, seed=0):
    """The weights of each of so many processes after two iterations."""
    accelerators, works = peers(count), []
    for index, accelerator in enumerate(accelerators):
        place = folder / f"{count}-{index}"
        place.mkdir(parents=True)
        raw = WORLDS[world](
            place,
            method=section(method, **SIZES),
            chain=chain(method),
            optimizer={"lr": 1e-3, "eps": 1e-4},
            budget={"iterations": 2},
            seed=seed,
        )
        run, made = prepare(parse.parse(raw), place / "run", Processes(accelerator))
        works.append(partial(two_iterations, run, made))
    return together(works, accelerators)


def two_iterations(run, method):
    def iterations():
        for iteration in (1, 2):
            run.begin(iteration)
            yield iteration

    run.iterations = iterations
    method.train(run)
    return run.weights().values


@pytest.mark.parametrize(("method", "world"), PLACES)
def test_two_processes_learn_what_one_learns(tmp_path, method, world):
    (one,) = learned(tmp_path, 1, method, world)
    (other,) = learned(tmp_path / "other", 1, method, world, seed=1)
    for values in learned(tmp_path, 2, method, world):
        assert largest_difference(values, one) < 1e-5
    assert largest_difference(one, other) > 1e-4, "control: another seed is another run"
