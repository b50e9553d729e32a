"""Parity: the exported graph against the policy that was exported, observation by observation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm

from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.model import ControlModel
from genpolicy.formats import _graph
from genpolicy.formats._capture import acting, captured, doubled
from genpolicy.formats._half import halved
from genpolicy.policy.policy import ChainPolicy, Judge

COUNTS = {"recorded": 400, "random": 400, "extreme": 200}
"""Observations of each kind; without recorded ones there are as many more random ones."""
EXTREME = 10.0
"""Standard deviations of an extreme observation, in every dim, to either side."""
BOUND = 1e-5
"""Largest error in normalised units."""
MOST_TIES = 0.5
"""Share of the observations that may be ties; what is left out vouches for nothing."""
COARSE = 0.05
"""Distance of torch's own half precision from fp32, normalised, above which a person is told."""
OWN = {"fp32": 2.0, "fp16": 4.0}
"""An error of so many times torch's own rounding is no error of the export, by the precision of the
graph. Two half precisions that round each in its own order are twice their rounding apart, and
another twice is left for what is rarer than the observations show.
"""
TIE = {"fp32": 1e-5, "fp16": 1e-2}
"""Two samples whose values differ by less, as a share of the largest value, are equally good: which
of them is picked is left to rounding.
"""
DECISIONS = 4
"""Decisions in a row of a policy with a warm start: an episode's first one and three later ones."""
AT_ONCE = 100
"""Rows that are compared together."""
SEED = 0
"""Seed of the observations and of the noise."""


@dataclass(frozen=True)
class Parity:
    """The errors of an exported graph, in units of the network's own (normalised) actions.

    by_kind: the largest distance of the graph's actions from the policy's, by kind of observation:
        from the policy in torch, or, of a graph in fp32, from the same function in fp64 where that
        is nearer.
    rounding: the largest distance of the policy in torch from itself in fp64; of a graph in fp16
        that of the policy in torch's own half precision from itself in fp32.
    observations: how many were compared.
    ties: decisions in which two samples were worth the same to the policy's critic; left out.
    precision: of the graph's networks, "fp32" or "fp16".
    """

    by_kind: Mapping[str, float]
    rounding: float
    observations: int
    ties: int
    precision: str = "fp32"

    @property
    def largest(self) -> float:
        """The largest error of all; not a number where an action is none."""
        return float(torch.tensor(list(self.by_kind.values())).max())

    @property
    def bound(self) -> float:
        """The largest error that is none of the export's."""
        return max(BOUND, OWN[self.precision] * self.rounding)

    @property
    def holds(self) -> bool:
        """True where no error is above the bound."""
        return self.largest <= self.bound

    def report(self) -> dict[str, Any]:
        """The contents of parity.json."""
        numbers = {"largest": self.largest, "bound": self.bound, "units": "normalised"}
        return {**numbers, **asdict(self)}

    def told(self) -> str:
        """The numbers in a sentence."""
        ties = f", {self.ties} ties left out" if self.ties else ""
        torchs = {
            "fp32": f"torch itself is {self.rounding:.1e} from fp64",
            "fp16": f"torch's own half precision is {self.rounding:.1e} from fp32",
        }[self.precision]
        said = (
            f"parity: largest error {self.largest:.1e} of {self.observations} observations{ties}"
            f" (bound {self.bound:.1e}; {torchs})"
        )
        if self.precision == "fp16" and self.rounding > COARSE:
            said += (
                "\nhalf precision is coarse for this policy, whose normalised actions are of size"
                " 1: judge the exported folder with genpolicy evaluate before it moves anything"
            )
        return said


@torch.no_grad()
def measure(
    sessions: Sequence[Any],
    policy: ChainPolicy,
    shape: tuple[int, ...],
    data: Dataset | None,
    instruction: str = "",
    precision: str = "fp32",
) -> Parity:
    """Runs the graphs and the policy on the same observations and noise.

    sessions: the policy's one, or those of an episode's first and of its later decisions.
    shape: of the noise of a decision, [draws,*E]. precision: of the graphs' networks. Raises
    `ConfigError` where what was written down of the policy is not what acts.
    """
    model: ControlModel = policy.model  # type: ignore[assignment]  # its caller saw that it acts
    generator = torch.Generator().manual_seed(SEED)
    draws, *event = shape
    draws *= 1 if policy.warm is None else DECISIONS
    seen = observations(model, data, generator)
    gain = action_gain(model)
    play = playing(policy, instruction)
    by_kind: dict[str, float] = {}
    rounding, total, ties, exact = 0.0, sum(map(_rows, seen.values())), 0, None
    with tqdm(total=total, desc="parity", delay=5, leave=False, disable=None) as bar:
        for kind, rows in seen.items():
            for begin in range(0, _rows(rows), AT_ONCE):
                inputs = {name: value[begin : begin + AT_ONCE] for name, value in rows.items()}
                inputs["noise"] = torch.randn(AT_ONCE, draws, *event, generator=generator)
                # the policy, and how clearly it picked
                judged = _Judged(policy)
                wanted = playing(judged.policy, instruction)(*inputs.values())
                clear = judged.clear(AT_ONCE, TIE[precision])
                if exact is None:
                    exact = _exact(play, inputs, wanted)
                # the graphs
                got = torch.cat([_run(sessions, inputs, row, bar) for row in range(AT_ONCE)])
                error = (got - wanted).abs() * gain
                if precision == "fp16":
                    own = (wanted - halved(play)(*inputs.values())).abs() * gain
                    rounding = max(rounding, _largest(own[clear].nan_to_num()))
                # fp64 takes long: once of each kind, and where there is something to explain
                elif kind not in by_kind or not float(error.max()) <= BOUND:
                    precise = exact(*(value.double() for value in inputs.values()))
                    own = (wanted - precise).abs() * gain
                    rounding = max(rounding, _largest(own[clear].nan_to_num()))
                    error = error.fmin((got - precise).abs() * gain)
                ties += int((~clear).sum())
                by_kind[kind] = _largest(error[clear], by_kind.get(kind, 0.0))
    if ties > MOST_TIES * total:
        raise ConfigError(
            f"in {ties} of {total} observations the policy's critic finds two samples worth the"
            " same, so that the graph can't be compared with the policy: the critic has learned"
            " nothing to pick by; export without it (--sampler best_of=1)"
        )
    return Parity(by_kind, rounding, total, ties, precision)


