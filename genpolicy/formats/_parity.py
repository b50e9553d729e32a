"""Parity: the exported graph against the policy that was exported, observation by observation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.model import ControlModel
from genpolicy.formats import _graph
from genpolicy.formats._capture import Draws, acting, captured, decide, doubled
from genpolicy.policy.policy import ChainPolicy, Judge

COUNTS = {"recorded": 400, "random": 400, "extreme": 200}
"""Observations of each kind; without recorded ones there are as many more random ones."""
EXTREME = 10.0
"""Standard deviations of an extreme observation, in every dim, to either side."""
BOUND = 1e-5
"""Largest error in normalised units."""
OWN = 2.0
"""An error of so many times the policy's own distance from fp64 is no error of the export."""
TIE = 1e-5
"""Two samples whose values differ by less, as a share of the largest value, are equally good: which
of them is picked is left to rounding.
"""
AT_ONCE = 100
"""Rows that are compared together."""
SEED = 0
"""Seed of the observations and of the noise."""


@dataclass(frozen=True)
class Parity:
    """The errors of an exported graph, in units of the network's own (normalised) actions.

    largest: by kind of observation, against torch in fp32. rounding: the largest distance of torch
    in fp32 from the same function in fp64. ties: decisions in which two samples were worth the same
    to the policy's critic, which are left out.
    """

    largest: Mapping[str, float]
    rounding: float
    bound: float
    observations: int
    ties: int

    @property
    def worst(self) -> float:
        """The largest error of all; not a number where an action is none."""
        return float(torch.tensor(list(self.largest.values())).max())

    @property
    def holds(self) -> bool:
        """True where no error is above the bound."""
        return self.worst <= self.bound

    def report(self) -> dict[str, Any]:
        """The contents of parity.json."""
        return {
            **asdict(self),
            "largest": self.worst,
            "by_kind": dict(self.largest),
            "units": "normalised",
        }

    def told(self) -> str:
        """The numbers in a sentence."""
        ties = f", {self.ties} ties left out" if self.ties else ""
        return (
            f"parity: largest error {self.worst:.1e} of {self.observations} observations{ties}"
            f" (bound {self.bound:.1e}; torch itself is {self.rounding:.1e} from fp64)"
        )


@torch.no_grad()
def measure(
    session: Any,
    policy: ChainPolicy,
    shape: tuple[int, ...],
    data: Dataset | None,
) -> Parity:
    """Runs the graph and the policy on the same observations and noise.

    shape: of the noise, [draws,*E].
    """
    model: ControlModel = policy.model  # type: ignore[assignment]  # its caller saw that it acts
    generator = torch.Generator().manual_seed(SEED)
    seen = observations(model, data, generator)
    gain = action_gain(model)
    largest = dict.fromkeys(seen, 0.0)
    rounding, ties, reference = 0.0, 0, None
    total = sum(len(next(iter(rows.values()))) for rows in seen.values())
    with tqdm(total=total, desc="parity", delay=5, leave=False, disable=None) as bar:
        for kind, rows in seen.items():
            for begin in range(0, len(next(iter(rows.values()))), AT_ONCE):
                some = {name: value[begin : begin + AT_ONCE] for name, value in rows.items()}
                noise = torch.randn(AT_ONCE, *shape, generator=generator)
                inputs = {**some, "noise": noise}
                judged = _Judged(policy)
                torchs = decide(judged.policy, some, Draws(noise))
                if reference is None:
                    reference = doubled(captured(acting(policy), *inputs.values()))
                exact = reference(*(value.double() for value in inputs.values()))
                theirs = []
                for row in range(AT_ONCE):
                    theirs.append(session.run(None, _graph.fed(inputs, row))[0])
                    bar.update()
                graphs = torch.cat([torch.from_numpy(actions) for actions in theirs])
                clear = judged.clear(AT_ONCE)
                ties += int((~clear).sum())
                error = ((graphs - torchs).abs() * gain)[clear]
                own = ((exact - torchs).abs() * gain)[clear]
                if error.numel():
                    # a comparison with NaN is false: NaN must not be lost in a maximum
                    largest[kind] = float(torch.tensor([largest[kind], float(error.max())]).max())
                    rounding = max(rounding, float(own.nan_to_num(0.0).max()))
    return Parity(largest, rounding, max(BOUND, OWN * rounding), total, ties)


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
        self.worth: Tensor | None = None
        self.policy = policy
        if policy.best_of > 1:
            judge: Judge = self._value
            self.policy = replace(policy, judge=judge)

    def _value(self, features: Tensor, event: Tensor) -> Tensor:
        assert self.judge is not None
        self.worth = self.judge(features, event)
        return self.worth

    def clear(self, rows: int) -> Tensor:
        """True for each row whose best sample is better than its next, bool [B]."""
        if self.worth is None:
            return torch.ones(rows, dtype=torch.bool)
        first, second = self.worth.view(rows, -1).topk(2, dim=1).values.unbind(1)
        return first - second > TIE * self.worth.abs().max()
