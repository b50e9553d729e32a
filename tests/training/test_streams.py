"""The streams of random numbers of one iteration: pairwise different, in every method and world."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from genpolicy.chain import Noise
from genpolicy.cli.law_toys import taught
from genpolicy.config import parse
from genpolicy.evaluation.prompt_scores import EVALUATION
from genpolicy.training.deployment import Deployment
from genpolicy.training.draws import Draws
from genpolicy.training.experiment import train
from genpolicy.training.run import Run
from tests import rl100_toy, toy, toy_control
from tests.methods import test_laws, test_uni_o4
from tests.methods.test_laws import NEEDS

COMMON = {"imagined starts", "imagination", "tried out", "window", "compared"}
"""The purposes of which one iteration repeats a draw on purpose: two policies meet the same luck,
all that an iteration draws has its one window, and both sides of a pair, as policy and reference
see them, have one noise.
"""


@dataclass
class Iteration:
    """Everything that one iteration has drawn."""

    number: int
    stage: str
    orders: list[tuple[str, int]] = field(default_factory=list)  # (purpose, number) of generators
    firsts: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)  # seed of a noise -> its purpose
    rows: Counter[tuple[int, ...]] = field(default_factory=Counter)  # each row's name

    def check(self) -> None:
        """Fails where two purposes share a stream, or one draws twice what it drew before."""
        again = {key for key, count in Counter(self.orders).items() if count > 1}
        assert {purpose for purpose, _ in again} <= COMMON, (self.stage, again)
        assert len(set(self.firsts.values())) == len(self.firsts), (self.stage, self.firsts)
        other = {EVALUATION: "tried out", self.number: "collected"}
        again_drawn = [row for row, count in self.rows.items() if count > 1]
        twice = {self.keys.get(row[0], other[row[1]]) for row in again_drawn}
        assert twice <= COMMON, (self.stage, twice)


@pytest.fixture
def drawn(monkeypatch):
    """The iterations of the runs of a test, each with what it has drawn."""
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)
    iterations: list[Iteration] = []
    evaluated: set[tuple[int, int]] = set()
    state: dict[str, Any] = {"examining": False}
    begin, examine = Run.begin, Deployment.examine
    generator, noise, call = Draws.generator, Draws.noise, Noise.__call__

    def watched_begin(run, number):
        begin(run, number)
        iterations.append(Iteration(number, run.stages.now.name))

    def watched_examine(self, *arguments):
        state["examining"] = True
        try:
            return examine(self, *arguments)
        finally:
            state["examining"] = False

    def watched_generator(self, purpose, iteration, number):
        made = generator(self, purpose, iteration, number)
        now = iterations[-1]
        assert iteration == now.number
        now.orders.append((purpose, number))
        fresh = generator(self, purpose, iteration, number)
        now.firsts[purpose, number] = tuple(fresh.integers(1 << 62, size=4).tolist())
        return made

    def watched_noise(self, purpose, iteration, place, number):
        made = noise(self, purpose, iteration, place, number)
        assert iterations[-1].keys.setdefault(made.seed, purpose) == purpose
        return made

    def watched_call(self, k, shape, device="cpu"):
        if state["examining"] or not iterations:
            evaluated.add((self.seed, self.iteration))
        else:
            h = torch.zeros_like(self.group) if self.decision is None else self.decision
            columns = (self.group.tolist(), self.member.tolist(), h.tolist())
            for names in zip(*columns, strict=True):
                iterations[-1].rows[self.seed, self.iteration, *names, k] += 1
        return call(self, k, shape, device)

    monkeypatch.setattr(Run, "begin", watched_begin)
    monkeypatch.setattr(Deployment, "examine", watched_examine)
    monkeypatch.setattr(Draws, "generator", watched_generator)
    monkeypatch.setattr(Draws, "noise", watched_noise)
    monkeypatch.setattr(Noise, "__call__", watched_call)
    yield iterations
    trained = {row[:2] for iteration in iterations for row in iteration.rows}
    assert evaluated
    assert not trained & evaluated, "an evaluation draws what no training draws"


def raw_of(method: str, world: str, folder) -> dict[str, Any]:
    """A small experiment of a method in a world, of every stage that it has."""
    eval_ = {"every": 2, **({"episodes": 3} if world == "robots" else {"samples": 4})}
    if method == "rl100":
        offline = {"episodes": 8, "recloning": 100, "rounds": 2, "check": 3}
        online = {"epochs": 2, "critic_epochs": 2, "retry": 0.5, "floor": 0.5}
        sections = {"offline": offline, "online": online}
        return rl100_toy.experiment(
            folder, method=sections, budget={"iterations": 15}, eval={**eval_, "every": 0}
        )
    if method == "uni_o4":
        online = {"episodes": 6, "epochs": 2, "critic_epochs": 2, "retry": 0.5, "floor": 0.5}
        return test_uni_o4.experiment(folder, {"online": online})
    sizes = {**test_laws.SMALL, "groups": 4, "group": 2, "epochs": 2, "episodes": 6}
    sizes |= {"critic_epochs": 2, "minibatch": 8, "critic_minibatch": 8}
    if method == "bc":
        sizes |= {"updates": 3, "batch": 8}
    raw = (toy if world == "prompts" else toy_control).experiment(
        folder,
        method=test_laws.section(method, **sizes),
        eval=eval_,
        budget={"iterations": 3},
        threads=1,
    )
    if "practice" in raw["method"] and world == "robots":
        raw["data"] = {"name": "tests.rl100_toy:Outcomes"}
    if method == "dsrl":
        raw["chain"] = {"steps": 4, "kernel": test_laws.ODE}
    if world == "prompts" and NEEDS[method].data:
        raw["data"] = {"name": f"{test_laws.__name__}:Shown"}
    if NEEDS[method].teacher:
        name = {"prompts": "toy", "robots": "mlp"}[world]
        own = {"family": "flow", **raw["policy"], "name": name}
        raw |= taught(own, folder, toy_control.Recorded())
        raw["method"] |= {"loss": "score", "batch": 16}
    elif method == "diffusion_nft":
        raw["method"]["form"] = "plain"  # robots' heads say epsilon here
    elif method == "reinflow":
        raw["policy"] = {**raw["policy"], "family": "flow"}
        raw["chain"] = {"steps": 4, "kernel": test_laws.ODE, "window": [0, 3]}
    elif method == "mix_grpo":  # it moves a window of its own
        raw["method"] |= {"schedule": "random"}
    elif NEEDS[method].likelihoods:
        raw["chain"] = {**raw["chain"], "window": [0, 3], "window_size": 2}
    return raw


PLACES = [(method, world) for method, needs in NEEDS.items() for world in needs.worlds]


@pytest.mark.parametrize(("method", "world"), PLACES)
def test_what_one_iteration_draws_is_pairwise_different(tmp_path, drawn, method, world):
    train(parse.parse(raw_of(method, world, tmp_path)))
    for iteration in drawn:
        iteration.check()
    purposes = {purpose for iteration in drawn for purpose, _ in iteration.orders}
    purposes |= {purpose for iteration in drawn for purpose in iteration.keys.values()}
    if method in ("rl100", "uni_o4"):
        assert purposes >= {
            "critic",
            "world model",
            "world model bootstrap",
            "ends of episodes",
            "imagined starts",
            "imagination",
            "redraw",
            "redrawn decisions",
            "failures",
            "the value's pass over rows",
        }
        online = [iteration for iteration in drawn if iteration.stage == "online"][-1]
        own = {"failures"} | {purpose for purpose, _ in online.orders if "pass" in purpose}
        assert len(own) == 3, "retried failures, the policy's order and the value's"
    elif method == "bc":
        assert purposes == {"imitation"}
    elif method == "consistency":
        own = {"times", "distillation", "minibatch", "fake minibatch", "fake", "score"}
        assert purposes == own | ({"contexts"} if world == "robots" else set())
    else:
        own = "window's place" if method == "mix_grpo" else "window"
        assert purposes >= ({own} if NEEDS[method].likelihoods else set())
        assert drawn[0].rows, "what is collected has its noise"


@pytest.mark.parametrize("update", ["pairs", "chain", "step"])
def test_every_sweep_over_redrawn_decisions_has_an_order_of_its_own(tmp_path, drawn, update):
    raw = rl100_toy.experiment(
        tmp_path,
        method={"stage": "offline", "update": update, "offline": {"episodes": 4, "epochs": 2}},
        budget={"iterations": 4},
    )
    train(parse.parse(raw))
    improved = [iteration for iteration in drawn if iteration.stage == "improve"]
    assert improved
    for iteration in improved:
        iteration.check()
        orders = [number for purpose, number in iteration.orders if "pass over" in purpose]
        assert orders == [0, 1, 2, 3], "two sweeps of two epochs"


def test_control_two_draws_of_one_key_and_keys_that_collide_are_found():
    one = Iteration(1, "one", orders=[("pass over rows", 0), ("pass over rows", 0)])
    with pytest.raises(AssertionError):
        one.check()
    draws = [tuple(np.random.default_rng(key).integers(9, size=4)) for key in ([3, 1], [3, 1, 0])]
    two = Iteration(1, "two", firsts={("a", 0): draws[0], ("b", 0): draws[1]})
    with pytest.raises(AssertionError):
        two.check()
    three = Iteration(1, "three", rows=Counter({(7, 1, 0, 0, 0, 2): 2}))
    with pytest.raises(AssertionError):
        three.check()
    common = Iteration(1, "four", orders=[("window", 0), ("window", 0)])
    common.check()
