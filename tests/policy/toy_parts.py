"""Runs of the toys whose policies have one part each, and the same without it, on disk."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config import parse
from genpolicy.contracts.task import Context
from genpolicy.learning.critic import Critic
from genpolicy.policy.files import load, save_policy
from genpolicy.policy.parts.base import Base
from genpolicy.policy.parts.best_of import BestOf
from genpolicy.policy.parts.editor import Editor
from genpolicy.policy.parts.learned_start import LearnedStart
from genpolicy.policy.parts.learned_std import LearnedStd
from genpolicy.policy.parts.noise_actor import NoiseActor
from genpolicy.policy.parts.refiner import Refiner
from genpolicy.policy.policy import ChainPolicy, Part
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run
from tests import toy, toy_control

BATCH = 8
"""Rows of an update."""
ITERATIONS = 4
STOCHASTIC = {"name": "ddim", "eta": 1.0}


# A method that learns parts


class Killed(BaseException):
    """The end of a run that nobody asked for."""


@dataclass
class Learning:
    """``method: {name: "tests.policy.toy_parts:Learning"}``: random targets for network and parts.

    parts: the ones that it attaches, in this order. updates: of one iteration. late: parts are
    attached inside the loop, at its first iteration. dies: the iteration that kills the run.
    """

    parts: list[str] = field(default_factory=list)
    updates: int = 1
    late: bool = False
    dies: int | None = None

    needs: ClassVar[Needs] = Needs()

    def train(self, run: Run) -> None:
        features = run.features
        own = run.policy.parts
        made = {name: own.get(name) or part(name, run.policy, features) for name in self.parts}
        learners = {}
        for name, value in made.items():
            if isinstance(value, BestOf | torch.nn.Module):
                module = value.critic if isinstance(value, BestOf) else value
                settings = run.experiment.optimizer
                learners[name] = run.new_optimizer(
                    module.requires_grad_(True).parameters(), settings
                )
        run.register(**{f"{name}_optimizer": value for name, value in learners.items()})
        if not self.late:
            run.attach(**made)
        for iteration in run.iterations():
            if self.late and not set(made) <= set(run.policy.parts):
                run.attach(**made)
            if iteration == self.dies:
                raise Killed
            for update in range(self.updates):
                self._update(run, made, learners, update)

    def _update(
        self, run: Run, made: Mapping[str, Part], learners: Mapping[str, Any], number: int
    ) -> None:
        policy, model = run.policy, run.policy.model
        context, place = run.contexts(BATCH)
        condition = model.encode(context)
        noise = run.noise("toy", place, number)
        event, disturbance = noise(0, model.event_shape).tanh(), noise(1, model.event_shape)
        t = model.times(run.mine(run.generator("times", number).random(BATCH)))

        def network(rows: slice) -> Tensor:
            return policy.supervised_loss(condition[rows], event[rows], t[rows], disturbance[rows])

        def beside(value: Any, rows: slice) -> Tensor:
            return _loss(value, model.features(condition)[rows], event[rows])

        run.descend(network, len(place), "network")
        for name, optimizer in learners.items():
            run.descend(partial(beside, made[name]), len(place), name, optimizer)
        if "base" in made:  # it follows the network
            base = run.policy.parts["base"]
            now = model.trainable()
            base.weights = {n: v.lerp(now[n].detach(), 0.1) for n, v in base.weights.items()}


def _loss(value: Any, features: Tensor, event: Tensor) -> Tensor:
    if isinstance(value, LearnedStd):
        return (value(torch.full((len(features),), 0.5), features) - 0.5).square().mean(1)
    if isinstance(value, LearnedStart):
        return -value(features, 1.0).log_prob(event, reduce="mean")
    if isinstance(value, NoiseActor):
        return (value.z(features).mode - event).square().flatten(1).mean(1)
    if isinstance(value, Editor):
        return (value.edits(features, event).mode - 0.1).square().flatten(1).mean(1)
    return value.critic.loss(features, event, event.flatten(1).sum(1)).mean(0)


def part(name: str, policy: ChainPolicy, features: int) -> Part:
    """A part that changes what the policy does, the same whenever it is made."""
    generator = torch.Generator().manual_seed(len(name))
    shape = tuple(policy.model.event_shape)
    if name == "base":
        weights = {
            n: p.detach() + 0.3 * torch.randn(p.shape, generator=generator)
            for n, p in policy.model.trainable().items()
        }
        return Base(weights, float(policy.chain.grid[len(policy.chain.grid) // 2]))
    if name == "refiner":
        return Refiner(steps=3, rate=0.3)
    made: Any = {
        "best_of": lambda: Critic(features, math.prod(shape), members=2, hidden=8),
        "std": lambda: LearnedStd(features, math.prod(shape), 0.2, 1.5, hidden=8),
        "start": lambda: LearnedStart(features, shape),
        "noise_actor": lambda: NoiseActor(features, shape, 1.5, hidden=8),
        "editor": lambda: Editor(features, math.prod(shape), 0.5, hidden=8),
    }[name]()
    for parameter in made.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return BestOf(made, 0.5) if name == "best_of" else made


# The rows of the table


@dataclass(frozen=True)
class Row:
    """A policy with a part.

    parts: what the method attaches; the last of them is the row's. policy, chain, sampler: sections
    of the experiment, the last of them eval.sampler. saved: the part lies beside the policy that
    the run goes on from.
    """

    parts: tuple[str, ...] = ()
    policy: Mapping[str, Any] = field(default_factory=dict)
    chain: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)
    saved: bool = False


STUDENT = {"steps": 1, "kernel": {"name": "ddim", "eta": 0.0}}
LEROBOT = {
    "name": "lerobot_diffusion",
    "device": "cpu",
    "config": {
        "n_obs_steps": 1,
        "horizon": 4,
        "n_action_steps": 2,
        "down_dims": [8, 16],
        "diffusion_step_embed_dim": 8,
        "n_groups": 4,
        "num_train_timesteps": 100,
    },
}
ROWS = {
    "base": Row(("base",)),
    "best_of": Row(("best_of",), sampler={"best_of": 4}, saved=True),
    "std": Row(("std",), sampler={"kernel": STOCHASTIC}),
    "start": Row(("start",)),
    "noise_actor": Row(("noise_actor",)),
    "refiner": Row(("best_of", "refiner")),
    "editor": Row(("best_of", "editor")),
    "head": Row(policy={"prediction_type": "sample"}, chain={**STUDENT, "start": 0.6}),
    "grid": Row(
        policy={**LEROBOT, "prediction_type": "sample"}, chain={**STUDENT, "grid": "native"}
    ),
}


def experiment(world: str, name: str, folder: Path, **sections: Any) -> dict[str, Any]:
    """A raw experiment of a row in a world, "robots" or "prompts"; output folder/run."""
    row = ROWS[name]
    robots = world == "robots"
    own = {"name": "mlp", "hidden": 8, "blocks": 1, "chunk": 2}
    if not robots:
        own = {"name": "toy", "hidden": 8, **({"family": "vp"} if name == "head" else {})}
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "policy": {**({} if "name" in row.policy else own), **row.policy},
        "chain": {"steps": 4, "kernel": STOCHASTIC, **row.chain},
        "method": {"name": "tests.policy.toy_parts:Learning", "parts": list(row.parts)},
        "optimizer": {"lr": 0.01, "eps": 1e-4},
        "budget": {"iterations": ITERATIONS},
        "checkpoint_every": 2,
        "eval": {"every": 0, "sampler": dict(row.sampler)}
        | ({"episodes": 4} if robots else {"samples": 4}),
        **sections,
    }
    if robots:
        data = {"name": "tests.toy_control:Recorded", "episodes": 4}
        return toy_control.experiment(folder, data=data, environments=4, **raw)
    return toy.experiment(folder, threads=1, **raw)


def prepared(
    world: str, name: str, folder: Path, accelerator: Any = None, **sections: Any
) -> tuple[Run, Any]:
    """The run of a row's experiment before it begins, and its method."""
    raw = experiment(world, name, folder, **sections)
    if ROWS[name].saved and "pretrained" not in raw["policy"]:
        raw["policy"] = {**raw["policy"], "pretrained": _before(world, name, folder)}
    processes = Processes(accelerator or Accelerator(cpu=True))
    (folder / "run").mkdir(exist_ok=True)
    return prepare(parse.parse(raw), folder / "run", processes)


