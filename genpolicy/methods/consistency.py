"""Distillation of a sampler into a student of few steps, in four losses.

The student jumps from x_t to x_0 in one network evaluation, f(x_t, t), and from there to its next
time by fresh noise (kernel ``consistency``, arXiv 2303.01469 algorithm 1). Psi(x_t, t) is the end
of the teacher's own deterministic sampler, entered at x_t.

    same_noise    |f(z, t_1) - Psi(z, t_1)|^2,  z ~ the prior; with more steps also at the
                  states x_{t_k} that the student itself visits (RL-100, arXiv 2510.14830, and the
                  distillation term of FQL, arXiv 2502.02538)
    full_solve    |f(x_t, t) - Psi(x_t, t)|^2,  x_t = alpha x_0 + sigma eps, t of the teacher's grid
                  (L_CD of RL-100)
    consistency   |f(x_t, t) - f_ema(x_s, s)|^2,  x_s the teacher's next state, f(x, 0) = x
                  (arXiv 2303.01469 eq. 10)
    score         f(z, t_1) moves along x0_fake(x_t) - x0_teacher(x_t), where x_t is a noised sample
                  of the student and x0_fake the denoiser of its own samples, which learns beside it
                  (variational score distillation; OneDP, arXiv 2410.21257): a polish of a student
                  that is nearly right

x_0: a recorded example, or the teacher's sample where none is named. What keeps the modes is that
each target is a function of the same noise that the student sees: noise drawn apart for the target
averages them. A student's head must say x0 or an end point: at the noisiest level of a robot's
schedule epsilon is amplified by 1/sqrt(alpha_bar), about 2000.

Differs from the public code (hesic73/RL-100): one head in the loss and in the sampler (its
``back_up`` loss trains epsilon and its sampler reads x0); its ``action`` loss, whose noises are
independent, is left out; the true boundary f(x, 0) = x in the place of scalings that only
approach it.
"""

from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from genpolicy.chain import Condition
from genpolicy.chain.solver import Solver
from genpolicy.chain.values import expand
from genpolicy.config.errors import ConfigError, at_least, share
from genpolicy.methods.parts.distillation import (
    distance,
    following,
    jump,
    noised,
    require_teachable,
    solve,
)
from genpolicy.methods.parts.observations import Observations, Visits
from genpolicy.policy.policy import ChainPolicy
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run

TIMES = 1
"""The ``k`` of the draw that names a row's noise time."""


@dataclass
class Consistency:
    """The settings of distillation. Defaults without a source are ours.

    The student is sampled as the chain section says, {steps: 1, 2 or 4, kernel: {name:
    consistency}}; its teacher is policy.teacher.
    """

    loss: Literal["same_noise", "full_solve", "consistency", "score"] = "same_noise"
    batch: int = 1024  # states or prompts per iteration, each with a noise of its own
    updates: int = 40  # per iteration
    minibatch: int = 256  # rows per update
    # c of the pseudo-Huber distance, in units of x_0's root mean square error; 0 is the square
    huber: float = 0.0
    decay: float = 0.95  # per update, of the averaged student in loss consistency; ManiCM's
    fakes: int = 5  # updates of loss score's fake denoiser per update of the student; DMD2's
    fake_lr: float = 1e-4  # its learning rate
    visits: Visits = field(default_factory=Visits)  # robots: episodes played to see states

    needs: ClassVar[Needs] = Needs(denoising=True, teacher=True)

    def __post_init__(self) -> None:
        at_least("method consistency", self, batch=1, updates=1, minibatch=1, huber=0, fakes=1)
        share("method consistency", self, "decay")

    def train(self, run: Run) -> None:
        _Distillation(self, run).train()


@dataclass(frozen=True)
class _Lesson:
    """B rows to learn from.

    place [B]: their numbers in the iteration, or in a minibatch. condition: the student's. taught:
    the teacher's. x [B,*E], t [B]: where the student jumps from. target [B,*E]: where to; of loss
    consistency the teacher's next state, and ``s`` [B] its time; of loss score nothing that is
    used.
    """

    place: Tensor
    condition: Condition
    taught: Condition
    x: Tensor
    t: Tensor
    target: Tensor
    s: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> "_Lesson":
        return _Lesson(*(getattr(self, f.name)[rows] for f in fields(self)))


