"""Parts of a policy: each acts the same whatever becomes of the policy, and none is lost unsaid.

The table is {base, best_of, std, start, noise_actor, refiner, editor, head, grid} x {save, load,
sample, evaluate, stages/, train on, resume, two processes}. Every cell asserts something of a policy that has the
part, and the same of one that has lost it, the negative control, must fail.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from genpolicy.chain import Noise
from genpolicy.cli.main import main
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf, make
from genpolicy.config.origin import PERSON
from genpolicy.contracts.task import Context
from genpolicy.evaluation import pictures
from genpolicy.evaluation.prompt_scores import draw
from genpolicy.policy.files import load, save_policy, saved
from genpolicy.policy.parts.editor import Editor
from genpolicy.policy.parts.learned_start import LearnedStart
from genpolicy.policy.parts.noise_actor import NoiseActor
from genpolicy.policy.parts.refiner import Refiner
from genpolicy.policy.parts_files import load_parts
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from genpolicy.training.experiment import train
from genpolicy.training.run import Run
from tests import rl100_toy, toy
from tests.cli.test_bad_inputs import complaint
from tests.invariants.test_control_run import same_state
from tests.invariants.test_same_run import weights
from tests.peers import peers, together
from tests.policy.toy_parts import (
    ITERATIONS,
    ROWS,
    Killed,
    apart,
    experiment,
    part,
    prepared,
    reloaded,
    rewritten,
    same,
    trained,
    without,
)

VISIBLE = 0.01
"""The least change that a part makes, in units of the event, where actions reach from -1 to 1."""
KINDS = [name for name, row in ROWS.items() if row.parts]
"""The rows whose part has a folder of its own; head and grid are of network and chain."""

rows = pytest.mark.parametrize("name", ROWS)


class Runs:
    """Each row's run, trained once, and its folder with the part taken out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run, self.bare = cache(self._run), cache(self._bare)

    def _run(self, name: str, world: str = "robots") -> Run:
        return trained(world, name, self.folder / world / name)

    def _bare(self, name: str, world: str = "robots") -> Path:
        return without(name, self.run(name, world).folder, self.folder / world / f"{name}-without")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies and curves are measured and drawn elsewhere."""
    monkeypatch.setattr("genpolicy.cli.evaluate_episodes.DECISIONS", 1)
    monkeypatch.setattr("genpolicy.cli.evaluate_episodes.WARM_UP", 0)
    monkeypatch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)


# The table


@rows
def test_every_part_changes_what_is_done_visibly(runs: Runs, name: str):
    """...and `without` takes nothing else out: what is left has the same network."""
    run, left = runs.run(name), load(runs.bare(name))
    assert apart(run.deployed, left) > VISIBLE
    assert set(run.deployed.parts) - set(left.parts) == set(ROWS[name].parts[-1:])
    mine, theirs = run.policy.model.trainable(), left.model.trainable()
    assert all(torch.equal(theirs[key], value) for key, value in mine.items())


@rows
def test_save(runs: Runs, tmp_path: Path, name: str):
    """A policy is saved with its part, described beside it; what comes back can be saved again."""
    run = runs.run(name)
    first = reloaded(run.deployed, run, tmp_path / "first")
    description = json.loads((tmp_path / "first/genpolicy.json").read_text())
    assert list(description["parts"]) == list(ROWS[name].parts)
    for each in description["parts"]:
        assert any((tmp_path / "first/parts" / each).iterdir())
    assert same(reloaded(first, run, tmp_path / "second"), run.deployed)
    left = load(runs.bare(name))  # control
    save_policy(left, saved(runs.bare(name)).policy, saved(runs.bare(name)).sampler, tmp_path / "c")
    assert not same(load(tmp_path / "c"), run.deployed)


@rows
def test_load(runs: Runs, name: str):
    """The policy that a run saved at its end acts bit for bit as the one that it deployed."""
    run = runs.run(name)
    for folder in (run.folder, run.folder / "policy"):
        assert same(load(folder), run.deployed)
    assert not same(load(runs.bare(name)), run.deployed), "control"


@pytest.mark.parametrize("name", [name for name in ROWS if name != "grid"])
def test_sample(runs: Runs, tmp_path: Path, name: str):
    """`genpolicy sample` draws the pictures of the policy that the run deployed. (No model that
    draws has a native grid of its own.)
    """
    run = runs.run(name, "prompts")
    expected = pictures.pixels(draw(run.deployed, toy.PROMPTS, 2, 5))

    def drawn(home: Path, out: Path) -> np.ndarray:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("\n".join(toy.PROMPTS) + "\n")
        asked = ["--prompts", str(prompts), "--n", "2", "--seed", "5", "--out", str(out)]
        assert main(["sample", "--trust", str(home), *asked]) == 0
        return np.stack([np.asarray(Image.open(file)) for file in sorted(out.glob("0*.png"))])

    assert np.array_equal(drawn(run.folder, tmp_path / "with"), expected)
    control = drawn(runs.bare(name, "prompts"), tmp_path / "without")
    assert np.abs(control.astype(int) - expected).max() > 10


SAMPLERS = ("ode", "mean", "stochastic")
ACTIVE = {
    "best_of": {"deployed"},  # only best_of_N draws several, and what was saved so
    "std": {"deployed", "stochastic"},  # the others draw no noise
}
"""The samplers in which a part acts; all of them where it is not named."""


@rows
def test_evaluate(runs: Runs, tmp_path: Path, name: str):
    """`genpolicy evaluate --samplers`: the part acts in just those in which it should, and the
    deployed one scores as the run said.
    """
    run = runs.run(name)

    def played(home: Path, out: Path, *samplers: str) -> dict[str, float]:
        asked = ["--gifs", "0", "--out", str(out), "--samplers", *samplers]
        assert main(["evaluate", "--trust", str(home), *asked]) == 0
        found = json.loads((out / "eval.json").read_text())
        others = {each["name"]: each["return"] for each in found["samplers"]}
        return {"deployed": found["return"], **others}

    mine = played(run.folder, tmp_path / "with", *SAMPLERS)
    control = played(runs.bare(name), tmp_path / "without", *SAMPLERS)
    assert mine["deployed"] == run.deployment.last["return"]
    assert {each for each in mine if mine[each] != control[each]} == ACTIVE.get(name, set(mine))
    if name in ("best_of", "refiner", "editor"):
        several = played(run.folder, tmp_path / "several", "last_mean", "best_of_4")
        assert several["best_of_4"] != several["last_mean"]


@rows
def test_stages(runs: Runs, name: str):
    """A milestone's folder, and what a method keeps, carry the part."""
    run = runs.run(name)
    run.milestone("reached")
    run.keep("kept")
    for stage in ("reached", "kept"):
        assert same(load(run.folder / "stages" / stage), run.deployed)
        assert not same(load(runs.bare(name)), load(run.folder / "stages" / stage)), "control"
    if name in ("refiner", "editor"):
        run.milestone("best_of_4", 4)
        several = load(run.folder / "stages/best_of_4")
        assert several.best_of == 4
        assert several.parts.keys() == {"best_of", name}