def _before(world: str, name: str, folder: Path) -> str:
    """The folder of an untrained policy with the row's parts."""
    home = folder / "before"
    if not home.exists():
        raw = experiment(world, name, folder)
        raw["eval"].pop("sampler")
        run, _ = prepare(parse.parse(raw), folder / "run", Processes(Accelerator(cpu=True)))
        with run:
            policy, features = run.policy, run.features
            for each in ROWS[name].parts:
                policy = policy.attach(each, part(each, policy, features))
            save_policy(policy, run.experiment.policy, run.experiment.chain, home)
    return str(home)


def trained(world: str, name: str, folder: Path, **sections: Any) -> Run:
    """A row's run at its end, in folder/run."""
    run, method = prepared(world, name, folder, **sections)
    method.train(run)
    return run


# A run with its part taken out


def without(name: str, home: Path, to: Path) -> Path:
    """A copy of a run's folder whose policy and experiment have lost the row's part, and nothing
    else.
    """
    row = ROWS[name]
    shutil.copytree(home, to)
    rewritten(to / "policy/genpolicy.json", partial(_forget, row), json)
    rewritten(to / "config.yaml", partial(_forget, row), yaml)
    if row.parts:
        shutil.rmtree(to / "policy/parts" / row.parts[-1])
    return to


