"""The laws that a method must keep, tried on toys of every world that it needs."""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from genpolicy.cli.law_toys import ITERATIONS, Toy, small, toys
from genpolicy.cli.reward_laws import Verdict
from genpolicy.config import leaves, parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON
from genpolicy.evaluation import metrics_file
from genpolicy.training import checkpoint
from genpolicy.training.prepare import prepare, required
from genpolicy.training.processes import start_processes
from genpolicy.training.requirements import Needs, World


@dataclass(frozen=True)
class Tried:
    """A run on a toy, and what came of it.

    toy: the one that the method trains on. metrics: of each iteration. moved: the last iteration
    changed the weights or a part of the policy. differs: the largest difference of everything that
    the run saves, where the last iteration was run again from its checkpoint; refused: why it could
    not be.
    """

    toy: Toy
    metrics: list[dict[str, Any]]
    moved: bool
    differs: float
    refused: str


def method_laws(dotted: str) -> Iterator[Verdict]:
    """Trains a few iterations on the toy of each world that the method trains, with rewards that
    teach something, and one with rewards that do not.
    """
    method = leaves.make("methods", {"name": dotted}, PERSON)
    needs = required(method)
    section = {"name": dotted, **small(method)}
    for world in needs.worlds:
        with tempfile.TemporaryDirectory() as folder:
            for verdict in _world_laws(section, needs, world, Path(folder)):
                yield verdict._replace(place=world)


def _world_laws(
    section: dict[str, Any], needs: Needs, world: World, folder: Path
) -> Iterator[Verdict]:
    learned = _fitting(section, toys(needs, world, folder), folder)
    # what every method keeps
    cost = _first(learned.metrics, "nfe_per_sample") or 0
    yield Verdict("trains on the toy", bool(learned.metrics), f"{cost:.1f} evaluations per sample")
    lost = sorted({name for line in learned.metrics for name in line if line[name] is None})
    yield Verdict("what it logs is finite", not lost, ", ".join(lost))
    yield Verdict("the weights or parts move", learned.moved, f"{len(learned.metrics)} iterations")
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
    _train(section, toy, folder, ITERATIONS)
    metrics = _iterations(folder)
    if not metrics:
        return Tried(toy, metrics, False, float("nan"), "it ran no iteration")
    whole = checkpoint.latest(folder)
    shutil.rmtree(folder / "checkpoints" / str(len(metrics)))
    moved = _difference(_acting(whole), _acting(checkpoint.latest(folder))) != 0
    try:
        _train(section, toy, folder, ITERATIONS)
    except ConfigError as error:
        return Tried(toy, metrics, moved, float("nan"), str(error))
    differs = _difference(_tensors(whole), _tensors(checkpoint.latest(folder)))
    return Tried(toy, metrics, moved, differs, "")


def _acting(state: dict[str, Any] | None) -> list[Tensor]:
    """The tensors of a checkpoint that act: the policy's weights and its parts."""
    return (
        [] if state is None else _tensors({name: state[name] for name in ("parameters", "parts")})
    )


def _tensors(state: Any) -> list[Tensor]:
    """All tensors in nested lists and mappings, in order."""
    if isinstance(state, Tensor):
        return [state.detach().double()]
    values = state.values() if isinstance(state, dict) else state
    if not isinstance(state, dict | list | tuple):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of two lists of tensors; infinity where they do not match."""
    if [a.shape for a in one] != [b.shape for b in other]:
        return float("inf")
    pairs = zip(one, other, strict=True)
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def _iterations(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each iteration of a run."""
    return [line for line in metrics_file.read(folder) if "nfe_per_sample" in line]


def _first(metrics: list[dict[str, Any]], name: str) -> float | None:
    """The first value of a metric, None if it was never logged."""
    return next((line[name] for line in metrics if name in line), None)


def _train(section: dict[str, Any], toy: Toy, folder: Path, iterations: int) -> None:
    """Trains in a folder, and goes on where it has a run."""
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
        with run:
            method.train(run)
