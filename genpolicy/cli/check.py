"""The verb check: tries on small inputs the laws that a reward or a method must keep."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from genpolicy.config import leaves, parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import Context
from genpolicy.evaluation import metrics_file
from genpolicy.training.build import load_rewards
from genpolicy.training.experiment import prepare, required
from genpolicy.training.processes import start_processes
from genpolicy.training.requirements import Needs, World

PROMPTS = (
    "a red circle left of a blue square",
    "a green triangle above a yellow circle",
    "a blue square right of a red circle",
    "a yellow square below a green square",
    "a red triangle left of a green circle",
    "a blue circle above a yellow triangle",
)
SIZE = 64
"""Height and width of the pictures that rewards are tried on, in pixels."""
ALONE = 1e-4
"""Largest difference of a row scored alone to the same row in a batch, relative to the largest
score: fp32 networks differ by about that.
"""
KINDS = {
    "method": ("train",),
    "kernel": ("coefficients",),
    "task": ("reset",),
    "task of environments": ("environments", "demonstrate"),
    "data set": ("rows",),
    "model": ("encode", "denoise", "decode"),
}


class Verdict(NamedTuple):
    """What became of a law; ``holds`` is None where it does not apply."""

    law: str
    holds: bool | None
    seen: str  # the evidence
    place: str = ""  # the world that it was tried in, where there are several


def run(args: Namespace) -> int:
    """Prints a verdict per law of ``args.leaf``; returns 0 if all hold, 1 if one does not. Raises
    `ConfigError` for what can't be checked.
    """
    dotted = _dotted(args.leaf)
    entry = leaves.leaf("leafs", dotted)
    kind = _kind(entry)
    laws: dict[str, Callable[[str], Iterator[Verdict]]] = {
        "reward": _reward_laws,
        "method": _method_laws,
    }
    if kind not in laws:
        raise ConfigError(f"{dotted} is a {kind}; check knows the laws of rewards and methods")
    print(f"{dotted} is a {kind}")
    kept, tried = True, []
    for verdict in laws[kind](dotted):
        mark = "--  " if verdict.holds is None else "ok  " if verdict.holds else "FAIL"
        place = f", on {verdict.place}" if verdict.place else ""
        seen = f": {verdict.seen}" if verdict.seen else ""
        print(f"  {mark}  {verdict.law}{place}{seen}")
        kept = kept and verdict.holds is not False
        tried += [verdict.law] if verdict.holds is not None else []
    outcome = "keeps every law" if kept else "breaks a law"
    print(f"{dotted} {outcome}; tried were: {'; '.join(dict.fromkeys(tried))}")
    return 0 if kept else 1


def _dotted(name: str) -> str:
    """The name mypkg.mod:entry of a module mypkg.mod: its entry is named like the file, or else the
    only public one.
    """
    if ":" in name:
        return name
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} can't be imported: {error}; give a module, mypkg.mod or mypkg.mod:entry"
        ) from None
    own = [
        attribute
        for attribute, value in vars(module).items()
        if callable(value)
        and not attribute.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]
    plain = name.rpartition(".")[2].replace("_", "")
    chosen = [attribute for attribute in own if attribute.lower().replace("_", "") == plain] or own
    if len(chosen) != 1:
        found = f"it has {', '.join(own)}" if own else "it has no public class or function"
        raise ConfigError(f"{name} does not say which entry is meant, {found}: give {name}:ENTRY")
    return f"{name}:{chosen[0]}"


def _kind(entry: Any) -> str:
    """The kind of a leaf, by what it can do."""
    for kind, methods in KINDS.items():
        if all(callable(getattr(entry, method, None)) for method in methods):
            return kind
    call = entry.__call__ if inspect.isclass(entry) else entry
    if not callable(call):
        raise ConfigError(f"{entry!r} is no leaf: it is neither a class nor a function")
    given = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
    if len([p for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]) == 2:
        return "reward"
    raise ConfigError(
        f"{getattr(entry, '__name__', entry)} is no leaf: a reward takes (outputs, context), "
        "a method has train(run), a model encode, denoise and decode, a task reset or "
        "environments, a data set rows, a kernel coefficients"
    )


# Rewards


def _pictures() -> Tensor:
    """Pictures [6,3,64,64] in [0, 1]: one plain, one noisy, the others smooth."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(len(PROMPTS), 3, 4, 4, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    pictures[1] = torch.rand(3, SIZE, SIZE, generator=generator)
    pictures[2] = 1.0
    return pictures