def _forget(row: Row, description: dict[str, Any]) -> None:
    description.get("parts", {}).pop(row.parts[-1] if row.parts else "", None)
    description.get("eval", {}).get("sampler", {}).pop("best_of", None)
    description["chain"]["best_of"] = 1
    if "start" in row.chain:
        description["policy"]["prediction_type"] = "epsilon"
    if "grid" in row.chain:
        description["chain"]["grid"] = "own"


def rewritten(file: Path, change: Callable[[dict[str, Any]], None], language: Any = json) -> None:
    """Change what a JSON or YAML file says, and leave the checksums out that it has."""
    load_text = getattr(language, "safe_load", None) or language.loads
    dump_text = getattr(language, "safe_dump", None) or language.dumps
    description = load_text(file.read_text())
    for checksums in ("crc32", "files"):
        description.pop(checksums, None)
    change(description)
    file.write_text(dump_text(description))


# What policies do


def acted(policy: ChainPolicy) -> Tensor:
    """x0 [6,*E] of fixed conditions and noise."""
    rows = torch.arange(6)
    model: Any = policy.model
    context = Context([toy.PROMPTS[row % 4] for row in rows.tolist()])
    if model.acts:
        context, _, _ = toy_control.Recorded(episodes=4).rows(rows, model.history, range(1))
    with torch.no_grad():
        return policy.sample(model.encode(context), Noise.rows(0, 7, rows, 1), keep=(0, 0)).x0


def same(one: ChainPolicy, other: ChainPolicy) -> bool:
    """True where two policies do the same, bit for bit."""
    return torch.equal(acted(one), acted(other))


def apart(one: ChainPolicy, other: ChainPolicy) -> float:
    """The largest distance of what two policies do."""
    return float((acted(one) - acted(other)).abs().max())


def reloaded(policy: ChainPolicy, run: Run, folder: Path) -> ChainPolicy:
    """A policy, saved with the sampler that the run deploys and loaded again."""
    save_policy(policy, run.experiment.policy, run.deployment.sampler, folder)
    return load(folder)
