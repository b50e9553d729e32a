"""Critics: ensembles of values, what they regress on, and how pessimistically they are read.

Besides the legend of `genpolicy.chain`: **M** members of an ensemble, **F** features of an
observation, **T** rewards of one decision, of which the first ``executed`` count. Everything is a
number per member and row, [M,B], reduced by nobody: the caller averages, so a weight or a mask of
rows needs no option here.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

READOUT = 0.1
"""The readout's first weights, as a part of a linear layer's usual ones: values start within a few
hundredths of 0.
"""
STILL = 0.05
"""Least std that a feature is divided by: one that hardly moved in the data is not to be made much
of where it does.
"""


@dataclass(frozen=True)
class Support:
    """Values as histograms, HL-Gauss (arXiv 2403.03950): y becomes what N(y, s^2) gives to each
    bin, p_i = Phi((e_{i+1} - y) / s) - Phi((e_i - y) / s), over their sum; a histogram is read as
    sum_i p_i c_i, c_i the centre.

    low, high: the values that can be told apart, others count as the nearer end. bins: how many, of
    one width, over [low - margin s, high + margin s]. sigma: s in widths of a bin. margin: in units
    of s; without it N(y, s^2) is cut at the ends, and an end is read .7 of a width too far inside
    (PA-RL's public code has none, and divides by sqrt(2) s inside a CDF that expects s). As set
    here what is read is off by 1e-4 of a width at most.
    """

    low: float
    high: float
    bins: int = 51
    sigma: float = 0.75
    margin: float = 4.0

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(
                f"support reaches from {self.low} to {self.high}; low must be below high, and both"
                " finite"
            )
        if self.sigma <= 0 or self.margin < 0:
            raise ValueError(
                f"support's sigma {self.sigma} must be above 0 and its margin {self.margin} at"
                " least 0"
            )
        if self.bins <= 2 * self.margin * self.sigma + 1:
            need = math.floor(2 * self.margin * self.sigma + 1) + 1
            raise ValueError(
                f"support has {self.bins} bins, its margins alone take more;"
                f" valid are {need} and up"
            )

    @property
    def width(self) -> float:
        """The width of a bin: (high - low) / (bins - 2 margin sigma)."""
        return (self.high - self.low) / (self.bins - 2 * self.margin * self.sigma)

    def edges(self, like: Tensor) -> Tensor:
        """[bins+1], of the type and on the device of ``like``."""
        pad = self.margin * self.sigma * self.width
        return torch.linspace(
            self.low - pad, self.high + pad, self.bins + 1, dtype=like.dtype, device=like.device
        )

    def encode(self, value: Tensor) -> Tensor:
        """Histograms of values: [...] -> [...,bins], each summing to 1."""
        distance = self.edges(value) - value.clamp(self.low, self.high).unsqueeze(-1)
        mass = torch.erf(distance / (math.sqrt(2) * self.sigma * self.width)).diff(dim=-1)
        return mass / mass.sum(-1, keepdim=True)

    def decode(self, probabilities: Tensor) -> Tensor:
        """Their means: [...,bins] -> [...]."""
        return probabilities @ (self.edges(probabilities)[:-1] + self.width / 2)


class Standard(nn.Module):
    """(x - centre) / spread of what a critic sees [...,n]; as it is before `fit`.

    An encoder that imitation has shaped says different things about different states in numbers
    that differ by a tenth (behind a LayerNorm); IQL on those gave values without order: on 120
    episodes from pictures held-out AUC of V at the start of an episode .56, standardised .90
    (docs/rl100.md).
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))

    def fit(self, features: Tensor) -> None:
        """Standardises from now on by the mean and std of features [B,F], the first F of the n
        numbers; the others, an event's, come scaled.
        """
        size = features.shape[1]
        self.centre[:size] = features.mean(0)
        self.spread[:size] = features.std(0, correction=0).clamp_min(STILL)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.centre) / self.spread


class Critic(nn.Module):
    """M separate MLPs with LayerNorm and SiLU, computed together: Q(features [B,F], event [B,*E])
    -> [M,B]; with ``event=0``, V(features) -> [M,B].

    event: numbers in an event, prod(E). layers: how many hidden ones, of ``hidden`` units. support:
    None learns by squared error, a `Support` by cross-entropy on histograms, and then values start
    in the middle of its range instead of near 0. LayerNorm bounds Q off the data (RLPD, arXiv
    2302.02948); it has no gain and shift of its own, which the weight and bias before it give but
    for one common factor.
    """

    def __init__(
        self,
        features: int,
        event: int = 0,
        members: int = 1,
        hidden: int = 256,
        layers: int = 2,
        support: Support | None = None,
    ) -> None:
        super().__init__()
        self.support = support
        self.scale = Standard(features + event)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        sizes = [features + event, *[hidden] * layers, 1 if support is None else support.bins]
        for layer, (inputs, outputs) in enumerate(pairwise(sizes)):
            bound = (READOUT if layer == layers else 1.0) / math.sqrt(inputs)
            self.weights.append(
                nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
            )
            self.biases.append(
                nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))
            )

    def outputs(self, features: Tensor, event: Tensor | None = None) -> Tensor:
        """The members' outputs before they are read as values: [M,B,1], with a support logits
        [M,B,bins].
        """
        row = self.scale(features if event is None else torch.cat([features, event.flatten(1)], 1))
        x = row.expand(len(self.weights[0]), *row.shape)
        *hidden, readout = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            x = torch.baddbmm(bias, x, weight)
            x = F.silu(F.layer_norm(x, x.shape[-1:]))
        return torch.baddbmm(readout[1], x, readout[0])

    def forward(self, features: Tensor, event: Tensor | None = None) -> Tensor:
        outputs = self.outputs(features, event)
        return (
            outputs.squeeze(-1)
            if self.support is None
            else self.support.decode(outputs.softmax(-1))
        )

    def loss(self, features: Tensor, event: Tensor | None, target: Tensor) -> Tensor:
        """The distance of each member from ``target`` [B] or [M,B], constants: [M,B]. (Q - y)^2,
        with a support - sum_i p_i(y) log softmax(logits)_i.
        """
        outputs, target = self.outputs(features, event), target.detach()
        if self.support is None:
            return (outputs.squeeze(-1) - target) ** 2
        return -(self.support.encode(target) * outputs.log_softmax(-1)).sum(-1)


