"""Strict accuracy and diversity of shapes policies, beside the honest baselines.

    python -m benchmarks.shapes assets/shapes-sd3 --guidance 1 1.5 2 3 4 --captions train
    python -m benchmarks.shapes assets/shapes-sd3 runs/quickstart --captions held_out --seed 99

A line a policy and guidance scale: strict accuracy with its Wilson interval, dense score, network
evaluations per image, and how different the pictures of one caption are. ``spread``: std, in pixels
of 32, of the place of the pair along the axis that the relation leaves free, over the strictly
correct pictures of a caption, averaged over captions with at least 3 of them; wrong pictures can't
inflate it. ``pixels``: the within-prompt diversity that every evaluation reports, over all
pictures.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import genpolicy
from genpolicy.config.shipped import path
from genpolicy.contracts.reward import WeightedRewards
from genpolicy.contracts.task import read_prompts
from genpolicy.evaluation.prompt_scores import evaluate
from genpolicy.evaluation.statistics import interval
from genpolicy.policy.policy import ChainPolicy
from genpolicy.rewards import _shapes as world
from genpolicy.rewards.shapes_dense import shapes_dense
from genpolicy.rewards.shapes_strict import shapes_strict

REWARDS = WeightedRewards(
    {"shapes_strict": (shapes_strict, 1.0), "shapes_dense": (shapes_dense, 0.0)}
)


def load(source: str, guidance: float) -> ChainPolicy:
    """A run, a policy folder, or the embedded base with the quickstart's deployed sampler."""
    folder = Path(source)
    if (folder / "genpolicy.json").is_file() or (folder / "config.yaml").is_file():
        return genpolicy.load(folder, guidance=guidance)
    from genpolicy.config.schema import ChainConfig
    from genpolicy.models.diffusers_pipeline import DiffusersPipeline
    from genpolicy.policy.sampler import make_policy

    model = DiffusersPipeline(str(path(source)), train="full", call={"max_sequence_length": 1})
    return make_policy(
        model, ChainConfig(steps=8, kernel={"name": "ddim", "eta": 0.0}, guidance=guidance)
    )


def spread(images: torch.Tensor, captions: list[str]) -> float:
    """See ``spread`` above; images [S,3,H,W] in [0,1] of S captions, in the same order."""
    places: dict[str, list[tuple[float, float]]] = {}
    found = world.detect_all(world.to_uint8(images))
    correct = world.scores(world.to_uint8(images), captions)[:, 0] == 1
    for text, objects, right in zip(captions, found, correct, strict=True):
        if right:
            sideways = world.parse(text).relation in ("left of", "right of")
            places.setdefault(text, []).append(
                tuple(o.y if sideways else o.x for o in sorted(objects))
            )
    stds = [np.std(p, axis=0).mean() for p in places.values() if len(p) >= 3]
    return float(np.mean(stds)) if stds else float("nan")


def measure(
    policy: ChainPolicy, captions: tuple[str, ...], per_caption: int, seed: int
) -> dict[str, float]:
    """All the numbers of one line, from per_caption pictures of every caption."""
    before = policy.model.evaluations
    samples = per_caption * len(captions)
    result = evaluate(policy, REWARDS, prompts=captions, samples=samples, seed=seed, shown=samples)
    evaluations = (policy.model.evaluations - before) / samples
    strict = result.parts["shapes_strict"]
    low, high = interval(strict)
    return {
        "n": samples,
        "strict": float(strict.mean()),
        "low": low,
        "high": high,
        "dense": float(result.parts["shapes_dense"].mean()),
        "evaluations": evaluations,
        "spread": spread(result.outputs, list(result.prompts)),
        "pixels": result.diversity,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "policies", nargs="*", default=["assets/shapes-sd3"], help="runs, or policy folders"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--captions", choices=("train", "held_out", "pictured"), default="held_out")
    parser.add_argument("--per-caption", type=int, default=8)
    parser.add_argument("--seed", type=int, default=4242)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    captions = read_prompts(str(path(f"assets/shapes-sd3/captions_{arguments.captions}.txt")))
    print(
        "| policy | guidance | n | strict [95 %] | dense | evaluations/image | spread | pixels |"
        "\n|---|---|---|---|---|---|---|---|"
    )
    for source in arguments.policies:
        for guidance in arguments.guidance:
            m = measure(load(source, guidance), captions, arguments.per_caption, arguments.seed)
            print(
                f"| {source} | {guidance:g} | {m['n']}"
                f" | {m['strict']:.3f} [{m['low']:.3f}, {m['high']:.3f}] | {m['dense']:.3f}"
                f" | {m['evaluations']:g} | {m['spread']:.2f} | {m['pixels']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
