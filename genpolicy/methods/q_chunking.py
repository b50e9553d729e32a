"""Q-chunking (arXiv 2507.07969): a critic of whole chunks picks among samples of a policy that only
imitates; and its decoupled form (DQC, arXiv 2512.10926), whose critic sees more than is carried
out.

    acting    argmax Q(s, a_j), a_1 .. a_N ~ pi(. | s); the chunk is carried out whole
    pi        its own supervised loss on everything that was carried out
    coupled   Q(s, a) -> sum_j gamma^j r_j + gamma^n Q_target(s', its own choice there)

A chunk's rewards are those of the chunk, so that n steps go back at once and nothing is assumed of
who acts in between. With ``length`` L > 1 the critic's chunk is L decisions long, what the policy
says stays one:

    Q_L(s, a_1 .. a_L)  -> sum_j gamma^j r_j + gamma^m V(s_{+L})
    Q(s, a_1)           -> Q_L(s, a_1 .. a_L), by an expectile (``suffix``): .5 is the mean over
                           what followed in the data, 1 the best
    V(s)                -> Q_target(s, a_1), by an expectile (``optimism``)

bootstrap "steps" is the control: Q(s, a_1) regresses on the L-step return itself, which takes what
the data's policy did behind a_1 for what the policy would do.

Differs from the public code: squared errors for returns of any size (there in [0, 1], by cross
entropy, and V by a quantile).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from genpolicy.config.errors import ConfigError, at_least, choice, share, unread
from genpolicy.methods.parts.chunk_critic import Valuing
from genpolicy.methods.parts.long_chunks import LongChunks
from genpolicy.methods.parts.off_policy import OffPolicy
from genpolicy.methods.parts.practice import Practice
from genpolicy.training.requirements import Needs
from genpolicy.training.run import Run


@dataclass
class QChunking:
    """The settings of Q-chunking. Defaults without a source are ours; acfql.py and dqc.py are the
    public codes'.
    """

    gamma: float = 0.99  # discount per environment step; acfql.py
    cut_fails: bool = True  # True: nothing comes after an episode that its time limit cut
    samples: int = 8  # N, drawn and valued per decision; 32 in acfql.py
    length: int = 1  # L, decisions in the critic's chunk; 1 is coupled
    # "chunk": Q learns what Q_L says; "steps": the return itself, the control
    bootstrap: Literal["chunk", "steps"] = "chunk"
    suffix: float = 0.5  # expectile over what followed, in [0, 1]; .5 or .8 in dqc.py
    optimism: float = 0.7  # expectile of V over what was done, in [0, 1]; .5 to .93 in dqc.py
    batch: int = 256  # decisions per update of the policy
    every: int = 10  # iterations between imitations
    updates: int = 100  # of the policy per imitation
    practice: Practice = field(default_factory=Practice)  # the episodes
    critic: Valuing = field(default_factory=Valuing)  # Q

    needs: ClassVar[Needs] = Needs(("robots",), split=())

    def __post_init__(self) -> None:
        at_least("method q_chunking", self, samples=1, length=1, batch=1, every=1, updates=0)
        choice("method q_chunking: bootstrap", self.bootstrap, ("chunk", "steps"))
        if self.bootstrap == "steps" and self.length == 1:
            raise ConfigError(
                "method q_chunking: bootstrap steps is for a critic of several decisions: set"
                " length above 1"
            )
        share("method q_chunking", self, "gamma", "suffix", "optimism")
        if self.length == 1:
            unread("method q_chunking", self, "with length 1", "suffix", "optimism")
        else:
            unread("method q_chunking: critic", self.critic, "with length above 1", "subset")
        if self.bootstrap == "steps":
            unread("method q_chunking", self, "with bootstrap steps", "suffix")

    def train(self, run: Run) -> None:
        _Chunking(self, run).train()


class _Chunking:
    """The loop of Q-chunking, in the verbs of a run."""

    def __init__(self, settings: QChunking, run: Run) -> None:
        self.settings, self.run = settings, run
        self.world = OffPolicy(run, settings)
        self.learn = self.world.learn
        if settings.length > 1:
            decoupled = LongChunks(
                run,
                self.world,
                length=settings.length,
                gamma=settings.gamma,
                suffix=settings.suffix if settings.bootstrap == "chunk" else None,
                optimism=settings.optimism,
            )
            self.learn = decoupled.learn

    def train(self) -> None:
        self.world.train(self._begin, self._improve, self.learn)

    def _begin(self) -> None:
        self.run.attach(best_of=self.world.critic.part)
        self.run.choose_among(self.settings.samples)

    def _improve(self) -> None:
        if self.run.iteration % self.settings.every == 0:
            self.world.imitate_everything(self.settings.updates, self.settings.batch)
