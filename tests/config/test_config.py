"""Configuration: YAML and overrides to experiments, strictly, and back."""

from dataclasses import asdict
from typing import Any

import pytest
import yaml

from genpolicy.chain import DDIM, EDM, SDE, ClipStd, Heun, Mean
from genpolicy.config import leaves, parse, shipped
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import ChainConfig, Experiment
from genpolicy.contracts.task import is_control
from genpolicy.methods.flow_grpo import FlowGRPO
from genpolicy.models.toy import Toy
from genpolicy.policy.files import completed
from genpolicy.policy.sampler import (
    deployed_sampler,
    kernels,
    make_kernel,
    make_policy,
    resampled,
)
from genpolicy.training.build import make_data, make_rewards, prompt_lines
from genpolicy.training.requirements import Needs
from tests import toy


def overridden(raw: dict[str, Any], *overrides: str) -> Experiment:
    for text in overrides:
        parse.override(raw, text)
    return parse.parse(raw)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        (".5e-3", 5e-4),
        ("-1e3", -1e3),
        ("1e-4 ", 1e-4),
        ("3", 3.0),
        ("0.1", 0.1),
    ],
)
def test_numbers_are_numbers(text: str, value: float):
    """PyYAML alone reads 1e-4 as text."""
    raw: dict[str, Any] = {}
    parse.override(raw, f"--optimizer.lr={text}")
    assert raw["optimizer"]["lr"] == value
    assert not isinstance(raw["optimizer"]["lr"], str)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("many", "many"),
        ("'1e-4'", "1e-4"),
        ("null", None),
        ("true", True),
        ("[0, 3]", [0, 3]),
        ("{name: sde, a: 1e-1}", {"name": "sde", "a": 0.1}),
        ("runs/a=b", "runs/a=b"),
        ("", None),
    ],
)
def test_override_values_are_yaml(text: str, value: Any):
    raw: dict[str, Any] = {}
    parse.override(raw, f"--a.b={text}")
    assert raw == {"a": {"b": value}}


def test_overrides_reach_into_bare_names(tmp_path):
    raw = toy.experiment(tmp_path, method="flow_grpo")
    experiment = overridden(
        raw, "--method.group=8", "--chain.kernel=sde", "--budget.iterations=1e3"
    )
    assert experiment.method == {"name": "flow_grpo", "group": 8}
    assert experiment.chain.kernel == {"name": "sde"}
    assert experiment.budget.iterations == 1000
    assert isinstance(experiment.budget.iterations, int)


def test_a_bare_name_means_its_defaults(tmp_path):
    bare = {
        "policy": "toy",
        "method": "flow_grpo",
        "reward": "shapes_strict",
        "chain": {"kernel": "cps"},
    }
    experiment = parse.parse(toy.experiment(tmp_path, **bare))
    assert leaves.make("methods", experiment.method, PERSON) == FlowGRPO()
    assert isinstance(leaves.make("models", experiment.policy, PERSON), Toy)
    assert experiment.reward == {"shapes_strict": 1.0}
    assert make_kernel(experiment.chain.kernel, PERSON) == kernels()["cps"]()


def test_config_yaml_is_the_experiment(tmp_path):
    experiment = overridden(
        toy.experiment(tmp_path), "--chain.window=[0,2]", "--optimizer.lr=1e-5", "--seed=7"
    )
    file = tmp_path / "config.yaml"
    file.write_text(parse.to_yaml(experiment))
    again = parse.load(file)
    assert again == experiment
    assert parse.to_yaml(again) == parse.to_yaml(experiment)
    assert again.chain.window == (0, 2)
    assert again.optimizer.lr == 1e-5


@pytest.mark.parametrize("name", sorted(shipped.configs()))
def test_every_shipped_config_parses(name: str):
    """Strictly, down to its leaves; rewards and models are not built, some need weights."""
    experiment = parse.load(name)
    leaves.make("methods", experiment.method, PERSON)
    task = leaves.make("tasks", experiment.task, PERSON)
    make_kernel(experiment.chain.kernel, PERSON)
    if is_control(task):
        assert not experiment.reward
    else:
        make_rewards(experiment.reward, PERSON)
    model = leaves.leaf("models", experiment.policy["name"], PERSON)
    known = set(model.__dataclass_fields__)
    assert set(experiment.policy) - {"name", "teacher"} <= known
    if experiment.eval.prompts is not None:
        assert prompt_lines(experiment.eval.prompts)
    judged = {*(f"reward/{name}" for name in experiment.reward), "success_rate", "return"}
    assert experiment.eval.select is None or experiment.eval.select in judged


