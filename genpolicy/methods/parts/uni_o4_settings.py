"""The settings of Uni-O4's stages."""

from dataclasses import dataclass

from genpolicy.config.errors import at_least, positive, share
from genpolicy.methods.parts.gate import OfflineEvaluation
from genpolicy.methods.parts.imitation import Cloning
from genpolicy.methods.parts.iql import ActionValue
from genpolicy.methods.parts.offline_data import Experience
from genpolicy.methods.parts.online import Online
from genpolicy.methods.parts.pipeline import OfflineLearner
from genpolicy.training.run import Run


@dataclass
class Joint:
    """The imitation stage: `Cloning` of each member, with frames of its own. The public code has
    batch 512, lr 1e-4 and 4e5 updates. Defaults without a source are those of `Cloning`.
    """

    iterations: int = 20  # length of the stage
    updates: int = 100  # per iteration, of each member
    batch: int = 128  # frames per update
    lr: float = 1e-3  # peak learning rate, which falls to 0 along a cosine
    warmup: int = 100  # updates of linear rise
    ema: float = 0.995  # decay per update of the averaged weights, which go on
    alpha: float = 0.1  # weight of the distance to the likeliest member; main.py

    def __post_init__(self) -> None:
        self.cloning()
        at_least("method uni_o4: imitation", self, alpha=0)

    def cloning(self) -> Cloning:
        """Returns the same settings without alpha; `ConfigError` where one is invalid."""
        return Cloning(self.iterations, self.updates, self.batch, self.lr, self.warmup, self.ema)


@dataclass
class Offline:
    """The offline stage. Defaults without a source are ours; main.py is the public code's."""

    episodes: int = 200  # of all members together; 0 learns from the data section alone
    critic_updates: int = 3000  # updates of Q and V
    expectile: float = 0.7  # of V's regression, in [0, 1]; main.py's omega
    model_updates: int = 1000  # updates of the model that J is imagined in
    candidates: int = 10  # times that every member is scored
    updates: int = 100  # per member, from one score to the next; main.py's eval_step
    states: int = 512  # recorded states per update, with actions drawn anew; main.py
    lr: float = 1e-4  # learning rate, which falls to 0 along a cosine over the stage; main.py
    clip: float = 0.25  # eps of the chunk's ratio, which falls to 0 along a line; main.py
    horizon: int = 20  # decisions per imagined episode
    starts: int = 512  # imagined episodes; main.py

    def __post_init__(self) -> None:
        where = "method uni_o4: offline"
        least = {
            "episodes": 0,
            "critic_updates": 1,
            "model_updates": 1,
            "candidates": 1,
            "updates": 1,
            "states": 2,
            "horizon": 1,
            "starts": 2,
        }
        at_least(where, self, **least)
        positive(where, self, "lr", "clip")
        share(where, self, "expectile")

    def learner(self, run: Run, gamma: float, cut_fails: bool) -> OfflineLearner:
        """Makes what the stage learns from and with. gamma: discount per environment step.
        cut_fails: see `Experience`.
        """
        experience = Experience(run, cut_fails)
        value = ActionValue(run, gamma, expectile=self.expectile)
        evaluation = OfflineEvaluation(
            run, value, horizon=self.horizon, starts=self.starts, caution=0.0
        )
        return OfflineLearner(run, experience, value, evaluation)


@dataclass
class Practice:
    """The online stage. Defaults without a source are those of `Online`, so that the method can be
    compared with rl100.
    """

    episodes: int = 48  # per iteration
    lam: float = 0.95  # of GAE, in [0, 1]
    epochs: int = 5  # passes over the rollout
    minibatch: int = 128  # decisions per update; ours
    # peak learning rate; 1e-5 to 2e-5 in public: at ten times that PPO leaves its clip behind
    # (docs/rl100.md)
    lr: float = 1e-5
    final: float = 0.1  # share of lr at which its cosine ends
    clip: float = 0.2  # eps of the chunk's ratio
    ema: float = 0.998  # decay per update of the averaged weights that are evaluated and saved
    retry: float = 0.25  # share of the episodes that begin where an earlier one failed
    floor: float = 0.0  # share of the first policy's success to be kept; 0 is no floor
    critic_lr: float = 1e-3  # learning rate of V
    critic_epochs: int = 10  # passes of V over the rollout
    critic_minibatch: int = 256  # decisions per update of V
    warm_up: int = 1  # iterations that train V alone

    def __post_init__(self) -> None:
        self.online()

    def online(self) -> Online:
        """Returns the same settings as `Online`; `ConfigError` where one is invalid."""
        return Online(**vars(self))