class _Distillation:
    """The four losses, in the verbs of a run."""

    def __init__(self, settings: Consistency, run: Run) -> None:
        assert run.teacher is not None
        self.settings, self.run = settings, run
        self.student, self.teacher = run.policy, run.teacher
        require_teachable(self.student, self.teacher)
        _require_times(settings.loss, self.student, self.teacher)
        if settings.batch < run.processes.count:
            raise ConfigError(
                f"method consistency: batch is {settings.batch}, fewer rows than the"
                f" {run.processes.count} processes"
            )
        self.observations = Observations(run, settings.visits)
        # the averaged student of loss consistency, the fake denoiser of loss score
        self.copy = run.weights()
        if settings.loss == "consistency":
            run.register(average=self.copy)
        if settings.loss == "score":
            own = replace(run.experiment.optimizer, lr=settings.fake_lr)
            self.optimizer = run.new_optimizer(run.trainable, own)
            run.register(fake=self.copy, fake_optimizer=self.optimizer)

    def train(self) -> None:
        settings, run = self.settings, self.run
        for _ in run.iterations():
            self.observations.gather()
            lesson = self._lesson()
            for update in range(settings.updates):
                if settings.loss == "score":
                    for fake in range(settings.fakes):
                        self._learn_fake(lesson, update * settings.fakes + fake)
                rows = self._minibatch(lesson, "minibatch", update)
                with run.counting(self.teacher):  # loss score asks it here
                    run.descend(partial(self._losses, rows, update), len(rows), "distil")
                if settings.loss == "consistency":
                    self.copy.follow(settings.decay)
            if not settings.visits.episodes:  # decisions that were played are counted as they are
                run.seen(settings.batch)

    # What there is to learn

    def _lesson(self) -> _Lesson:
        """This process's share of an iteration's rows."""
        settings, run = self.settings, self.run
        examples = settings.loss in ("full_solve", "consistency")
        with torch.no_grad(), run.counting(self.teacher):
            context, place, event = self.observations(settings.batch, events=examples)
            condition = self.student.model.encode(context)
            taught = self.teacher.model.encode(context)
            uniform = run.mine(run.generator("times").random(settings.batch))
            build = self._noised if examples else self._visited
            parts = []
            for first in range(0, len(place), settings.minibatch):
                rows = slice(first, first + settings.minibatch)
                given = None if event is None else event[rows]
                parts.append(
                    build(condition[rows], taught[rows], place[rows], uniform[rows], given)
                )
            x, t, target, s = (torch.cat(values) for values in zip(*parts, strict=True))
        return _Lesson(place, condition, taught, x, t, target, s)

    def _visited(
        self,
        condition: Condition,
        taught: Condition,
        place: Tensor,
        uniform: Tensor,
        event: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, t, target, s at states of the student's own sampler: the target is where the teacher
        goes from there, and from the prior where it goes with the same noise.
        """
        student, teacher = self.student, self.teacher
        noise = self.run.noise("distillation", place)
        path = student.sample(condition, noise, keep=(0, student.chain.K))
        k = (uniform * student.chain.K).long()
        x, t = path.before(k), student.chain.grid[k]
        target = torch.zeros_like(x)
        if self.settings.loss == "same_noise":
            begins, later = (k == 0).nonzero().flatten(), (k > 0).nonzero().flatten()
            if len(begins):
                drawn = teacher.sample(taught[begins], noise[begins], keep=(0, 0))
                target[begins] = drawn.x0
            target[later] = solve(teacher, x[later], t[later], taught[later], noise[later])
        return x, t, target, torch.zeros_like(t)

    def _noised(
        self,
        condition: Condition,
        taught: Condition,
        place: Tensor,
        uniform: Tensor,
        event: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, t, target, s at examples, or the teacher's samples, noised to a time of its grid: the
        target is the end of its sampler from there, or its next state.
        """
        student, teacher = self.student, self.teacher
        noise = self.run.noise("distillation", place)
        x0 = teacher.sample(taught, noise, keep=(0, 0)).x0 if event is None else event
        k = (uniform * teacher.chain.K).long()
        t, s = teacher.chain.grid[k], teacher.chain.grid[k + 1]
        fresh = self.run.noise("renoised", place)(0, student.model.event_shape, x0.device)
        x = noised(student, x0, t, fresh)
        if self.settings.loss == "full_solve":
            return x, t, solve(teacher, x, t, taught, noise), s
        return x, t, following(teacher, x, k, taught), s

    def _minibatch(self, lesson: _Lesson, purpose: str, number: int) -> _Lesson:
        """This process's share of rows that are drawn with repetition, numbered anew: each draw of
        a row has noise of its own.
        """
        settings, run = self.settings, self.run
        drawn = torch.from_numpy(
            run.generator(purpose, number).integers(settings.batch, size=settings.minibatch)
        )
        mine = torch.searchsorted(lesson.place, drawn).clamp_max(len(lesson) - 1)
        chosen = (lesson.place[mine] == drawn).nonzero().flatten()
        return replace(lesson[mine[chosen]], place=chosen)

    # The losses

    def _losses(self, lesson: _Lesson, number: int, part: slice) -> Tensor:
        """|f(x_t, t) - target|^2 of a stretch of rows, [b]."""
        rows = lesson[part]
        target = self._target(rows, number)
        said = jump(self.student, rows.x, rows.t, rows.condition)
        scored = self.student.model.scored
        return distance(scored(said), scored(target), self.settings.huber)

    @torch.no_grad()
    def _target(self, rows: _Lesson, number: int) -> Tensor:
        """The targets of rows, [b,*E]."""
        if self.settings.loss == "consistency":
            return self._averaged(rows)
        if self.settings.loss == "score":
            return self._scored(rows, number)
        return rows.target

    def _averaged(self, rows: _Lesson) -> Tensor:
        """f_ema(x_s, s), and x_s itself at s = 0."""
        target = rows.target.clone()
        later = (rows.s > 0).nonzero().flatten()
        with self.copy.using():
            target[later] = jump(
                self.student, rows.target[later], rows.s[later], rows.condition[later]
            )
        return target

    def _scored(self, rows: _Lesson, number: int) -> Tensor:
        """The student's sample x moved along the difference of the scores of its own distribution
        and of the teacher's, in units of its distance from the teacher's x_0 (DMD, arXiv
        2311.18828 eq. 8): x - (x0_fake - x0_teacher) / mean |x - x0_teacher|.
        """
        x = jump(self.student, rows.x, rows.t, rows.condition)
        t, noise = self._renoising(rows, "score", number)
        at = noised(self.student, x, t, noise)
        real = self.teacher.denoiser(at, t, rows.taught).x0
        with self.copy.using():
            fake = self.student.model.denoise(at, t, rows.condition).x0
        size = expand((x - real).abs().flatten(1).mean(1).clamp_min(1e-6), x)
        return x - (fake - real) / size

    def _learn_fake(self, lesson: _Lesson, number: int) -> None:
        """One update of the denoiser of the student's own samples."""
        run, student = self.run, self.student
        rows = self._minibatch(lesson, "fake minibatch", number)
        with torch.no_grad():
            samples = jump(student, rows.x, rows.t, rows.condition)
        t, noise = self._renoising(rows, "fake", number)

        def losses(part: slice) -> Tensor:
            return student.supervised_loss(
                rows.condition[part], samples[part], t[part], noise[part]
            )

        with run.learning(self.copy, self.optimizer):
            run.descend(losses, len(rows), "fake")

    def _renoising(self, rows: _Lesson, purpose: str, number: int) -> tuple[Tensor, Tensor]:
        """A time of the teacher's grid and noise for each row, [b] and [b,*E]."""
        noise = self.run.noise(purpose, rows.place, number)
        uniform = torch.special.ndtr(noise(TIMES, (1,)).double()).flatten()
        k = (uniform * self.teacher.chain.K).long().clamp_max(self.teacher.chain.K - 1)
        drawn = noise(0, self.student.model.event_shape, self.student.model.device)
        return self.teacher.chain.grid[k], drawn


def _require_times(loss: str, student: ChainPolicy, teacher: ChainPolicy) -> None:
    """Raise `ConfigError` where the student would be sampled at a time that it is not taught at."""
    if loss == "consistency" and isinstance(teacher.chain.kernel, Solver):
        raise ConfigError(
            f"loss consistency takes one step of the teacher's kernel, and"
            f" {type(teacher.chain.kernel).__name__.lower()} is a solver, which has none: teach"
            " with {path: ..., kernel: {name: ddim, eta: 0}}, or take loss same_noise"
        )
    noises = loss != "same_noise" or student.chain.K > 1
    own, theirs = student.model.schedule, teacher.model.schedule
    times = teacher.chain.grid
    if noises and not (
        type(own) is type(theirs)
        and torch.allclose(own.alpha(times), theirs.alpha(times))
        and torch.allclose(own.sigma(times), theirs.sigma(times))
    ):
        raise ConfigError(
            "the student's noise schedule is not its teacher's, so that a noisy state of one means"
            " another to the other: only a student of one step learns from such a teacher, with"
            " loss same_noise"
        )
    taught = teacher.chain.grid[:-1].flatten().tolist()
    asked = student.chain.grid[:-1].flatten().tolist()
    missing = [t for t in asked if min(abs(t - other) for other in taught) > 1e-9]
    if missing and loss in ("full_solve", "consistency"):
        raise ConfigError(
            f"the student is sampled at noise time {missing[0]:.4f}, and loss {loss} teaches at the"
            " times of its teacher's grid, where it is not: let chain.steps divide the teacher's"
            " steps, or take loss same_noise"
        )