def _reward_laws(dotted: str) -> Iterator[Verdict]:
    rewards = WeightedRewards({dotted: (leaves.make("rewards", {"name": dotted}), 1.0)})
    load_rewards(rewards)
    pictures, context = _pictures(), Context(PROMPTS)

    def score(pictures: Tensor, context: Context) -> Tensor:
        return (
            torch.as_tensor(rewards.rewards[dotted][0](pictures, context)).detach().double().cpu()
        )

    kept = pictures.clone()
    together = score(pictures, context)
    shape = tuple(together.shape)
    whole = shape == (len(context),)
    yield Verdict("one number for every output", whole, f"shape {shape} for {len(context)} outputs")
    if not whole:
        return
    values = ", ".join(f"{value:.4g}" for value in together.tolist())
    yield Verdict("finite", bool(together.isfinite().all()), values)
    yield Verdict("leaves the outputs as they are", torch.equal(pictures, kept), "")
    again = score(pictures, context)
    same = torch.equal(together, again)
    yield Verdict("the same outputs get the same reward", same, _gap(together, again))
    alone = torch.cat(
        [score(pictures[i : i + 1], context[i : i + 1]).reshape(-1) for i in range(len(context))]
    )
    largest = ALONE * together.abs().max().clamp_min(1e-12)
    close = alone.shape == together.shape and bool((together - alone).abs().max() <= largest)
    law = "a row's reward does not depend on the others in its batch"
    yield Verdict(law, close, _gap(together, alone))


def _gap(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)}"
    return f"largest difference {float((a - b).abs().max()):.2g}"


# Methods

STATE = "observation.state"
"""The observation that the toy robots act on: the point's place."""
ITERATIONS = 6
"""Iterations of a run: the shipped methods of several stages reach their last one in so many."""
SMALL = {
    "groups": 4,
    "group": 4,
    "episodes": 16,
    "updates": 1,
    "epochs": 1,
    "warm_up": 0,
    "minibatch": 2**20,
    "batch": 16,
    "iterations": 1,
    "members": 2,
    "candidates": 1,
    "sweeps": 1,
    "states": 16,
    "starts": 4,
    "horizon": 2,
    "best_of": 2,
    "critic_updates": 2,
    "critic_epochs": 1,
    "model_updates": 2,
}
"""What whole numbers of these names become, in a method's settings and in the settings of its
stages: little to do, and one update per rollout.
"""
ODE = {"name": "ddim", "eta": 0.0}
LONG, SHORT = 100, 1
"""Environment steps in which even a new policy reaches a goal, and in which none can."""


def constant(outputs: Tensor, context: Context) -> Tensor:
    """A reward that is the same for every output: there is nothing to learn."""
    return torch.ones(len(outputs))


def brightness(outputs: Tensor, context: Context) -> Tensor:
    """A reward that teaches something."""
    return outputs.flatten(1).mean(1)


@dataclass
class Walks:
    """Recorded episodes of the toy robots' expert in memory, as a
    `genpolicy.contracts.dataset.Dataset`: their places, actions, rewards and successes.
    """

    episodes: int = 8  # reset seeds 0, 1, ...

    def __post_init__(self) -> None:
        task = leaves.make("tasks", _robots_task(LONG))
        self.fps = task.fps
        self._instruction: str = task.instruction
        made = [task.demonstrate(seed, 0.1) for seed in range(self.episodes)]
        lengths = torch.tensor([len(one.actions) for one in made])
        self.episode = torch.arange(len(made)).repeat_interleave(lengths)
        self._last = (lengths.cumsum(0) - 1)[self.episode]
        self._first = self._last + 1 - lengths[self.episode]
        place = torch.cat([one.observation[STATE] for one in made])
        actions = torch.cat([one.actions for one in made])
        ends = torch.arange(len(self.episode)) == self._last
        succeeded = torch.tensor([one.success for one in made])[self.episode]
        self.columns: Mapping[str, Tensor] = {
            STATE: place,
            "action": actions,
            "next.reward": torch.cat([one.rewards for one in made])[:, None],
            "next.success": (ends & succeeded).float()[:, None],
        }
        seen = {STATE: place, "action": actions}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(value.shape[1:]) for name, value in seen.items()
        }
        self.stats: Mapping[str, Mapping[str, Tensor]] = {
            name: _statistics(value) for name, value in seen.items()
        }

    def __len__(self) -> int:
        return len(self.episode)

    def rows(self, index: Tensor, history: int, actions: range) -> tuple[Context, Tensor, Tensor]:
        """See `genpolicy.contracts.dataset.Dataset`."""
        first, last = self._first[index, None], self._last[index, None]
        past = (index[:, None] + torch.arange(1 - history, 1)).clamp(first, last)
        asked = index[:, None] + torch.tensor(actions)
        context = Context([self._instruction] * len(index), {STATE: self.columns[STATE][past]})
        outside = (asked < first) | (asked > last)
        return context, self.columns["action"][asked.clamp(first, last)], outside


