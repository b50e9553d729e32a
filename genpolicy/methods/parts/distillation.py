"""The pieces of distillation: a student's jump to x_0, its teacher's solve, and the distance of the
two.
"""

from dataclasses import replace

import torch
from torch import Tensor

from genpolicy.chain import Condition, Consistency, Noise
from genpolicy.chain.values import expand, output_gain, reduce_event
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.model import TokenModel
from genpolicy.policy.policy import ChainPolicy

AMPLIFIED = 100.0
"""|d x_0 / d output| at the first time above which a head can't be taught to say x_0: the 14.6 of
Stable Diffusion's epsilon can be, the 2000 of a robot's table can't.
"""


def jump(student: ChainPolicy, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """f(x, t) of x [B,*E], t [B] in one evaluation: [B,*E], x_0 as the student's network says it,
    with the boundary of its kernel where that has one.

    It is neither guided nor clipped: what a clip cuts off would have no gradient.
    """
    x0 = student.model.denoise(x, t, condition).x0
    kernel = student.chain.kernel
    if not isinstance(kernel, Consistency) or kernel.scaling is None:
        return x0
    skip, out = kernel.boundary(t)
    return expand(skip, x) * x + expand(out, x) * x0


def solve(teacher: ChainPolicy, x: Tensor, t: Tensor, condition: Condition, noise: Noise) -> Tensor:
    """Psi(x, t): the samples [B,*E] at the end of the teacher's sampler, each row entered at its
    own noise time t [B].
    """
    found = torch.empty_like(x)
    for time in t.unique():
        rows = (t == time).nonzero().flatten()
        below = replace(teacher, chain=teacher.chain.below(time))
        begin = (0, x[rows])
        found[rows] = below.sample(condition[rows], noise[rows], start=begin, keep=(0, 0)).x0
    return found


def following(teacher: ChainPolicy, x: Tensor, k: Tensor, condition: Condition) -> Tensor:
    """The states [B,*E] after one step of the teacher's sampler without noise, from x at each row's
    own step k [B].
    """
    chain, found = teacher.chain, torch.empty_like(x)
    for step in k.unique().tolist():
        rows = (k == step).nonzero().flatten()
        t = chain.grid[step].expand(len(rows))
        prediction = teacher.denoiser(x[rows], t, condition[rows])
        found[rows] = chain.coefficients(step).gaussian(x[rows], prediction).mean
    return found


def noised(policy: ChainPolicy, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma eps of rows at their own times t [B]: [B,*E]."""
    schedule = policy.model.schedule
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * noise


def distance(said: Tensor, target: Tensor, huber: float, mask: Tensor | None = None) -> Tensor:
    """mean over E of (said - target)^2, or the pseudo-Huber sqrt(mean + c^2) - c of c = ``huber``
    (arXiv 2310.14189 eq. 8, on the mean): [B].
    """
    square = reduce_event((said - target) ** 2, "mean", mask)
    return (square + huber**2).sqrt() - huber if huber else square


def require_teachable(student: ChainPolicy, teacher: ChainPolicy) -> None:
    """Raise `ConfigError` where the student could not learn what the teacher's sampler does."""
    if isinstance(teacher.model, TokenModel):
        raise ConfigError(
            "policy.teacher is a policy of tokens, whose samples jump with its noise, and it"
            " denoises nothing on the way: it can't teach a student to denoise"
        )
    if student.guidance != 1.0:
        raise ConfigError(
            f"chain.guidance is {student.guidance:g}: a student learns the guidance of its teacher"
            " and is sampled without; set it to 1"
        )
    times = student.chain.grid[:1]
    schedule = student.model.schedule
    gain, _ = output_gain(
        student.model.parametrisation, schedule.alpha(times), schedule.sigma(times)
    )
    if not float(gain.abs().max()) <= AMPLIFIED:
        raise ConfigError(
            f"the student's head says {student.model.parametrisation}, and x_0 is"
            f" {float(gain.abs().max()):.0f} times that at its first noise time: set"
            " policy.prediction_type to sample (or to v_prediction, or velocity)"
        )
    if tuple(student.model.event_shape) != tuple(teacher.model.event_shape):
        raise ConfigError(
            f"the student's samples have shape {list(student.model.event_shape)}, its teacher's"
            f" {list(teacher.model.event_shape)}: they must be the same"
        )
    if student.model.acts:
        probe = torch.stack([torch.full(student.model.event_shape, value) for value in (0.0, 0.5)])
        own, theirs = (who.model.decode(probe.to(who.model.device)) for who in (student, teacher))
        if own.shape != theirs.shape or not torch.allclose(own, theirs.to(own), atol=1e-5):
            raise ConfigError(
                "the student gives its samples another meaning in actions than its teacher, whose"
                " statistics come from other data: begin with the teacher's weights, or name the"
                " data that it was trained on"
            )
    if teacher.chain.noisy:
        raise ConfigError(
            "policy.teacher draws noise at its steps, and a student that is held to one sample of"
            " many learns their average: teach without, {path: ..., kernel: {name: ddim, eta: 0}}"
        )
    if not torch.equal(teacher.chain.grid[:1], times):
        raise ConfigError(
            f"the student's chain starts at noise time {float(times.flatten()[0]):g}, its teacher's"
            f" at {float(teacher.chain.grid.flatten()[0]):g}: they must start alike"
        )
