"""Experiments: a YAML, dataclasses, and the leaves they name. Two passes: names first, then the
leaves' own dataclasses.

A leaf is found by its file name (``method: grpo_guard`` is genpolicy/methods/grpo_guard.py) or by a
dotted path (``mypkg.mod:fn``). Its entry is the class or function of that file whose name equals
the file's, underscores and case aside.
"""

import dataclasses
import difflib
import importlib
import math
import pkgutil
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
import yaml

from genpolicy.config import shipped

KINDS = ("methods", "models", "rewards", "tasks", "datasets")
SHIPPED = ("assets/", "configs/", "robots/")
NAMED = ("policy", "task", "method", "kernel", "data")
"""Sections that name a leaf: a bare name means its defaults."""


class ConfigError(ValueError):
    """What is wrong with what the user asked for, in one sentence."""


def nearest(word: str, valid: Sequence[str]) -> str:
    """'; did you mean a, b?' or '; valid are ...', for error messages."""
    close = difflib.get_close_matches(word, valid, n=3)
    return (
        f"; did you mean {', '.join(close)}?"
        if close
        else f"; valid are {', '.join(sorted(valid))}"
    )


def choice(what: str, value: Any, valid: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``valid``."""
    if value not in valid:
        raise ConfigError(f"{what} is {value!r}{nearest(str(value), valid)}")


def at_least(where: str, section: Any, **least: float) -> None:
    """Raise unless every named field of ``section`` is None or a finite number of at least so much."""
    for name, low in least.items():
        value = getattr(section, name)
        if value is not None and not low <= value < math.inf:
            raise ConfigError(f"{where}: {name} is {value}; it must be at least {low}")


def positive(where: str, section: Any, *names: str) -> None:
    """Raise unless every named field of ``section`` is None or a finite number above 0."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{where}: {name} is {value}; it must be above 0")


