"""Latency of one decision: LeRobot, this package in torch, and what it exports, beside each other.

    python -m benchmarks.latency                      # a few minutes, most of them exports
    python -m benchmarks.latency --rounds 100 --default-unet

One thread, CPU time, batches of one robot, random weights: latency does not depend on them. In
every round each side has a turn, the slow ones of one decision, the fast ones of `CALLS`; each
decision is timed by itself. LeRobot's side is `select_action` alone, on normalised observations;
the exported side is `genpolicy_runtime.Policy.plan`: checks, noise, normaliser, every denoising
step, and un-normaliser. A bare evaluation is the same network as a graph of (x, t, condition), once.

--default-unet adds LeRobot's own default U-Net (252 M weights): three decisions of DDIM-10 in
LeRobot, of which DDPM-100 is computed from the time per evaluation, and three of a bare evaluation.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed_parts.lerobot_decision import ACTION, UNET, WORLD
from benchmarks.speed_parts.timing import STATE, Statistics, weights
from genpolicy.chain import Noise
from genpolicy.cli.evaluate_exported import runtime
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Context
from genpolicy.formats import _graph
from genpolicy.formats._capture import captured
from genpolicy.formats.onnx import onnx
from genpolicy.models.lerobot_diffusion import LeRobotDiffusion
from genpolicy.models.mlp import MLP
from genpolicy.policy.files import save_policy, saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy

CALLS = 5
"""Decisions of a fast side in its turn: the first finds the caches as the side before left them."""
SLOW = 0.02
"""Seconds of a decision from which a side counts as slow."""
WARM_UP = 2
"""Decisions of each side that go before."""
SOLVE = ChainConfig(10, {"name": "ddim", "eta": 0.0})
JUMP = ChainConfig(1, {"name": "consistency"})
"""The samplers of the whole chain, and of the student of one step."""
NATIVE = {"name": "lerobot_diffusion", "train": "denoiser", "spacing": "lerobot", "device": "cpu"}
"""The policy section: LeRobot's own noise times, so that both sample the same function."""
DATA: Any = Statistics({STATE: (4,), WORLD: (35,), "action": (ACTION,)})

Call = Callable[[], object]
Times = dict[str, list[float]]


def timed(sides: Mapping[str, Call], rounds: int) -> Times:
    """Milliseconds of CPU time of every decision of each side, taken in turns."""
    times: Times = {name: [] for name in sides}
    calls: dict[str, int] = {}
    for name, call in sides.items():
        for _ in range(WARM_UP):
            taken = milliseconds(call)
        calls[name] = CALLS if taken < 1000 * SLOW else 1
    for _ in range(rounds):
        for name, call in sides.items():
            times[name] += [milliseconds(call) for _ in range(calls[name])]
    return times


def milliseconds(call: Call) -> float:
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def unet(**config: Any) -> Any:
    """A fresh LeRobot DiffusionPolicy of states."""
    model = LeRobotDiffusion(
        config={**UNET, **config}, train="denoiser", spacing="lerobot", device="cpu"
    )
    model.initialise(DATA)
    return model


def in_lerobot(model: LeRobotDiffusion) -> Call:
    """LeRobot's `select_action` when its queue of actions is empty."""
    policy = model.policy
    seen = {name: torch.rand(1, *shape) for name, shape in model.shapes.items()}
    batch = model.processors.pre(seen)

    def select() -> object:
        policy.reset()
        return policy.select_action(dict(batch))

    return select


def in_torch(policy: ChainPolicy) -> Call:
    """A decision as `genpolicy evaluate` plays and times it."""
    model: Any = policy.model
    seen = {name: torch.rand(1, model.history, *shape) for name, shape in model.shapes.items()}
    noise = Noise.rows(0, 0, torch.arange(1), 1)

    @torch.no_grad()
    def decide() -> Tensor:
        condition = model.encode(Context([""], seen))
        return policy.actions(policy.sample(condition, noise, keep=(0, 0)).x0)

    return decide


def exported(policy: ChainPolicy, section: Any, sampler: ChainConfig, folder: Path) -> Call:
    """Exports a policy, and returns a decision of `genpolicy_runtime`."""
    save_policy(policy, section, sampler, folder / "policy")
    found = saved(folder / "policy")
    told = onnx(found, folder / "exported", data=None, task=None, instruction=None)
    print(told.split("\n")[0], flush=True)
    running = runtime().Policy.load(folder / "exported")
    shapes = running.manifest.observation.items()
    seen = {name: torch.rand(one.shape).numpy() for name, one in shapes}
    return lambda: running.plan(seen)


def bare(network: Callable[..., Tensor], inputs: dict[str, Tensor], file: Path) -> Call:
    """One evaluation of a network as a graph of its own in onnxruntime."""
    _graph.write(captured(network, *inputs.values()), inputs, ["output"], file)
    running, feed = _graph.session(file), _graph.fed(inputs, 0)
    return lambda: running.run(None, feed)


@torch.no_grad()
def condition(model: Any) -> Tensor:
    seen = {name: torch.rand(1, model.history, *shape) for name, shape in model.shapes.items()}
    return model.encode(Context([""], seen))


