r"""The ranking of chunks by a critic, against what rollouts say.

    python -m benchmarks.critic_ranking runs/off_policy/shelf-place-v3/aloe-0
    python -m benchmarks.critic_ranking RUN --pairs 128 --rollouts 32 --out ranking.json

RUN is the folder of a run of aloe, pa_rl, expo or q_chunking on MetaWorld, finished or stopped; it
is only read. From each of fresh starts the policy plays an episode as it acts in training, and at
one of its decisions, drawn uniformly, draws two chunks of which its critic chooses none. Either one
is carried out from there, and then the deployed policy goes on to the episode's end, ``rollouts``
times with noise of its own, which the two chunks of a pair share. The shares that succeed (and the
mean returns, discounted as the run does from the decision on) are the truth. A deployed sampler
that draws little noise makes all rollouts of a chunk alike; with ``--then training`` the policy
goes on as it acts in training, which is what ALOE's critic values.

Beside the run's critic: the same network, learned from the same recorded decisions by regression on
their observed returns (Monte-Carlo; ``updates`` of the run's batch and learning rate). The third
line ranks by half of the rollouts and is judged by the other half: what can be known of a pair with
so many. A pair on whose chunks a critic's values are equal counts as ranked half right.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.ranking_parts.moments import World
from benchmarks.ranking_parts.pairs import states, truths, two_chunks
from benchmarks.ranking_parts.ranks import compared, table
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError, choice
from genpolicy.config.schema import OptimizerConfig
from genpolicy.contracts.model import ControlModel
from genpolicy.learning.critic import Critic, pessimistic
from genpolicy.methods.aloe import ALOE
from genpolicy.methods.parts.chunk_critic import mixed_rows
from genpolicy.methods.parts.practice import Episodes
from genpolicy.policy.files import saved
from genpolicy.policy.parts.best_of import BestOf
from genpolicy.tasks.metaworld import MetaWorld
from genpolicy.training import checkpoint
from genpolicy.training.draws import Draws
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import start_processes
from genpolicy.training.run import Run
from genpolicy.training.workspace import CONFIG

METHODS = ("aloe", "pa_rl", "expo", "q_chunking")
FRESH = 67_000_000
"""The first reset seed of the episodes; nothing else uses those from here on."""

Read = Callable[[Tensor], Tensor]
"""Values of a critic's networks [M,B] -> the value by which the run's method judges, [B]."""


def own_critic(run: Run, method: Any, state: dict[str, Any]) -> tuple[Critic, Read]:
    """The critic of a run, and how its method reads it. state: the run's checkpoint."""
    if not isinstance(method, ALOE):
        part = cast(BestOf, run.policy.parts["best_of"])
        return part.critic, lambda values: pessimistic(values, part.pessimism)
    critic = fresh_critic(run, method)
    critic.load_state_dict(state["kept"]["q"])
    return critic, lambda values: values.amin(0)


def fresh_critic(run: Run, method: Any) -> Critic:
    """A critic of the run's size that has learned nothing."""
    model, settings = run.policy.model, method.critic
    dims = model.scored(torch.zeros(1, *model.event_shape)).numel()
    members, support = settings.members, settings.support()
    return Critic(run.features, dims, members, settings.hidden, support=support)


def monte_carlo(run: Run, method: Any, episodes: Episodes, updates: int) -> Critic:
    """A critic that regresses on the returns that were observed, of the decisions of which they are
    known.
    """
    settings, replay = method.critic, episodes.experience.replay
    features, critic = episodes.experience.features, fresh_critic(run, method)
    critic.scale.fit(features)
    returns = replay.returns(method.gamma).to(features)
    known = (~returns.isnan()).nonzero().flatten()
    before, batch = int((known < episodes.before).sum()), settings.batch
    optimizer = run.new_optimizer(
        critic.parameters(), OptimizerConfig(lr=settings.lr, weight_decay=0.0, max_grad_norm=10.0)
    )
    batches = mixed_rows(run, len(known), before, settings.offline, updates, batch, "monte carlo")
    for drawn in batches:
        rows = known[drawn]
        seen, event = features[replay.now[rows]], run.policy.model.scored(replay.event[rows])

        def losses(
            part: slice, seen: Tensor = seen, event: Tensor = event, y: Tensor = returns[rows]
        ) -> Tensor:
            return critic.loss(seen[part], event[part], y[part]).sum(0)

        run.descend(losses, len(rows), "critic", optimizer)
    return critic


