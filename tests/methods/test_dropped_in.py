"""The laws of methods read the needs of any file that is dropped beside the shipped methods."""

import importlib.util
import inspect
import sys
from itertools import product
from pathlib import Path

import pytest

import genpolicy.methods
from genpolicy.config.leaves import names
from genpolicy.config.origin import PERSON
from genpolicy.methods import flow_grpo, reinflow
from tests.methods import test_laws

DESCENDS = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class ZzDescends:
    group: int = 4
    clip: float = 0.1

    needs: ClassVar[Needs] = Needs()

    def train(self, run: Run) -> None:
        for _ in run.iterations():
            chains = run.collect(4, self.group).trajectory
            t = torch.full((len(chains),), 0.5, dtype=torch.float64)
            noise = run.noise("dropped", torch.arange(len(chains)))(0, run.policy.model.event_shape)

            def losses(part, chains=chains, t=t, noise=noise):
                x0, condition = chains.x0[part], chains.condition[part]
                return run.policy.supervised_loss(condition, x0, t[part], noise[part], None)

            run.descend(losses, len(chains), "dropped")
"""
"""A method without likelihoods, whose fields ``group`` and ``clip`` promise nothing."""


def copied(module, name, **replaced):
    """The source of a shipped method's file under another name, with other needs."""
    source = Path(inspect.getfile(module)).read_text()
    words = {module.__name__.rpartition(".")[2]: name, **replaced}
    for old, new in words.items():
        assert old in source
        source = source.replace(old, new)
    return source


FILES = {
    "zz_descends": DESCENDS,
    "zz_clones": DESCENDS.replace("ZzDescends", "ZzClones").replace(
        "Needs()", 'Needs(("robots",), data=True)'
    ),
    "zz_compares": copied(flow_grpo, "zz_compares", FlowGRPO="ZzCompares"),
    "zz_robots": copied(
        flow_grpo,
        "zz_robots",
        FlowGRPO="ZzRobots",
        **{"Needs(likelihoods=True, whole_updates=True)": 'Needs(("robots",), likelihoods=True)'},
    ),
    "zz_noise": copied(
        reinflow,
        "zz_noise",
        ReinFlow="ZzNoise",
        **{'Needs(("robots",), window=True)': "Needs(window=True)"},
    ),
}
"""Files of methods: with every kind of needs, in either world or in both."""
TRAINED = ("test_a_toy_with_one_right_answer_is_solved", "test_wrong_sign_fails_where_")
"""Laws that train until a toy is solved: here they train one iteration."""

RATIO = "test_the_first_pass_has_ratio_one_and_no_clipping"
DESCENT = "test_an_iteration_moves_weights_or_parts_and_logs_finite_numbers"


@pytest.fixture
def laws(tmp_path, monkeypatch):
    """The module of laws as it is where `FILES` lie beside the shipped methods."""
    folder = tmp_path / "methods"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    path = [*genpolicy.methods.__path__, str(folder)]
    monkeypatch.setattr(genpolicy.methods, "__path__", path)
    spec = importlib.util.spec_from_file_location(f"{__name__}_laws", test_laws.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    for name in FILES:
        sys.modules.pop(f"genpolicy.methods.{name}", None)


def cases(module):
    """(law, its arguments) of every law, once for each combination of its parameters."""
    for name, law in vars(module).items():
        marks = [m for m in getattr(law, "pytestmark", []) if m.name == "parametrize"]
        if not name.startswith("test_") or not marks:
            continue
        named = [
            [a.strip() for a in m.args[0].split(",")]
            if isinstance(m.args[0], str)
            else list(m.args[0])
            for m in marks
        ]
        for values in product(*(list(m.args[1]) for m in marks)):
            given = {}
            for arguments, value in zip(named, values, strict=True):
                each = [value] if len(arguments) == 1 else value
                given |= dict(zip(arguments, each, strict=True))
            yield name, law, given


def test_the_laws_know_what_each_dropped_file_must_keep(laws):
    assert set(FILES) <= set(names("methods"))
    assert {"zz_compares", "zz_robots", "zz_noise"} <= set(laws.METHODS)
    assert {"zz_descends", "zz_clones"} <= set(laws.DESCENDING)
    assert ("zz_robots", "prompts") not in laws.PLACES
    assert {("zz_noise", "prompts"), ("zz_noise", "robots")} <= set(laws.PLACES)
    laws.test_a_field_called_group_brings_no_law_of_ratios()


@pytest.mark.parametrize("method", FILES)
def test_a_dropped_file_keeps_every_law_that_its_needs_ask_for(tmp_path, laws, monkeypatch, method):
    monkeypatch.setattr(laws, "LONG", 1)
    kept = set()
    for number, (name, law, given) in enumerate(cases(laws)):
        if given.get("method") != method:
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        if name.startswith(TRAINED):
            result, metric = laws.solved(folder, method, given.get("kernel", "ddim"))
            assert metric in result.after
        else:
            law(folder, **given)
        kept.add(name)
    assert (RATIO in kept) == (method in laws.METHODS)
    assert (DESCENT in kept) == (method in laws.DESCENDING)


def test_control_a_dropped_file_that_breaks_a_law_is_found(tmp_path, laws):
    """A loss that goes on without an advantage has a gradient where there must be none."""
    method = laws.leaves.leaf("methods", "zz_compares", PERSON)
    honest = method.loss

    def pulled(self, step):
        loss, metrics = honest(self, step)
        return loss + step.new.mean.flatten(1).mean(1), metrics

    method.loss = pulled  # of this test's own copy
    law = laws.test_zero_advantage_gives_zero_gradient_and_a_real_one_does_not
    with pytest.raises(AssertionError):
        law(tmp_path, "zz_compares", "prompts")