def _statistics(value: Tensor) -> dict[str, Tensor]:
    return {
        "min": value.amin(0),
        "max": value.amax(0),
        "mean": value.mean(0),
        "std": value.std(0),
        "q01": value.quantile(0.01, 0),
        "q99": value.quantile(0.99, 0),
    }


def _robots_task(limit: int) -> dict[str, Any]:
    """A point among goals in all four quarters: whichever way it goes it reaches one, and one of
    four is rewarded.
    """
    return {"name": "point_instructions", "goals": 4, "limit": limit}


@dataclass(frozen=True)
class Toy:
    """Sections of an experiment on small inputs.

    sections: all but method, budget and output. idle: what replaces some where there is nothing to
    learn from rewards.
    """

    sections: Mapping[str, Any]
    idle: Mapping[str, Any]


@dataclass(frozen=True)
class Tried:
    """A run on a toy, and what came of it.

    toy: the one that the method trains on. metrics: of each iteration. moved: an iteration changed
    the weights. differs: by how much they do where the last iteration was run again from its
    checkpoint; refused: why it could not be.
    """

    toy: Toy
    metrics: list[dict[str, Any]]
    moved: bool
    differs: float
    refused: str


def _method_laws(dotted: str) -> Iterator[Verdict]:
    """Trains a few iterations on the toy of each world that the method trains, with rewards that
    teach something, and one with rewards that do not.
    """
    method = leaves.make("methods", {"name": dotted})
    needs = required(method)
    section = {"name": dotted, **_small(method)}
    for world in needs.worlds:
        with tempfile.TemporaryDirectory() as folder:
            for verdict in _world_laws(section, needs, world, Path(folder)):
                yield verdict._replace(place=world)


