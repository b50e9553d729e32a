"""Part b: one decision of LeRobot's DiffusionPolicy, beside LeRobot."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.speed_parts.timing import (
    STATE,
    Comparison,
    Statistics,
    compare,
    require_close,
    weights,
)
from genpolicy.chain import DDIM, Chain, Noise
from genpolicy.contracts.task import Context
from genpolicy.models.lerobot_diffusion import LeRobotDiffusion
from genpolicy.policy.policy import ChainPolicy

WORLD, ACTION = "observation.environment_state", 4
SOLVER_STEPS = 10
UNET = {
    "n_obs_steps": 2,
    "horizon": 16,
    "n_action_steps": 8,
    "down_dims": [64, 128, 256],
    "diffusion_step_embed_dim": 64,
    "noise_scheduler_type": "DDIM",
    "num_inference_steps": SOLVER_STEPS,
    "pretrained_backbone_weights": None,
}
"""Keys of LeRobot's DiffusionConfig."""


def lerobot(repeats: int) -> Iterator[Comparison]:
    """Two rows. The chain: `policy.sample` from the encoded observation, beside LeRobot's
    `diffusion.generate_actions`, which also joins the normalised vectors (no network). The whole
    decision: from the raw observation to a chunk in the environment's units, beside LeRobot's
    preprocessor, `predict_action_chunk` (what `select_action` calls when its queue is empty) and
    postprocessor. Each side draws its own initial noise.
    """
    model = LeRobotDiffusion(config=UNET, train="denoiser", spacing="lerobot", device="cpu")
    model.initialise(Statistics({STATE: (4,), WORLD: (35,), "action": (ACTION,)}))
    theirs = model.policy
    theirs.reset()
    chain = Chain(model.schedule, model.grid(SOLVER_STEPS), DDIM(0.0))
    policy = ChainPolicy(model, chain)
    observation = {
        name: torch.rand(1, model.history, *shape) for name, shape in model.shapes.items()
    }
    context, noise = Context(["reach"], observation), Noise.rows(0, 0, torch.arange(1), 1)
    condition = model.encode(context)
    batch = model.processors.pre(dict(observation))

    start = torch.randn(1, *model.event_shape)
    ours = model.decode(policy.sample(condition, noise, start=(0, start)).x0)
    other = model.processors.post(theirs.predict_action_chunk(batch, noise=start.clone()))
    require_close("b, actions", ours, other, 1e-5)

    size = f"{weights(theirs.diffusion.unet) / 1e6:.1f} M U-Net, {SOLVER_STEPS} DDIM steps, 1 row"

    @torch.no_grad()
    def generate() -> Tensor:
        return theirs.diffusion.generate_actions(batch)

    yield compare(
        f"b: chain of a {size}", lambda: policy.sample(condition, noise), generate, repeats
    )

    @torch.no_grad()
    def decide() -> Tensor:
        return model.decode(policy.sample(model.encode(context), noise).x0)

    def decide_in_lerobot() -> Tensor:
        seen = model.processors.pre(dict(observation))
        return model.processors.post(theirs.predict_action_chunk(seen))

    yield compare(f"b: decision of a {size}", decide, decide_in_lerobot, repeats)