class StateValue(nn.Module):
    """V(features) by an MLP of two hidden layers with LayerNorm: Float[B,F] -> Float[B]."""

    def __init__(self, features: int, hidden: int = 256) -> None:
        super().__init__()
        self.scale = Standard(features)
        self.network = nn.Sequential(
            nn.Linear(features, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.network(self.scale(features)).squeeze(-1)


# What is learned


def bellman_target(
    rewards: Tensor, executed: Tensor, terminated: Tensor, next_value: Tensor, gamma: float
) -> Tensor:
    """y = sum_{j < n} gamma^j r_j + gamma^n (1 - terminated) V(s'), n = executed; of
    ``next_value``'s shape and type.

    rewards [B,T]; executed [B], 1..T, where an episode ended or a person took over fewer than were
    planned; terminated [B] bool: nothing comes after, an episode merely cut bootstraps from its
    final observation; next_value [B] or [M,B]: V of what is seen after the n-th step, ignored where
    terminated. A decision of one step is discounted by gamma, not by gamma^T (RL-100's public code:
    gamma^n_action_steps for both, corrected in a fork, critic.py:832-837); the chunk has its (1 -
    terminated) (ALOE, arXiv 2602.12691, is reported to print it without).
    """
    steps = torch.arange(rewards.shape[1], device=rewards.device)
    happened = torch.where(steps < executed.unsqueeze(1), rewards, 0.0).to(next_value.dtype)
    bootstrap = gamma ** executed.to(next_value.dtype) * next_value
    return (happened * gamma ** steps.to(happened.dtype)).sum(1) + torch.where(
        terminated, 0.0, bootstrap
    )


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """|expectile - 1{u < 0}| u^2, elementwise, u = target - prediction (IQL, arXiv 2110.06169).

    .5 fits the mean (half the squared error), towards 1 the largest target that the data has.
    """
    return (expectile - (error < 0).to(error.dtype)).abs() * error**2


def calibrated(values: Tensor, returns: Tensor) -> Tensor:
    """max(Q(s, a), V_mu(s)), elementwise (Cal-QL, arXiv 2303.05479): for actions of the *policy*
    only, so that none is pushed below ``returns``, what the data's own policy got from there on.
    """
    return torch.maximum(values, returns)


def conservative(q_data: Tensor, q_policy: Tensor, returns: Tensor | None = None) -> Tensor:
    """CQL's term (arXiv 2006.04779), to be made small: log mean exp of Q over the data's action and
    the policy's N, minus Q of the data's action; at least -log(N+1).

    q_data [M,B]; q_policy [M,B,N]; returns [B]: Cal-QL's, the *policy's* Q are `calibrated` by
    them, the data's never (as in Cal-QL's public conservative_sac.py, which adds random actions,
    uncalibrated). Result [M,B].
    """
    if returns is not None:
        q_policy = calibrated(q_policy, returns.unsqueeze(-1))
    every = torch.cat([q_data.unsqueeze(-1), q_policy], -1)
    return every.logsumexp(-1) - math.log(every.shape[-1]) - q_data


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, rate: float) -> None:
    """target <- (1 - rate) target + rate online, parameter by parameter; 1 copies."""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, rate)


# How an ensemble is read


def pessimistic(values: Tensor, spread: float) -> Tensor:
    """mean - spread * std over the members, [M,B] -> [B]; std is biased (ddof 0), so one member
    says its own value.

    Members of separate networks disagree where no data is; heads on one trunk hardly do.
    """
    return values.mean(0) - spread * values.std(0, correction=0)


def subset_min(values: Tensor, size: int, draw: torch.Generator | Tensor) -> Tensor:
    """The least of ``size`` random members, [M,B] -> [B]: in a target, REDQ's (arXiv 2101.05982).

    Every call draws one subset for all rows, without replacement (PA-RL's public code draws with),
    those with the least of M uniform numbers: ``draw`` itself [M], or numbers drawn from it.
    """
    members = len(values)
    if not 1 <= size <= members:
        raise ValueError(f"the subset has {size} members of {members}; valid are 1 to {members}")
    if isinstance(draw, torch.Generator):
        draw = torch.rand(members, generator=draw, device=draw.device)
    return values[draw.argsort()[:size].to(values.device)].amin(0)