def share(where: str, section: Any, *names: str) -> None:
    """Raise unless every named field of ``section`` lies in [0, 1]."""
    for name in names:
        value = getattr(section, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{where}: {name} is {value}; it must lie in [0, 1]")


def divides(where: str, section: Any, part: str, whole: str) -> None:
    """Raise unless the field ``part`` divides the field ``whole``."""
    small, large = getattr(section, part), getattr(section, whole)
    if large % small:
        raise ConfigError(
            f"{where}: {whole} is {large} and can't be split evenly into {part} = {small}; choose a multiple of it"
        )


@dataclass
class ChainConfig:
    """The sampler: how noise becomes a sample.

    steps: denoising steps K. kernel: {name, ...}: a class of genpolicy.chain (ddim, sde, cps, heun,
    dpmsolver, ...) or a dotted path. guidance: classifier-free scale, 1 is none. guidance_interval:
    [low, high] noise times it acts in. negative_gradient: train through the unconditional branch
    too, as some public scripts do (off: its backward is saved). window: [low, high) steps at which
    the kernel acts (default: all but the last), the ODE elsewhere. window_size: if set, that many
    consecutive steps are drawn from the window anew for every iteration. best_of: samples that are
    drawn for a decision; the policy's critic picks one.
    """

    steps: int = 10
    kernel: dict[str, Any] = field(default_factory=lambda: {"name": "ddim", "eta": 1.0})
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    negative_gradient: bool = False
    window: tuple[int, int] | None = None
    window_size: int | None = None
    best_of: int = 1

    def __post_init__(self) -> None:
        at_least("chain", self, steps=1, guidance=0, window_size=1, best_of=1)
        if (
            self.guidance_interval is not None
            and not self.guidance_interval[0] < self.guidance_interval[1]
        ):
            raise ConfigError(
                f"chain: guidance_interval is {list(self.guidance_interval)}; it must be [low, high] with low < high"
            )


@dataclass
class OptimizerConfig:
    """AdamW and what surrounds it.

    lr at its peak; warmup: updates of linear rise; final: the cosine ends at this share of lr (1:
    constant); max_grad_norm: global norm clip; ema: decay of the averaged weights that are
    evaluated and saved (0: none), min((1+n)/(10+n), ema) after update n. betas, eps, weight_decay:
    AdamW's.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    warmup: int = 0
    final: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        positive("optimizer", self, "lr", "eps", "max_grad_norm")
        at_least("optimizer", self, weight_decay=0, warmup=0, final=0, ema=0)
        for name, shares in (("betas", self.betas), ("ema", (self.ema,))):
            if not all(0 <= share < 1 for share in shares):
                raise ConfigError(
                    f"optimizer: {name} is {', '.join(map(str, shares))}; it must lie in [0, 1)"
                )


@dataclass
class BudgetConfig:
    """When to stop: at the first of these. nfe: network evaluations; env_decisions, env_steps:
    decisions and steps in environments; seconds: of wall-clock training, evaluation aside.
    """

    iterations: int | None = None
    nfe: float | None = None
    env_decisions: float | None = None
    env_steps: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = [f.name for f in dataclasses.fields(self)]
        positive("budget", self, *limits)
        if all(getattr(self, name) is None for name in limits):
            raise ConfigError(f"budget sets no limit; give one of {', '.join(limits)}")


@dataclass
class EvalConfig:
    """Periodic evaluation with the deployed sampler, on its own prompts (or starts) and one fixed
    noise.

    every: iterations between evaluations (0: only before and after). prompts: file, one a line
    (default: the task's). samples: images. episodes: in environments. select: the metric that
    decides policy_best. sampler: overrides of `chain` for the deployed sampler (default: the same
    steps and guidance, on prompts with the ODE, in environments with the mean of the kernel, see
    `Mean`). seed: of the evaluation noise, and the first of the environments' reset seeds, the same
    for every run that is to be compared.
    """

    every: int = 20
    prompts: str | None = None
    samples: int = 256
    episodes: int = 100
    select: str | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    seed: int = 1_000_003

    def __post_init__(self) -> None:
        at_least("eval", self, every=0, samples=1, episodes=1)


@dataclass
class Experiment:
    """One experiment = one YAML. The resolved form is written to the run's folder and is the file
    to resume from.
    """

    policy: dict[str, Any]
    task: dict[str, Any]
    method: dict[str, Any]
    reward: dict[str, Any] = field(default_factory=dict)  # of prompts; environments bring their own
    data: dict[str, Any] | list[Any] | None = (
        None  # recorded episodes to learn from; a list is several as one
    )
    chain: ChainConfig = field(default_factory=ChainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    budget: BudgetConfig = field(default_factory=lambda: BudgetConfig(iterations=100))
    eval: EvalConfig = field(default_factory=EvalConfig)
    threads: int | None = (
        None  # CPU threads of a process; small networks are fastest on 1 (default: torch's)
    )
    environments: int = 20  # side by side, in each process
    micro_batch: int | str = (
        "auto"  # rows of one forward and backward; auto: all, halved when memory runs out
    )
    checkpoint_every: int = 20  # iterations between checkpoints
    trackers: list[str] = field(default_factory=list)  # accelerate's: tensorboard, wandb, ...
    seed: int = 0
    output: str = "runs/experiment"

    def __post_init__(self) -> None:
        at_least("the experiment", self, checkpoint_every=1, threads=1, environments=1)
        if self.micro_batch != "auto" and not (
            isinstance(self.micro_batch, int) and self.micro_batch >= 1
        ):
            raise ConfigError(
                f"the experiment: micro_batch is {self.micro_batch!r}; it must be auto or a number of rows, at least 1"
            )
        if not self.output:
            raise ConfigError("the experiment: output is empty; it must name the run's folder")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2; PyYAML reads YAML 1.1, where it is a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a path or a shipped config's bare name."""
    try:
        found = shipped.find_config(str(path))
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from None
    try:
        raw = yaml.load(found.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} is not an experiment: it must be a YAML mapping with keys policy, task, method"
        )
    return raw


def override(raw: dict[str, Any], dotted: str) -> None:
    """Apply one ``--a.b=c`` to a raw config in place; the value is read as YAML."""
    key, equals, text = dotted.removeprefix("--").partition("=")
    if not dotted.startswith("--") or not equals or not all(key.split(".")):
        raise ConfigError(f"override {dotted!r} is not of the form --section.key=value")
    *sections, last = key.split(".")
    at: Any = raw
    for section in sections:
        if isinstance(at.get(section), str):
            at[section] = {"name": at[section]}
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise ConfigError(
                f"override {dotted!r}: {section} is a plain value and has no key {last!r}"
            )
    try:
        at[last] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {dotted!r}: its value is not readable YAML") from None


def parse(raw: Mapping[str, Any]) -> Experiment:
    """A raw mapping to an `Experiment`; unknown keys, wrong types and missing sections raise
    `ConfigError`.
    """
    raw = dict(raw)
    if isinstance(raw.get("reward"), str):
        raw["reward"] = {raw["reward"]: 1.0}
    return decode(Experiment, raw, "the experiment")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a YAML, apply the command line's overrides, and parse."""
    raw = read_yaml(path)
    for dotted in overrides:
        override(raw, dotted)
    return parse(raw)


def decode[T](kind: type[T], raw: Mapping[str, Any], where: str) -> T:
    """A mapping to the dataclass ``kind``, strictly; every complaint is one sentence that names the
    key.
    """
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    for key in raw:
        if key not in fields:
            raise ConfigError(f"{where} has no key {key!r}{nearest(str(key), list(fields))}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in raw:
            raise ConfigError(f"{where} needs the key {name!r}")
    hints = typing.get_type_hints(kind)
    values = {key: _value(hints[key], value, where, key) for key, value in raw.items()}
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (
        ValueError,
        OSError,
    ) as error:  # a field's own complaint; anything else is a bug and keeps its traceback
        raise ConfigError(" ".join(f"{where}: {error}".split())) from None


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """One field's value in its declared type."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return decode(hint, value, key if where == "the experiment" else f"{where}: {key}")
    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is dict and key in NAMED and isinstance(value, str):
        return {"name": value}
    if typing.get_origin(hint) is typing.Literal:
        choice(f"{where}: {key}", value, [str(kind) for kind in kinds])
    if isinstance(value, list) and list[Any] in kinds:
        return value  # draccus would make a mapping of it, where that is allowed too
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)  # 1e3
    try:
        if value is None and not {type(None), Any} & set(kinds):
            raise ValueError
        return draccus.decode(hint, value)
    except Exception:  # draccus raises whatever its decoders do, and says it in several lines
        raise ConfigError(f"{where}: {key} is {value!r}; it must be {_called(hint)}") from None


def _called(hint: Any) -> str:
    """What a person calls a type."""
    plain = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_called(arg) for arg in args)
    if origin is tuple:
        return f"a list of {len(args)}, each {_called(args[0])}"
    if origin is list:
        return f"a list, each {_called(args[0])}"
    return plain.get(hint, "a mapping of keys to values")


def names(kind: str) -> list[str]:
    """The shipped leaves of a kind, by file name."""
    package = importlib.import_module(f"genpolicy.{kind}")
    return sorted(
        m.name
        for m in pkgutil.iter_modules(package.__path__)
        if not m.ispkg and not m.name.startswith("_")
    )


def leaf(kind: str, name: str) -> Any:
    """The entry of a leaf: the class or function of genpolicy/<kind>/<name>.py, or of a dotted path
    ``pkg.mod:entry``.
    """
    if ":" in name:
        module_name, _, entry = name.partition(":")
        try:
            return getattr(importlib.import_module(module_name), entry)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{kind[:-1]} {name!r} can't be imported: {error}") from None
    if name not in names(kind):
        raise ConfigError(
            f"there is no {kind[:-1]} {name!r}{nearest(name, names(kind))} (or a dotted path pkg.mod:entry)"
        )
    module = importlib.import_module(f"genpolicy.{kind}.{name}")
    plain = name.replace("_", "")
    for attribute in vars(module):
        if attribute.lower().replace("_", "") == plain and callable(getattr(module, attribute)):
            return getattr(module, attribute)
    raise ConfigError(f"genpolicy/{kind}/{name}.py has no class or function named like the file")


def settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A leaf's own settings, with shipped paths (assets/..., configs/..., robots/...) resolved."""
    return {key: _resolve(value) for key, value in raw.items() if key != "name"}


def _resolve(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(SHIPPED):
        try:
            return str(shipped.path(value))
        except FileNotFoundError as error:
            raise ConfigError(str(error)) from None
    if isinstance(value, dict):
        return {key: _resolve(item) for key, item in value.items()}
    return value


def make(kind: str, raw: Mapping[str, Any]) -> Any:
    """Build a leaf from its section: a dataclass is decoded strictly, a plain function is returned
    as it is.
    """
    if not isinstance(raw.get("name"), str):
        raise ConfigError(
            f"the {kind[:-1]} section needs a name; valid are {', '.join(names(kind))}"
        )
    entry = leaf(kind, raw["name"])
    if isinstance(entry, type) and dataclasses.is_dataclass(entry):
        return decode(entry, settings(raw), f"{kind[:-1]} {raw['name']}")
    if isinstance(entry, type):
        raise ConfigError(
            f"{kind[:-1]} {raw['name']} is a plain class: make it a @dataclass, its fields are its settings"
        )
    if settings(raw):
        raise ConfigError(
            f"{kind[:-1]} {raw['name']} takes no settings, got {', '.join(settings(raw))}"
        )
    return entry


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML."""
    return yaml.safe_dump(_lists(dataclasses.asdict(experiment)), sort_keys=False)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