def continued(name: str, home: Path, folder: Path, **sampler: Any) -> tuple[Run, Any]:
    """A run that goes on from a saved policy with the same chain section, and learns nothing."""
    raw = experiment("robots", name, folder)
    model = raw["policy"]["name"]
    chain = yaml.safe_load((home / "config.yaml").read_text())["chain"]
    return prepared(
        "robots",
        name,
        folder,
        policy={"name": model, "pretrained": str(home / "policy")},
        chain=chain,
        method={**raw["method"], "parts": [], "updates": 0},
        budget={"iterations": 2},
        eval={**raw["eval"], "sampler": {**ROWS[name].sampler, **sampler}},
    )


@rows
def test_train_on(runs: Runs, tmp_path: Path, name: str):
    """A run that goes on from a saved policy acts as it did, before any learning, and saves the
    part again.
    """
    run = runs.run(name)
    again, method = continued(name, run.folder, tmp_path / "with")
    with again:
        assert same(again.deployed, run.deployed)
        method.train(again)
        evaluated = ("success_rate", "return", "length")
        assert [again.deployment.before[key] for key in evaluated] == [
            run.deployment.last[key] for key in evaluated
        ]
        assert same(load(again.folder), run.deployed)
        assert list(load(again.folder).parts) == list(ROWS[name].parts)
    control, _ = continued(name, runs.bare(name), tmp_path / "without", best_of=1)
    with control:
        assert not same(control.deployed, run.deployed)