@pytest.mark.parametrize("name", sorted(shipped.configs()))
def test_every_shipped_config_is_short_and_explained(name: str):
    lines = shipped.configs()[name].read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("# ")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ({"name": "ddim", "eta": "a"}, "eta is 'a'; it must be a number"),
        ({"name": "ddim", "eta": None}, "eta is None; it must be a number"),
        ({"name": "mean", "kernel": "heun"}, "kernel mean can't go around heun"),
        ({"name": "clipstd", "kernel": {"name": "sde"}}, "kernel clipstd can't go around sde"),
        (
            {"name": "floorstd", "floor": 0.1, "kernel": "sde"},
            "which has no std of its own; valid are clipstd, cps, ddim, floorstd",
        ),
        ({"name": "mean", "kernel": "heun"}, "which is no kernel; valid are clipstd, consistency"),
        ({"name": "clipstd"}, "goes around another one: name it as its key kernel, for example"),
        ({"name": "mean", "kernel": None}, "kernel needs a name"),
        ({"name": "chain"}, "there is no kernel 'chain'"),
    ],
)
def test_a_kernel_that_does_not_fit_is_one_sentence(kernel, said):
    with pytest.raises(ConfigError, match=said):
        make_kernel(kernel, PERSON)


@pytest.mark.parametrize(
    ("eta", "said"),
    [
        (-1.0, "at step 0; it must be at least 0"),
        (float("nan"), "kernel ddim: eta is nan; it must be a finite number"),
    ],
)
def test_a_kernel_without_a_std_is_one_sentence(eta, said):
    kernel = {"name": "ddim", "eta": eta}
    with pytest.raises(ConfigError, match=said):
        make_policy(Toy(), ChainConfig(steps=4, kernel=kernel))
    make_policy(Toy(), ChainConfig(steps=4))  # control


def test_a_grid_that_does_not_fall_is_one_sentence():
    model = Toy()
    model.schedule = EDM()
    with pytest.raises(ConfigError, match="5 steps do not fit below noise time"):
        make_policy(model, ChainConfig(steps=5, start=0.001))
    make_policy(model, ChainConfig(steps=5, start=0.5))  # control


def test_kernels_by_name_and_nested():
    assert make_kernel({"name": "mean", "kernel": "ddim"}, PERSON) == Mean(DDIM())
    assert make_kernel({"name": "sde", "a": 1.0}, PERSON) == SDE(1.0)
    assert make_kernel({"name": "heun"}, PERSON) == Heun()
    assert make_kernel(
        {"name": "clipstd", "kernel": {"name": "ddim"}, "high": 0.1}, PERSON
    ) == ClipStd(DDIM(), high=0.1)
    assert make_kernel({"name": "genpolicy.chain.kernel:DDIM", "eta": 0.5}, PERSON) == DDIM(0.5)


def test_dotted_leaves():
    assert leaves.leaf("models", "tests.toy:ToyModel", PERSON) is Toy
    assert leaves.make("rewards", {"name": "tests.toy:brightness"}, PERSON) is toy.brightness
    rewards = make_rewards(
        {"tests.toy:brightness": 0.5, "tests.toy:constant": {"weight": 2}}, PERSON
    )
    assert rewards.weights == {"brightness": 0.5, "constant": 2.0}


class Plain:
    """No dataclass: its settings are nobody's."""

    def __call__(self, outputs: Any, context: Any) -> Any: ...


def test_leaves_that_can_not_be_built():
    with pytest.raises(ConfigError, match="make it a @dataclass"):
        leaves.make("rewards", {"name": "tests.config.test_config:Plain"}, PERSON)
    with pytest.raises(ConfigError, match="takes no settings, got scale"):
        leaves.make("rewards", {"name": "tests.toy:brightness", "scale": 2}, PERSON)


def test_shipped_paths_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(prompt_lines("assets/shapes-sd3/captions_held_out.txt")) == 88
    assert parse.load("quickstart").method["name"] == "grpo_guard"