def _small(settings: Any) -> dict[str, Any]:
    """The settings of a dataclass, and of those in it, that `SMALL` names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = _small(value)
        elif field.name in SMALL and type(value) is int:
            found[field.name] = SMALL[field.name]
    return found


def _world_laws(
    section: dict[str, Any], needs: Needs, world: World, folder: Path
) -> Iterator[Verdict]:
    learned = _fitting(section, _toys(needs, world, folder), folder)
    # what every method keeps
    cost = _first(learned.metrics, "nfe_per_sample") or 0
    yield Verdict("trains on the toy", bool(learned.metrics), f"{cost:.1f} evaluations per sample")
    lost = sorted({name for line in learned.metrics for name in line if line[name] is None})
    yield Verdict("what it logs is finite", not lost, ", ".join(lost))
    yield Verdict("the weights move", learned.moved, f"{len(learned.metrics)} iterations")
    same = not learned.refused and learned.differs == 0
    seen = learned.refused or f"largest difference {learned.differs:.2g}"
    yield Verdict("a resumed run is the uninterrupted one", same, seen)
    # what those keep that weigh likelihoods with advantages
    norm = _first(learned.metrics, "grad_norm")
    moves = None if norm is None else norm > 0
    yield Verdict("an advantage moves the policy", moves, f"gradient norm {norm}")
    yield _idle_law(section, needs, learned, folder)
    ratio = _first(learned.metrics, "policy/ratio_mean")
    seen = "it logs no policy/ratio_mean" if ratio is None else f"mean {ratio:.7f}"
    one = None if ratio is None else abs(ratio - 1) < 1e-5
    yield Verdict("the ratio is 1 on the first pass", one, seen)
    clipped = _first(learned.metrics, "policy/clip_fraction")
    seen = "it logs no policy/clip_fraction" if clipped is None else f"share {clipped:.3f}"
    none = None if clipped is None else clipped == 0
    yield Verdict("nothing is clipped on the first pass", none, seen)


def _idle_law(section: dict[str, Any], needs: Needs, learned: Tried, folder: Path) -> Verdict:
    """Tries one iteration with rewards that are all alike. A learned value finds advantages in
    them too, and recorded examples teach without any.
    """
    law = "no advantage, no gradient"
    if needs.data:
        return Verdict(law, None, "it learns from data")
    if _first(learned.metrics, "critic/loss") is not None:
        return Verdict(law, None, "it learns a value")
    idle = Toy({**learned.toy.sections, **learned.toy.idle}, {})
    _train(section, idle, folder / "idle", 1)
    norm = _first(_iterations(folder / "idle"), "grad_norm")
    return Verdict(law, None if norm is None else norm < 1e-7, f"gradient norm {norm}")


def _toys(needs: Needs, world: World, folder: Path) -> list[Toy]:
    """The toys of a world that give the method what it needs; a method may refuse some."""
    chain: dict[str, Any] = {"steps": 4}
    if needs.window and not needs.likelihoods:  # it brings its own noise
        chain |= {"kernel": ODE, "window": [0, 4]}
    if world == "prompts":
        return _picture_toys(needs, chain, folder)
    common = {
        "chain": chain,
        "task": _robots_task(LONG),
        "data": {"name": "genpolicy.cli.check:Walks"},
        "environments": 16,
    }
    network = {"name": "mlp", "hidden": 16, "blocks": 1, "chunk": 4, "inputs": [STATE]}
    gaussian = {"steps": 1, "window": [0, 1]}
    gaussian["kernel"] = {"name": "floorstd", "floor": 0.1, "kernel": ODE}
    idle = {"task": _robots_task(SHORT)}
    return [
        Toy({**common, "policy": {**network, "family": "flow"}}, idle),
        Toy({**common, "policy": {**network, "family": "vp"}}, idle),
        Toy({**common, "policy": {**network, "family": "gaussian"}, "chain": gaussian}, idle),
    ]


def _picture_toys(needs: Needs, chain: dict[str, Any], folder: Path) -> list[Toy]:
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    common: dict[str, Any] = {
        "chain": chain,
        "task": {"name": "prompts", "prompts": str(prompts)},
        "reward": {"genpolicy.cli.check:brightness": 1.0},
    }
    if needs.data:
        common["data"] = _captioned(folder / "pictures")
    idle = {"reward": {"genpolicy.cli.check:constant": 1.0}}
    return [
        Toy({**common, "policy": {"name": "toy", "family": family}}, idle)
        for family in ("flow", "vp")
    ]


def _captioned(folder: Path) -> dict[str, Any]:
    """The data section of a new folder of pictures, a prompt each."""
    folder.mkdir()
    lines = []
    for number, (prompt, picture) in enumerate(zip(PROMPTS, _pictures(), strict=True)):
        pixels = (picture.movedim(0, -1) * 255).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"name": "captioned_pictures", "root": str(folder), "height": 8, "width": 8}


def _fitting(section: dict[str, Any], toys: list[Toy], folder: Path) -> Tried:
    """The run on the first toy that the method does not refuse. Raises the first `ConfigError`
    where it refuses all.
    """
    refused = []
    for number, toy in enumerate(toys):
        try:
            return _tried(section, toy, folder / f"learned-{number}")
        except ConfigError as error:
            refused.append(error)
    raise refused[0]


def _tried(section: dict[str, Any], toy: Toy, folder: Path) -> Tried:
    """Trains on a toy, and the last iteration once more from its checkpoint."""
    start, end = _train(section, toy, folder, ITERATIONS)
    metrics = _iterations(folder)
    if not metrics:
        return Tried(toy, metrics, False, float("nan"), "it ran no iteration")
    moved = any(not torch.equal(a, b) for a, b in zip(start, end, strict=True))
    shutil.rmtree(folder / "checkpoints" / str(len(metrics)))
    try:
        _, again = _train(section, toy, folder, ITERATIONS)
    except ConfigError as error:
        return Tried(toy, metrics, moved, float("nan"), str(error))
    differs = max(float((a - b).abs().max()) for a, b in zip(end, again, strict=True))
    return Tried(toy, metrics, moved, differs, "")


def _iterations(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each iteration of a run."""
    return [line for line in metrics_file.read(folder) if "nfe_per_sample" in line]


def _first(metrics: list[dict[str, Any]], name: str) -> float | None:
    """The first value of a metric, None if it was never logged."""
    return next((line[name] for line in metrics if name in line), None)


def _train(
    section: dict[str, Any], toy: Toy, folder: Path, iterations: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The policy's weights before and after a run in a folder, which goes on where it has one."""
    experiment = parse.parse(
        {
            **toy.sections,
            "method": section,
            "budget": {"iterations": iterations},
            "eval": {"every": 0, "samples": 4, "episodes": 2},
            "checkpoint_every": 1,
            "output": str(folder),
        }
    )
    folder.mkdir(exist_ok=True)
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar: nobody asked for this run
        run, method = prepare(experiment, folder, start_processes(experiment, folder))
        start = [parameter.detach().clone() for parameter in run.trainable]
        with run:
            method.train(run)
    return start, [parameter.detach().clone() for parameter in run.trainable]