def _largest(values: Tensor, other: float = 0.0) -> float:
    """The largest of the values, which may be none, and another one; NaN where one is NaN."""
    return float(torch.cat([values.flatten(), values.new_tensor([other])]).max())


def _rows(observation: Mapping[str, Tensor]) -> int:
    return len(next(iter(observation.values())))


def playing(policy: ChainPolicy, instruction: str = "") -> Callable[..., Tensor]:
    """The actions of a decision as `acting` gives them; with a warm start those of `DECISIONS` that
    follow one another on one observation, [B,DECISIONS n,D], with as many times the noise.
    """
    if policy.warm is None:
        return acting(policy, instruction)
    first, later = (acting(policy, instruction, late) for late in (False, True))

    def play(*values: Tensor) -> Tensor:
        *seen, noise = values
        begins, *others = noise.chunk(DECISIONS, 1)
        actions, plan = first(*seen, begins)
        every = [actions]
        for drawn in others:
            actions, plan = later(*seen, plan, drawn)
            every.append(actions)
        return torch.cat(every, 1)

    return play


def _run(sessions: Sequence[Any], inputs: Mapping[str, Tensor], row: int, bar: Any) -> Tensor:
    """The actions of the graphs for one row, as `playing` gives them, [1,n,D]."""
    bar.update()
    feed = _graph.fed(inputs, row)
    if len(sessions) == 1:
        return torch.from_numpy(sessions[0].run(None, feed)[0])
    first, later = sessions
    begins, *others = np.split(feed["noise"], DECISIONS, 1)
    actions, plan = first.run(None, {**feed, "noise": begins})
    every = [actions]
    for drawn in others:
        actions, plan = later.run(None, {**feed, "noise": drawn, "previous": plan})
        every.append(actions)
    return torch.from_numpy(np.concatenate(every, 1))


def _exact(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor], wanted: Tensor
) -> GraphModule:
    """The policy in fp64, a function of as many rows as ``inputs`` have; in fp32 what was written
    down must give the actions that are ``wanted`` of these, or it would excuse its own mistakes.
    """
    graph = captured(function, *inputs.values())
    if not torch.allclose(graph(*inputs.values()), wanted, rtol=1e-6, atol=0.0):
        raise ConfigError(
            "the policy can't be written down as one graph: running it once and running what was"
            " written down give different actions"
        )
    return doubled(graph)


def action_gain(model: ControlModel) -> Tensor:
    """The normalised units per unit of each of the environment's actions, [D]."""
    ends = [torch.full((1, len(model.horizon), model.action_dim), end) for end in (0.0, 1.0)]
    low, high = (model.event(end)[0, 0, : model.action_dim].double().cpu() for end in ends)
    return (high - low).abs()


def observations(
    model: ControlModel, data: Dataset | None, generator: torch.Generator
) -> dict[str, dict[str, Tensor]]:
    """The observations to compare on, kind -> name -> [n,history,*shape]: frames of the data set,
    spread over it, where it is there; standard normal ones, and extreme ones, in normalised units.
    Pictures are uniform noise in [0,1], and extreme ones black and white.
    """
    counts = dict(COUNTS)
    found: dict[str, dict[str, Tensor]] = {}
    if data is not None:
        index = torch.linspace(0, len(data) - 1, counts["recorded"]).round().long()
        context, _, _ = data.rows(index, model.history, range(1))
        found["recorded"] = {name: context.observation[name].float() for name in model.shapes}
    else:
        counts["random"] += counts["recorded"]
    for kind in ("random", "extreme"):
        standard: dict[str, Tensor] = {}
        for name, shape in model.shapes.items():
            size = (counts[kind], model.history, *shape)
            picture = len(shape) == 3
            drawn = (torch.rand if picture else torch.randn)(size, generator=generator)
            if kind == "extreme":
                drawn = drawn.round() if picture else EXTREME * drawn.sign()
            standard[name] = drawn
        found[kind] = model.observations(standard)
    return found


class _Judged:
    """A policy that picks the best of its samples, and remembers how clearly."""

    def __init__(self, policy: ChainPolicy) -> None:
        self.judge = policy.judge
        self.worth: list[Tensor] = []  # of every decision
        self.policy = policy
        if policy.best_of > 1:
            judge: Judge = self._value
            self.policy = replace(policy, judge=judge)

    def _value(self, features: Tensor, event: Tensor) -> Tensor:
        assert self.judge is not None
        self.worth.append(self.judge(features, event))
        return self.worth[-1]

    def clear(self, rows: int, tie: float) -> Tensor:
        """True for each row whose best sample is better than its next, in every decision and by
        more than ``tie`` of the largest value: bool [B].
        """
        found = torch.ones(rows, dtype=torch.bool)
        for worth in self.worth:
            first, second = worth.view(rows, -1).topk(2, dim=1).values.unbind(1)
            found &= first - second > tie * worth.abs().max()
        return found
