"""The settings of RL-100's offline stage."""

from dataclasses import dataclass

from genpolicy.config.errors import ConfigError, at_least, positive, share
from genpolicy.methods.parts.gate import OfflineEvaluation
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.methods.parts.pipeline import OfflineLearner
from genpolicy.training.run import Run


@dataclass
class Offline:
    """The offline stage of method rl100. Defaults without a source are ours, measured or argued in
    docs/rl100.md.
    """

    # what is learned from
    rounds: int = 1  # times that data is collected and learned from; M in the paper
    episodes: int = 200  # of the policy, per round; 0 learns from the data section alone
    # True where the critics and the gate's model learn from the data section too; where there is
    # much of it and all of it succeeds, Q learns that to act like it is what succeeds
    demonstrations: bool = True
    # updates of imitation per round, on all that succeeded, rounded up to hundreds; 0 is none
    recloning: int = 0

    # Q, V and the gate's model (see `ActionValue`)
    critic_updates: int = 3000  # updates of Q and V per round
    expectile: float = 0.7  # of V's regression, in [0, 1]; IQL
    polyak: float = 0.05  # rate per update at which Q's target follows; .005 in RL-100
    monte_carlo: float = 0.0  # share of the observed return in Q's target, in [0, 1]; IQL
    members: int = 2  # networks of Q; IQL
    pessimism: float = 1.0  # Q is read as mean - this * std of its members; 1 of 2: their minimum
    model_updates: int = 1000  # updates of the gate's model per round

    # a candidate
    candidates: int = 2  # at most, per round
    sweeps: int = 10  # times per candidate that decisions are drawn anew and learned from
    states: int = 256  # recorded decisions per sweep, of all processes together
    # chains drawn at each of them; 1 learns from A = Q - V as published, several from
    # A_i = Q_i - mean of the others: what two critics make of a state varies twice as much as what
    # actions change there, and does not repeat from one critic to the next
    samples: int = 4
    epochs: int = 2  # passes over a sweep
    minibatch: int = 1024  # (decision, step) pairs per update
    lr: float = 1e-4  # learning rate, constant
    clip: float = 0.2  # eps of the chunk's ratio; RL-100 has .2 to .25
    kl: float = 0.1  # beta, weight of the KL to the stage's first policy
    # reject a candidate above this KL (nats per decision, summed over the steps) from the stage's
    # first policy, and end the round
    far: float = 10.0

    # the gate
    # gain that a candidate must show, as a share of |J|; RL-100's .05 rejects candidates that are
    # twice as good; -1 asks for nothing, where J is not to be trusted and real episodes decide
    delta: float = 0.0
    z: float = 2.0  # standard errors that are taken off the gain
    horizon: int = 20  # decisions per imagined episode
    starts: int = 512  # imagined episodes
    caution: float = 0.0  # taken off Q per std of the model's disagreement
    # real episodes of every candidate that the gate lets through and of the policy in force, from
    # the same starts; the one that succeeds more often stays. 0: the person does not allow it
    check: int = 0

    # samples per decision of the sampler that carries out the one with the highest Q; it needs no
    # training and is evaluated beside the others
    best_of: int = 16

    def __post_init__(self) -> None:
        where = "method rl100: offline"
        least = {
            "rounds": 1,
            "episodes": 0,
            "recloning": 0,
            "critic_updates": 1,
            "members": 1,
            "model_updates": 1,
            "pessimism": 0,
            "candidates": 1,
            "sweeps": 1,
            "states": 2,
            "samples": 1,
            "epochs": 1,
            "minibatch": 1,
            "kl": 0,
            "delta": -1,
            "z": 0,
            "horizon": 1,
            "starts": 2,
            "caution": 0,
            "check": 0,
            "best_of": 1,
        }
        at_least(where, self, **least)
        positive(where, self, "lr", "clip", "far", "polyak")
        share(where, self, "expectile", "polyak", "monte_carlo")
        if not (self.demonstrations or self.episodes):
            raise ConfigError(
                f"{where}: without demonstrations and episodes there is nothing to learn from"
            )

    def learner(self, run: Run, gamma: float, cut_fails: bool) -> OfflineLearner:
        """Makes what the stage learns from and with. gamma: discount per environment step.
        cut_fails: see `Experience`.
        """
        experience = Experience(run, cut_fails, own=not self.demonstrations)
        value = ActionValue(
            run,
            gamma,
            expectile=self.expectile,
            polyak=self.polyak,
            monte_carlo=self.monte_carlo,
            members=self.members,
            pessimism=self.pessimism,
            acts=True,
        )
        evaluation = OfflineEvaluation(
            run, value, horizon=self.horizon, starts=self.starts, caution=self.caution
        )
        return OfflineLearner(run, experience, value, evaluation)