def bare_unet(model: LeRobotDiffusion, file: Path) -> Call:
    """LeRobot's U-Net of (x, level, condition)."""
    network = model.policy.diffusion.unet
    inputs = {
        "x": torch.randn(1, *model.event_shape),
        "level": torch.ones(1, dtype=torch.long),
        "condition": condition(model),
    }
    return bare(lambda x, level, seen: network(x, level, global_cond=seen), inputs, file)


def bare_mlp(model: MLP, file: Path) -> Call:
    """Our small network of (x, embedded t, condition)."""
    inputs = {
        "x": torch.randn(1, *model.event_shape),
        "time": model._time(torch.ones(1)),
        "condition": condition(model),
    }
    return bare(model._network, inputs, file)


def small_unet(folder: Path, rounds: int) -> Times:
    """The sides of the 5 M U-Net."""
    ddim, ddpm = unet(), unet(noise_scheduler_type="DDPM", num_inference_steps=None)
    student = unet(prediction_type="sample")
    whole, jump = make_policy(ddim, SOLVE), make_policy(student, JUMP)
    print(f"U-Net of {weights(ddim.policy.diffusion.unet) / 1e6:.1f} M weights")
    sides = {
        LEROBOT_100: in_lerobot(ddpm),
        LEROBOT_10: in_lerobot(ddim),
        TORCH_10: in_torch(whole),
        CHAIN: exported(whole, NATIVE, SOLVE, folder / "chain"),
        STUDENT: exported(jump, NATIVE, JUMP, folder / "student"),
        BARE: bare_unet(ddim, folder / "bare.onnx"),
    }
    return timed(sides, rounds)


def small_mlp(folder: Path, rounds: int) -> Times:
    """The sides of a network below 1 M weights."""
    model: Any = MLP(prediction_type="sample")
    model.initialise(DATA)
    policy = make_policy(model, JUMP)
    print(f"mlp of {weights(model._network) / 1e6:.2f} M weights")
    sides = {
        MLP_STUDENT: exported(policy, {"name": "mlp"}, JUMP, folder / "mlp"),
        MLP_BARE: bare_mlp(model, folder / "bare_mlp.onnx"),
    }
    return timed(sides, 10 * rounds)


def default_unet(folder: Path) -> Times:
    """LeRobot's default U-Net: three decisions of DDIM-10, and three bare evaluations."""
    defaults = {key: UNET[key] for key in ("n_obs_steps", "noise_scheduler_type")}
    config = {**defaults, "num_inference_steps": 10}
    model = LeRobotDiffusion(config=config, train="denoiser", device="cpu")
    model.initialise(DATA)
    print(f"default U-Net of {weights(model.policy.diffusion.unet) / 1e6:.0f} M weights")
    sides = {
        DEFAULT_10: in_lerobot(model),
        DEFAULT_BARE: bare_unet(model, folder / "default.onnx"),
    }
    return {name: [milliseconds(call) for _ in range(3)] for name, call in sides.items()}


LEROBOT_100, LEROBOT_10 = "LeRobot select_action, DDPM-100", "LeRobot select_action, DDIM-10"
TORCH_10 = "genpolicy in torch, K = 10"
CHAIN, STUDENT = "exported chain, K = 10", "exported student, K = 1"
BARE = "bare onnxruntime evaluation"
MLP_STUDENT, MLP_BARE = "exported mlp student, K = 1", "bare evaluation of the mlp"
DEFAULT_10, DEFAULT_BARE = "default U-Net, LeRobot DDIM-10", "default U-Net, bare evaluation"


def claims(times: Times) -> list[tuple[str, str, float, float]]:
    """(claim, target, by the minimum, by the median)."""

    def ratio(slower: str, faster: str) -> tuple[float, float]:
        return (
            min(times[slower]) / min(times[faster]),
            median(times[slower]) / median(times[faster]),
        )

    over = (
        1000 * (min(times[MLP_STUDENT]) - min(times[MLP_BARE])),
        1000 * (median(times[MLP_STUDENT]) - median(times[MLP_BARE])),
    )
    return [
        ("LeRobot DDIM-10 / exported chain", ">= 2.5", *ratio(LEROBOT_10, CHAIN)),
        ("genpolicy in torch / exported chain", "", *ratio(TORCH_10, CHAIN)),
        ("LeRobot DDPM-100 / exported student", ">= 240", *ratio(LEROBOT_100, STUDENT)),
        ("exported student / bare evaluation", "<= 1.2", *ratio(STUDENT, BARE)),
        ("exported mlp - bare evaluation, us", "<= 50", *over),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="turns (default: %(default)s)")
    parser.add_argument("--default-unet", action="store_true", help="measure that one, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = {**small_unet(folder, args.rounds), **small_mlp(folder, args.rounds)}
        if args.default_unet:
            times |= default_unet(folder)
    print("\n| decision, 1 thread, CPU time | min ms | median ms | n |\n|---|---|---|---|")
    for side, taken in times.items():
        print(f"| {side} | {min(taken):.3f} | {median(taken):.3f} | {len(taken)} |")
    if args.default_unet:
        each = min(times[DEFAULT_10]) / 10
        print(f"| default U-Net, LeRobot DDPM-100, computed | {100 * each:.0f} | | |")
    print("\n| ratio | target | minima | medians |\n|---|---|---|---|")
    for claim, target, least, middle in claims(times):
        print(f"| {claim} | {target} | {least:.3g} | {middle:.3g} |")


if __name__ == "__main__":
    main()