def killed(name: str, folder: Path, **settings: Any) -> Path:
    """The folder of a row's run that was killed in its third iteration, after the checkpoint of its
    second.
    """
    method = {**experiment("robots", name, folder)["method"], **settings}
    run, method = prepared("robots", name, folder, method={**method, "dies": 3})
    with run, pytest.raises(Killed):
        method.train(run)
    return run.folder


def resumed(name: str, folder: Path, **settings: Any) -> Run:
    method = {**experiment("robots", name, folder)["method"], **settings}
    return trained("robots", name, folder, method=method)


def turned_around(state: Any) -> Any:
    """The same with every tensor's sign changed."""
    if isinstance(state, dict):
        return {key: turned_around(value) for key, value in state.items()}
    if isinstance(state, list):
        return [turned_around(value) for value in state]
    return -state if isinstance(state, torch.Tensor) else state


@rows
def test_resume(runs: Runs, tmp_path: Path, name: str):
    """Killed and resumed equals uninterrupted to the bit, with a network and a part that learn."""
    whole = runs.run(name)
    killed(name, tmp_path / "broken")
    shutil.copytree(tmp_path / "broken", tmp_path / "control")
    broken = resumed(name, tmp_path / "broken")
    a, b = (weights(run.folder, ITERATIONS) for run in (whole, broken))
    assert all(same_state(a, b).values()), same_state(a, b)
    assert same(broken.deployed, whole.deployed)
    assert same(load(broken.folder), whole.deployed)
    # control: what learns is turned around in the checkpoint
    edited = weights(tmp_path / "control/run", 2)
    if name in KINDS:
        parts = edited["parts"]
        edited["parts"] = turned_around(parts)
    else:
        edited["parameters"] = turned_around(edited["parameters"])
    torch.save(edited, tmp_path / "control/run/checkpoints/2/state.pt")
    control = resumed(name, tmp_path / "control")
    assert not all(same_state(a, weights(control.folder, ITERATIONS)).values())
    assert not same(control.deployed, whole.deployed)
    for run in (broken, control):
        run.evaluator.close()


class NoSignals:
    """Stands in for `StopRequest` in a thread, which can't receive any."""

    asked = False

    def __init__(self, say: Callable[[str], None]) -> None: ...

    def __enter__(self) -> "NoSignals":
        return self

    def __exit__(self, *_: object) -> None: ...


