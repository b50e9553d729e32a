"""The verb pairs: draws pairs of pictures from a policy, of which a reward prefers one, as a data
set.
"""

import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from genpolicy.chain import Noise
from genpolicy.cli.sections import sampler_keys
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.datasets.picture_pairs import PicturePairs
from genpolicy.policy.files import Saved, saved
from genpolicy.rollout.judged_pairs import preferences
from genpolicy.rollout.micro_batch import MicroBatches
from genpolicy.training.build import load_rewards, make_rewards, prompt_lines
from genpolicy.training.draws import Draws


def run(args: Namespace) -> int:
    """Draws the groups and writes the pair of each that the reward tells apart into ``args.out``;
    all of them are a function of the policy, the prompts, the reward and the seed.
    """
    _require(args)
    found = saved(args.policy, trust=args.trust, **sampler_keys(args))
    if found.acts:
        raise ConfigError(
            f"{args.policy} acts, it does not draw: genpolicy demonstrate records its episodes"
        )
    reward, source, lines = _judge(args, found)
    load_rewards(reward)
    groups = args.groups or len(lines)
    prompts = [lines[group % len(lines)] for group in range(groups)]
    draws = Draws(args.seed)
    sides = draws.generator("sides of pairs", 0, 0).random(groups) < 0.5
    flipped = draws.generator("wrong labels", 0, 0).random(groups) < args.wrong
    made: dict[str, Any] = {
        "policy": found.where,
        "sampler": asdict(found.sampler),
        "reward": reward.weights,
        "prompts": source,
        "groups": groups,
        "members": args.members,
        "wrong": args.wrong,
        "seed": args.seed,
    }
    pairs = wrong = 0
    with (
        PicturePairs.recording(Path(args.out), made) as keep,
        tqdm(total=groups, desc="pairs", unit="group", file=sys.stderr) as bar,
    ):
        noise = _noise(draws, groups, args.members)
        fits = MicroBatches("auto", bar.write)
        for block in preferences(found.load(), reward, prompts, noise, fits):
            for group, one in enumerate(block, bar.n):
                if one is None:
                    continue
                better, worse = one.preferred, one.other
                if flipped[group]:
                    better, worse = worse, better
                keep(one.prompt, better, worse, bool(sides[group]))
                pairs += 1
                wrong += int(flipped[group])
            bar.update(len(block))
            bar.set_postfix_str(f"{bar.n - pairs} without a margin")
        if not pairs:
            raise ConfigError(
                f"the reward judges all {args.members} samples alike in each of the {groups}"
                " groups: there is no pair to keep; draw more --members, or name another --reward"
            )
        made.update(pairs=pairs, dropped=groups - pairs, flipped=wrong)
    print(f"{args.out}: {pairs} pairs of {groups} groups, {wrong} of them with the wrong label")
    return 0


def _require(args: Namespace) -> None:
    """Raises `ConfigError` for an option out of its range, and where the folder is there."""
    if args.members < 2:
        raise ConfigError(f"--members is {args.members}; it must be at least 2")
    if args.groups is not None and args.groups < 1:
        raise ConfigError(f"--groups is {args.groups}; it must be at least 1")
    if not 0 <= args.wrong <= 1:
        raise ConfigError(f"--wrong is {args.wrong}; it must be between 0 and 1")
    if Path(args.out).exists():
        raise ConfigError(f"{args.out} exists already: choose another folder, or delete it")


def _judge(args: Namespace, found: Saved) -> tuple[WeightedRewards, str, tuple[str, ...]]:
    """The reward, and the prompts with the file that they are from: those that were asked for, or
    those of the run.
    """
    rewards: dict[str, Any] = dict.fromkeys(args.reward or (), 1.0)
    of_rewards, source = PERSON, args.prompts
    if found.run is not None:
        config = found.run / "config.yaml"
        experiment = parse.load(config)
        source = source or experiment.task.get("prompts")
        if not rewards:
            rewards, of_rewards = experiment.reward, found.origin.reached(config)
    if source is None or not rewards:
        raise ConfigError(
            f"{args.policy} comes with no prompts and reward of a run of ours: name its --prompts"
            " FILE and --reward NAME"
        )
    return make_rewards(rewards, of_rewards), str(source), prompt_lines(str(source))


def _noise(draws: Draws, groups: int, members: int) -> Noise:
    """The noise of the groups' members, group-major."""
    place = torch.arange(groups * members)
    return replace(draws.noise("pairs", 0, place // members, 0), member=place % members)