def measure(
    folder: Path, pairs: int, rollouts: int, updates: int, seed: int, then: str = "deployed"
) -> dict[str, Any]:
    """All numbers of a run's critic, and the pairs that they come from. then: the policy that goes
    on behind a chunk, "deployed" or "training".
    """
    began = time.process_time()
    run, method, name, state = opened(folder)
    with run:
        task, policy, gamma = cast(MetaWorld, run.task), run.policy, float(method.gamma)
        critic, read = own_critic(run, method, state)
        episodes = Episodes(run, method.practice, method.cut_fails)
        episodes.experience.load_state_dict(state["kept"]["experience"])
        critics = {"critic": critic, "monte carlo": monte_carlo(run, method, episodes, updates)}

        # the pairs, and what rollouts say of them
        world, draws = World(task._make, task.limit), Draws(seed)
        starts = range(FRESH, FRESH + pairs)
        moments, context = states(policy, world, starts, draws)
        chunks = two_chunks(policy, context, draws)
        follower = run.deployed if then == "deployed" else policy
        success, returns = truths(follower, world, moments, chunks, rollouts, gamma, draws)
        world.close()

        # and what the critics say
        with torch.no_grad():
            seen = policy.model.features(policy.model.encode(context)).repeat_interleave(2, 0)
            event = policy.model.scored(chunks.flatten(0, 1))
            values = {
                name: read(one(seen, event)).view(-1, 2).double() for name, one in critics.items()
            }
    return {
        "run": str(folder),
        "method": name,
        "pairs": pairs,
        "rollouts": rollouts,
        "then": then,
        "updates": updates,
        "seed": seed,
        "gamma": gamma,
        "iteration": state["kept"]["spent"]["iteration"],
        "success": compared(values, success),
        "return": compared(values, returns),
        "cpu_s": time.process_time() - began,
        "each": {
            "start": list(starts),
            "steps": [len(moment.actions) for moment in moments],
            **{name: value.tolist() for name, value in values.items()},
            "success": success.tolist(),
            "return": returns.tolist(),
        },
    }


def opened(folder: Path) -> tuple[Run, Any, str, dict[str, Any]]:
    """The run of a folder with the policy that it saved, its method and the method's name, and its
    newest checkpoint. Raises `ConfigError` for a run that has no critic of chunks.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} is no run's folder: it has no {CONFIG}")
    policy = saved(folder)
    asked = parse.load(folder / CONFIG, [f"--policy.pretrained={policy.where}", "--environments=1"])
    name = str(asked.method["name"])
    choice("critic_ranking: the run's method", name, METHODS)
    run, method = prepare(asked, folder, start_processes(asked, None))
    if not isinstance(run.task, MetaWorld):
        raise ConfigError(f"the task of {folder} is {asked.task['name']}; it must be metaworld")
    if cast(ControlModel, run.policy.model).history != 1:
        raise ConfigError(f"the policy of {folder} sees several frames; it must see one")
    if isinstance(method, ALOE) and method.weigh != "critic":
        raise ConfigError(f"the run in {folder} weighs by {method.weigh}, and has no critic")
    state = checkpoint.latest(folder, run.say)
    if state is None:
        raise ConfigError(f"{folder} has no checkpoint")
    if policy.sampler.best_of > 1:
        run.choose_among(policy.sampler.best_of)
    run.begin(1)
    return run, method, name, state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--updates", type=int, default=5000, help="of the Monte-Carlo critic")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--out", type=Path, help="by default RUN/critic_ranking.json")
    parser.add_argument("--then", default="deployed", choices=("deployed", "training"))
    args = parser.parse_args()
    if args.pairs < 2 or args.rollouts < 4:
        parser.error("there must be 2 pairs and 4 rollouts at least")
    torch.set_num_threads(1)
    told = measure(args.run, args.pairs, args.rollouts, args.updates, args.seed, args.then)
    (args.out or args.run / "critic_ranking.json").write_text(json.dumps(told))
    print(table(told))


if __name__ == "__main__":
    main()