@rows
def test_two_processes(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """Two processes learn one and the same policy with its part, that of one process."""
    monkeypatch.setattr("genpolicy.training.loop.StopRequest", NoSignals)
    alone = runs.run(name)
    accelerators = peers(2)
    built = [prepared("robots", name, tmp_path, each) for each in accelerators]
    together([lambda b=b: b[1].train(b[0]) for b in built], accelerators)
    one, other = (run for run, _ in built)
    assert same(one.deployed, other.deployed)
    assert same(load(one.folder), one.deployed)
    assert one.deployment.last["return"] == other.deployment.last["return"]
    assert apart(one.deployed, alone.deployed) < 1e-4
    assert apart(load(runs.bare(name)), one.deployed) > 1e-4, "control"
    for run in (one, other):
        run.evaluator.close()


@pytest.mark.parametrize("name", ["start", "noise_actor", "refiner", "editor", "head"])
def test_what_was_trained_by_the_verbs_of_run_is_what_is_loaded(
    runs: Runs, tmp_path: Path, name: str
):
    """A learned start, a refiner's critic and a student of one step have learned; they act as what
    was trained.
    """
    run = runs.run(name)
    assert same(load(run.folder), run.deployed)
    first, _ = prepared("robots", name, tmp_path)
    with first:
        for each in ROWS[name].parts:
            first.attach(**{each: part(each, first.policy, first.features)})
        assert apart(first.deployed, run.deployed) > 1e-3, "control: what was not trained"
        for each, value in first.policy.parts.items():
            trained_state, state = run.policy.parts[each].state_dict(), value.state_dict()
            moved = [key for key in state if not torch.equal(state[key], trained_state[key])]
            assert moved or each == "refiner"


# The contract


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run before it begins, of a policy without parts."""
    made, _ = prepared("robots", "start", tmp_path / "plain")
    with made:
        yield made


def start(run: Run) -> LearnedStart:
    made = part("start", run.policy, run.features)
    assert isinstance(made, LearnedStart)
    return made


def wrong_save(self: LearnedStart, folder: Path) -> None:
    """Write nothing."""


def wrong_load(cls: type, folder: Path, model: Any) -> LearnedStart:
    """Read nothing."""
    settings = json.loads((folder / "start.json").read_text())
    return LearnedStart(settings["features"], tuple(settings["shape"]))


FORGETFUL = {
    "save": (wrong_save, r"part 'start' can't be saved and loaded again: .*start\.json"),
    "load": (
        classmethod(wrong_load),
        r"part 'start' \(learned_start\) does not come back from its folder as it was saved",
    ),
}


@pytest.mark.parametrize("verb", FORGETFUL)
def test_a_part_that_forgets_itself_is_refused_before_the_run_begins(
    run: Run, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, verb: str
):
    run.attach(start=start(run))  # control: one that does not
    wrong, said = FORGETFUL[verb]
    monkeypatch.setattr(LearnedStart, verb, wrong)
    with pytest.raises(ConfigError, match=said) as raised:
        run.attach(start=start(run))
    assert "\n" not in str(raised.value)
    (tmp_path / "experiment.yaml").write_text(
        yaml.safe_dump(experiment("robots", "start", tmp_path / "train"))
    )
    arguments = ["train", str(tmp_path / "experiment.yaml")]
    assert "part 'start'" in complaint(capsys, tmp_path / "train/run", *arguments)


def forgetting(kind: Any, **forgotten: Any) -> Any:
    """The loading of a kind of part, but that some of its settings come back as others."""
    honest = kind.load.__func__

    def load(cls: type, folder: Path, model: Any) -> Any:
        found = honest(cls, folder, model)
        for key, value in forgotten.items():
            object.__setattr__(found, key, value)
        return found

    return classmethod(load)


@pytest.mark.parametrize(
    ("name", "forgotten"),
    [
        ("refiner", {"rate": 0.7}),
        ("refiner", {"low": -2.0}),
        ("editor", {"settings": None}),
        ("best_of", {"pessimism": 0.0}),
        ("start", {"high": 1.0}),
        ("std", {"low": -9.0}),
    ],
)
def test_a_part_that_forgets_a_setting_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, forgotten: dict[str, float]
):
    """...though its weights come back as they were: it would act otherwise when it is loaded."""
    made = part(name, run.policy, run.features)
    if name in ("refiner", "editor"):
        run.attach(best_of=part("best_of", run.policy, run.features))
    with monkeypatch.context() as patch:
        patch.setattr(type(made), "load", forgetting(type(made), **forgotten))
        with pytest.raises(ConfigError, match=f"part '{name}' .* does not come back") as raised:
            run.attach(**{name: made})
        assert "\n" not in str(raised.value)
        assert name not in run.policy.parts
    run.attach(**{name: made})  # control


class Oracle(torch.nn.Linear):
    """A part of a kind that genpolicy does not have."""

    kind: ClassVar[str] = "oracle"
    slot: ClassVar[str] = "judge"
    version: ClassVar[int] = 1

    def attach(self, policy: ChainPolicy) -> ChainPolicy:
        return policy

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path, model: Any) -> "Oracle":
        return cls(1, 1)


class Disguised(Oracle):
    """The same under a name that there is."""

    kind: ClassVar[str] = "learned_start"


@pytest.mark.parametrize("kind", [Oracle, Disguised, torch.nn.Linear])
def test_a_part_of_unknown_kind_is_refused_before_the_run_begins(run: Run, kind: type):
    said = (
        rf"part 'extra' is a {kind.__name__}, which can't be saved with it; kinds of parts are base"
    )
    with pytest.raises(ConfigError, match=said):
        run.attach(extra=kind(1, 1))
    assert "extra" not in run.policy.parts


@pytest.mark.parametrize("name", ["start", "other"])
def test_a_part_has_one_owner(run: Run, name: str):
    """...in whichever order it is registered and attached, and under whatever names."""
    registered, attached = start(run), start(run)
    run.register(**{name: registered})
    with pytest.raises(ValueError, match="start is both registered and a part of the policy"):
        run.attach(start=registered)
    assert "start" not in run.policy.parts
    if name == "start":
        return
    run.attach(start=attached)  # control
    with pytest.raises(ValueError, match="both registered and a part of the policy"):
        run.register(another=attached)


def test_a_part_that_does_not_fit_is_refused_and_leaves_nothing_behind(run: Run):
    unfit = {
        "refiner": (Refiner(steps=1, rate=0.1), "attach a best_of part first"),
        "editor": (Editor(4, 4, size=0.1), "attach a best_of part first"),
        "start": (LearnedStart(4, (3,)), r"has shape \[3\], its events \[2, 2\]"),
        "noise_actor": (NoiseActor(4, (3,), 1.5), r"has shape \[3\], its events \[2, 2\]"),
    }
    for name, (value, said) in unfit.items():
        with pytest.raises(ValueError, match=said):
            run.attach(**{name: value})
        assert not run.policy.parts
        assert not run.state.parts
    run.attach(best_of=part("best_of", run.policy, run.features), refiner=unfit["refiner"][0])
    assert run.deployed.parts.keys() == {"best_of", "refiner"}, "control"


def test_an_editor_of_other_events_is_refused(run: Run):
    run.attach(best_of=part("best_of", run.policy, run.features))
    with pytest.raises(ConfigError, match=r"edits 3 numbers, its events have 4") as raised:
        run.attach(editor=Editor(run.features, 3, size=0.1))
    assert "\n" not in str(raised.value)
    run.attach(editor=Editor(run.features, 4, size=0.1))  # control


def test_two_parts_of_one_kind_are_refused(run: Run):
    """...of which only the last would act, and both be saved."""
    run.attach(start=start(run))
    with pytest.raises(ValueError, match="has a part of kind learned_start already, 'start'"):
        run.attach(beginning=start(run))
    assert run.state.parts.keys() == run.policy.parts.keys() == {"start"}
    run.attach(start=start(run))  # control: in its place


SHARED = [
    (("best_of", "refiner"), "editor"),
    (("best_of", "editor"), "refiner"),
    (("start",), "noise_actor"),
    (("noise_actor",), "start"),
]
"""Parts that a policy has, and one of another kind that would act in the place of the last."""


@pytest.mark.parametrize(("there", "new"), SHARED)
def test_two_kinds_that_fill_one_slot_are_refused(run: Run, there: tuple[str, ...], new: str):
    """...of which the earlier one would be saved and act no more."""
    for each in there:
        run.attach(**{each: part(each, run.policy, run.features)})
    with pytest.raises(ValueError, match=f"already, '{there[-1]}', in whose slot '{new}' would"):
        run.attach(**{new: part(new, run.policy, run.features)})
    assert list(run.policy.parts) == list(there)
    run.attach(std=part("std", run.policy, run.features))  # control


def test_a_part_of_another_kind_does_not_take_the_place_of_one(run: Run):
    """...which would go on to act in its own slot, and be saved no more."""
    run.attach(extra=start(run))
    with pytest.raises(ValueError, match="one of kind best_of can't take its place"):
        run.attach(extra=part("best_of", run.policy, run.features))
    assert run.policy.parts["extra"].kind == "learned_start"


@pytest.mark.parametrize("name", ["../outside", "a/b", "/a", "..", ".", "", "a b"])
def test_a_part_is_called_like_the_folder_that_it_is_saved_in(run: Run, name: str):
    """...and a name that leads out of the policy's folder would write elsewhere."""
    with pytest.raises(ValueError, match="can't be called"):
        run.attach(**{name: start(run)})
    assert not run.policy.parts
    run.attach(start_1=start(run))  # control


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_part_is_refused_or_loaded_but_never_skipped(runs: Runs, tmp_path: Path, name: str):
    home, last = runs.run(name).folder, ROWS[name].parts[-1]

    def broken(how: str, **entry: Any) -> Path:
        """A copy of the run whose part's entry in genpolicy.json says something else."""
        to = tmp_path / how
        shutil.copytree(home, to)
        file = to / "policy/genpolicy.json"
        rewritten(file, lambda description: description["parts"][last].update(entry))
        return to

    kind = {"std": "learned_std", "start": "learned_start"}.get(last, last)
    missing = broken("missing")
    shutil.rmtree(missing / "policy/parts" / last)
    newest = leaf("policy.parts", kind, PERSON).version
    refused = {
        broken(
            "unknown", kind="oracle"
        ): "of kind 'oracle', which this version of genpolicy does not",
        broken("newer", version=newest + 1): rf"\({kind}\) has version {newest + 1}; .* reads up to"
        rf" {newest}",
        broken("unversioned", version=None): rf"\({kind}\) has version None",
        missing: "is incomplete: .*No such file",
    }
    for folder, said in refused.items():
        with pytest.raises(ConfigError, match=f"the policy's part '{last}' .*{said}"):
            load(folder)
        with pytest.raises(ConfigError, match=said):
            continued(name, folder, tmp_path / f"{folder.name}-continued")
    assert same(load(broken("same")), runs.run(name).deployed), "control"


@pytest.mark.parametrize("parts", [[], ["start"], {"start": "learned_start"}, None], ids=str)
def test_a_description_of_parts_that_is_none_is_one_sentence(
    runs: Runs, tmp_path: Path, parts: Any
):
    shutil.copytree(runs.run("start").folder / "policy", tmp_path / "policy")
    file = tmp_path / "policy/genpolicy.json"
    rewritten(file, lambda description: description.update(parts=parts))
    with pytest.raises(ConfigError, match=r"genpolicy\.json is damaged") as raised:
        load(tmp_path / "policy")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("lora", [{"rank": 4}, {"start": "adapter.safetensors"}, None])
def test_a_lora_that_begins_on_a_saved_policy_keeps_its_parts(runs: Runs, lora: Any):
    """...which are those of the adapter's folder only where that is a saved policy too."""
    run = runs.run("start", "prompts")
    whole = {"name": "toy", "pretrained": str(run.folder / "policy")}
    section = {**whole, "train": "lora", "lora": lora}
    assert load_parts(section, run.policy.model).keys() == {"start"}
    other = runs.run("std", "prompts").folder / "policy"
    section["lora"] = {"start": str(other)}
    assert load_parts(section, run.policy.model).keys() == {"std"}, "control"
    assert not load_parts({**whole, "pretrained": None}, run.policy.model), "control"


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_a_base_of_another_network_is_refused(runs: Runs, tmp_path: Path, change: str):
    """...also where all that this one trains is there: what else was the base's would be the
    policy's own.
    """
    shutil.copytree(runs.run("base").folder / "policy", tmp_path / "policy")
    file = tmp_path / "policy/parts/base/base.safetensors"
    tensors = load_file(file)
    if change == "more":
        tensors["eyes.0.weight"] = torch.zeros(2)
    else:
        tensors.popitem()
    assert load(tmp_path / "policy").parts.keys() == {"base"}, "control"
    save_file(tensors, file)
    rewritten(tmp_path / "policy/genpolicy.json", lambda description: None)
    with pytest.raises(ConfigError, match=r"part 'base' .*: it was made for another network"):
        load(tmp_path / "policy")


# Parts that a method attaches when it needs them


def test_a_finished_run_that_is_resumed_keeps_its_part(tmp_path: Path):
    """...though its method attaches it in an iteration, and there is none left."""
    method = {**experiment("robots", "start", tmp_path)["method"], "late": True}
    first = trained("robots", "start", tmp_path, method=method)
    assert same(load(first.folder), first.deployed), "control"
    state = weights(first.folder, ITERATIONS)
    again = trained("robots", "start", tmp_path, method=method)
    assert again.iteration == ITERATIONS
    assert load(again.folder).parts.keys() == {"start"}
    assert same(load(again.folder), first.deployed)
    assert same_state(state, weights(again.folder, ITERATIONS))["parts"]
    for run in (first, again):
        run.evaluator.close()


def test_a_part_that_is_not_attached_yet_stays_in_the_checkpoint(run: Run):
    run.state.own_part("start", start(run))
    state = run.state.parts_state()
    resumed_state = type(run.state)()
    resumed_state.load_parts(state)
    assert resumed_state.parts_state().keys() == {"start"}
    late = LearnedStart(4, tuple(run.policy.model.event_shape))
    resumed_state.own_part("start", late)
    assert torch.equal(late.mean.weight, state["start"]["mean.weight"])
    assert resumed_state.parts_state().keys() == {"start"}


def test_a_part_that_is_not_attached_again_is_told(tmp_path: Path):
    killed("start", tmp_path)
    with pytest.raises(
        ConfigError, match=r"holds the policy's parts start, which .* would be lost"
    ):
        resumed("start", tmp_path, parts=[])
    resumed("start", tmp_path).evaluator.close()  # control


@pytest.mark.parametrize("late", [False, True])
def test_a_part_that_is_attached_inside_the_loop_resumes_to_the_bit(
    runs: Runs, tmp_path: Path, late: bool
):
    killed("start", tmp_path, late=late)
    again = resumed("start", tmp_path, late=late)
    assert same(again.deployed, runs.run("start").deployed)
    again.evaluator.close()


def test_rl100_in_two_rounds_resumes_its_critic_to_the_bit(tmp_path: Path):
    """...from the checkpoint between the rounds: the second's critic goes on from the first's, and
    is not put back.
    """

    def learned(folder: Path, *pieces: int) -> Path:
        """The folder of a run that is stopped after each of these iterations but the last."""
        folder.mkdir()
        offline = {"episodes": 0, "rounds": 2, "candidates": 1, "recloning": 4}
        raw = rl100_toy.experiment(folder, method={"stage": "offline", "offline": offline})
        (folder / "experiment.yaml").write_text(yaml.safe_dump(raw))
        path = folder / "experiment.yaml"
        for iterations in pieces:
            budget = {"iterations": iterations}
            rewritten(path, lambda raw, budget=budget: raw.update(budget=budget), yaml)
            train(path)
            path = folder / "run/config.yaml"
        return folder / "run"

    whole, broken = learned(tmp_path / "whole", 6), learned(tmp_path / "broken", 4, 6)
    a, b = (weights(folder, 6) for folder in (whole, broken))
    found = same_state(a, b)
    assert all(found.values()), found
    assert a["parts"].keys() == {"best_of"}
    assert same(load(broken), load(whole))


# Folders that were saved before parts had a contract, see also test_old_folders.py


def test_a_shipped_policy_that_acts_loads_as_before():
    policy = load("assets/assembly-clone")
    section = {"name": "mlp", "pretrained": "assets/assembly-clone"}
    model = make("models", section, PERSON)
    assert not policy.parts
    assert not load_parts(section, model)
    sampler = parse.decode(
        type(saved("assets/assembly-clone").sampler),
        {"steps": 10, "kernel": {"name": "mean", "kernel": {"name": "ddim", "eta": 0.0}}},
        "the sampler",
    )
    by_hand = make_policy(model, sampler)
    size = sum(shape[0] for shape in model.shapes.values()) * model.history
    condition = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    noise = Noise.rows(0, 0, torch.arange(3), 1)
    x0 = policy.sample(condition, noise).x0
    assert torch.equal(x0, by_hand.sample(condition, noise).x0)
    assert not torch.equal(x0, by_hand.sample(condition + 0.1, noise).x0), "control"


def test_a_shipped_policy_that_draws_loads_as_before():
    policy = load("assets/shapes-sd3", steps=2)
    assert not policy.parts
    noise = Noise.rows(0, 0, torch.arange(1), 1)
    condition = policy.model.encode(Context(["a red circle"]))
    by_hand = make_policy(policy.model, saved("assets/shapes-sd3", steps=2).sampler)
    with torch.no_grad():
        drawn = [each.sample(condition, noise).x0 for each in (policy, by_hand)]
    assert torch.equal(*drawn)
    assert bool(drawn[0].isfinite().all())
