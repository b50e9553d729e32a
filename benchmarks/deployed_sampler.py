"""The effect of the deployed sampler on the score: one trained network, five ways to sample it.

    # RUN: a DPPO run on MetaWorld
    python -m benchmarks.deployed_sampler RUN [--episodes 300] [--seed 3000000]

For each sampler: its success on the same starts; and on the states that it visits itself, per
denoising step, how much wider or narrower than the training kernel's states they are (distance to
the noiseless action, and spread over draws of noise), and how much the network's prediction of the
action has moved there from what was cloned.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from genpolicy.chain import DDIM, Mean, Noise
from genpolicy.config import leaves, parse
from genpolicy.config.origin import PERSON
from genpolicy.contracts.task import Context
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.policy.files import saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from genpolicy.rollout.episodes import play
from genpolicy.training.build import control_model

SLOTS, ROWS, DRAWS = 20, 200, 16


def samplers(policy: ChainPolicy) -> dict[str, ChainPolicy]:
    """The training kernel and what can be made of it; ``policy`` carries the training kernel."""
    chain, K = policy.chain, policy.chain.K
    kinds = {
        "as trained": chain,
        "as trained, last step at its mean": replace(chain, window=(0, K - 1)),
        "mean of the kernel": replace(chain, kernel=Mean(chain.kernel)),
        "ode": replace(chain, kernel=DDIM(0.0), window=(0, 0)),
    }
    return {name: replace(policy, chain=kind) for name, kind in kinds.items()}


@torch.no_grad()
def visited(policy: ChainPolicy, context: Context) -> torch.Tensor:
    """x before every step and the result, [rows, draws, K+1, *E]."""
    rows = torch.arange(len(context)).repeat_interleave(DRAWS)
    noise = Noise.rows(1, 0, torch.arange(len(context)), DRAWS)
    condition = policy.model.encode(context[rows])
    whole = policy.sample(condition, noise, keep=(0, policy.chain.K))
    return whole.x.view(len(context), DRAWS, *whole.x.shape[1:])


@torch.no_grad()
def predicted(policy: ChainPolicy, x: torch.Tensor, k: int, context: Context) -> torch.Tensor:
    rows = torch.arange(len(context)).repeat_interleave(DRAWS)
    flat = x.flatten(0, 1)
    t = policy.chain.step(k, len(flat)).t
    return policy.denoiser(flat, t, policy.model.encode(context[rows])).x0.view_as(x)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=3_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    experiment = parse.load(args.run / "config.yaml")
    task = leaves.make("tasks", experiment.task, PERSON)
    cloned = make_policy(control_model(experiment.policy, task, None, PERSON), experiment.chain)
    trained = make_policy(saved(args.run).load().model, experiment.chain)
    environments = task.environments(SLOTS, trained.model.history)
    seeds = range(args.seed, args.seed + 20)
    one = Noise.rows(args.seed, -1, torch.arange(20), 1)
    seen = Context.cat([d.context for d in play(trained, environments, seeds, one, keep=(0, 0))])
    context = seen[torch.linspace(0, len(seen) - 1, ROWS).long()]
    reference = visited(samplers(trained)["as trained"], context)
    print(
        f"{args.run}: {args.episodes} episodes from seed {args.seed};"
        f" {ROWS} observations x {DRAWS} draws of noise"
    )
    for name, policy in samplers(trained).items():
        result = evaluate_control(
            policy, environments, episodes=args.episodes, seed=args.seed
        ).metrics()
        x = visited(policy, context)
        low, high = result["ci95/success_rate"]
        print(f"\n{name}: success {result['success_rate']:.3f} [{low:.3f}, {high:.3f}]")
        print(
            "  k    spread over noise / the training kernel's    |x0 now - x0 cloned| on own states"
        )
        for k in range(policy.chain.K):
            spread = x[:, :, k].std(1).mean() / reference[:, :, k].std(1).mean()
            now, then = (
                predicted(p, x[:, :, k], k, context)
                for p in (policy, replace(cloned, chain=policy.chain))
            )
            moved = (now - then).pow(2).mean().sqrt()
            print(f"  {k}    {spread:8.3f}    {moved:8.3f}")
        last = x[:, :, -1]
        print(
            f"  action: spread {last.std(1).mean():.4f},"
            " distance to the training kernel's mean action "
            f"{(last.mean(1) - reference[:, :, -1].mean(1)).abs().mean():.4f}"
        )
    environments.close()


if __name__ == "__main__":
    main()