def test_defaults_are_valid_and_survive_yaml():
    chain = ChainConfig()
    assert (
        parse.decode(ChainConfig, yaml.safe_load(yaml.safe_dump(asdict(chain))), "chain") == chain
    )


@pytest.mark.parametrize(
    "section",
    [{"pretrained": 3}, {"train": "lora", "lora": "x"}, {"train": "lora", "lora": {"start": 3}}],
)
def test_a_section_that_names_no_folder_goes_on_from_no_policy(section):
    assert completed({"name": "toy", **section}) == {"name": "toy", **section}


@pytest.mark.parametrize("entry", [3, None, ["a"]])
def test_an_entry_of_the_data_section_that_is_no_data_set_is_one_sentence(entry):
    with pytest.raises(ConfigError, match="neither a folder nor a data set's section"):
        make_data([entry], PERSON)


def test_a_saved_window_that_is_no_window_is_one_sentence():
    with pytest.raises(ConfigError, match="window is 3"):
        resampled({"window": 3}, {})


@pytest.mark.parametrize(
    ("window", "before", "steps", "after"),
    [
        ((0, 4), 4, 2, (0, 2)),  # the whole chain
        ((0, 2), 4, 3, (0, 2)),
        ((5, 10), 10, 5, (3, 5)),  # the last K' of K steps: its base takes no step less
        ((5, 10), 10, 20, (10, 20)),
        ((5, 10), 10, 1, (0, 1)),
        ((0, 9), 10, 20, (0, 19)),  # all but the last
        ((8, 9), 10, 4, (2, 3)),
        ((2, 5), 10, 20, (4, 10)),
        ((0, 0), 10, 5, (0, 0)),  # none
        ((5, 10), 10, 10, (5, 10)),
    ],
)
def test_a_window_goes_with_the_number_of_steps(window, before, steps, after):
    own = {"steps": before, "window": list(window)}
    assert resampled(own, {"steps": steps}).window == after
    named = {"steps": steps, "window": [0, 1]}
    assert resampled(own, named).window == (0, 1), "what is named is taken"
    chain = ChainConfig(steps=before, window=window)
    assert deployed_sampler(chain, {"steps": steps}, control=True).window == after
    made = make_policy(Toy(), resampled(own, {"steps": steps}))
    assert (made.chain.stochastic.start, made.chain.stochastic.stop) == after


def test_a_window_without_a_number_of_steps_is_one_of_the_default():
    assert resampled({"window": [5, 10]}, {"steps": 20}).window == (10, 20)


@pytest.mark.parametrize("worlds", ["prompts", (), ("pictures",)])
def test_needs_of_worlds_that_there_are_not_are_one_sentence(worlds):
    with pytest.raises(ConfigError, match="a tuple of prompts and robots"):
        Needs(worlds)


def test_a_selected_reward_that_is_replaced_leaves_the_choice_to_the_sum(caplog):
    """Swapping a preset's reward on the command line needs no second override."""
    swapped = parse.load("grpo_guard_sd35m", ["--reward=jpeg_compressibility"])
    assert swapped.eval.select is None
    assert "eval.select is reward/pickscore" in caplog.text
    caplog.clear()
    kept = parse.load("grpo_guard_sd35m", ["--reward.jpeg_compressibility=0.1"])
    assert kept.eval.select == "reward/pickscore"
    wrong = parse.load(
        "grpo_guard_sd35m", ["--reward=jpeg_compressibility", "--eval.select=reward/jpeg"]
    )
    assert wrong.eval.select == "reward/jpeg", "a person's own mistake is not mended in silence"
    assert not caplog.text


def test_large_numbers_and_seeds_that_a_run_can_use_are_accepted():
    """The control of the bounds: one below each of them is a value."""
    raw = {"policy": "toy", "task": "prompts", "method": "bc", "seed": 2**63}
    raw |= {"budget": {"iterations": 2**31 - 1, "nfe": 9e18}, "eval": {"seed": 2**40}}
    found = parse.parse(raw)
    assert (found.seed, found.eval.seed) == (2**63, 2**40)
    assert (found.budget.iterations, found.budget.nfe) == (2**31 - 1, 9e18)
    for over in ({"iterations": 2**31}, {"nfe": 1e19}):
        with pytest.raises(ConfigError, match="must be below"):
            parse.parse({**raw, "budget": over})
