"""The exactness of the diffusers adapter, family by family: `python -m benchmarks.replay_table`
(CPU, a minute).

golden: max |our chain at zero noise - the pipeline's own sampler| over the std of its latents, with
the same start and guidance. replay: max over kept steps and rows of |log-prob scored again -
log-prob that acted|, mean-reduced, for DDIM eta 1, guided, with a LoRA that says something; scored
in the same batch, in batches of one row, from states stored in bf16 and fp16, and with the network
run in bf16. gradient: the smallest norm over the steps of d log-prob / d LoRA.
"""

import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from genpolicy.chain import DDIM, Chain, Noise, Trajectory
from genpolicy.chain.noise import PRIOR
from genpolicy.contracts.task import Context
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.policy.policy import ChainPolicy
from tests import tiny

PROMPTS = ["a red circle", "a blue square", "a green triangle", "a yellow square"]
STEPS = 4
COLUMNS = (
    *("family", "golden", "replay, same batch", "row by row"),
    *("bf16 storage", "fp16 storage", "bf16 network", "gradient"),
)


def policy(folder: Path, family: str, **settings: Any) -> ChainPolicy:
    """The family with a LoRA whose B is not 0, acting with DDIM eta 1."""
    lora = {"rank": 4, "alpha": 8.0}
    model = DiffusersPipeline(
        str(folder), device="cpu", call=tiny.CALL[family], lora=lora, **settings
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return ChainPolicy(
        model, Chain(model.schedule, model.grid(STEPS), DDIM(1.0)), tiny.GUIDANCE[family]
    )


def sample(policy: ChainPolicy, **options: Any) -> Trajectory:
    noise = Noise.rows(0, 0, torch.arange(len(PROMPTS)), 1)
    return policy.sample(policy.model.encode(Context(PROMPTS)), noise, **options)


@torch.no_grad()
def deviation(policy: ChainPolicy, trajectory: Trajectory) -> float:
    worst = 0.0
    for k in trajectory.steps:
        after = trajectory.after(k)
        again = policy.transition(trajectory, k).log_prob(after, reduce="mean")
        acted = trajectory.acted(k).log_prob(after, reduce="mean")
        worst = max(worst, float((again - acted).abs().max()))
    return worst


def golden(folder: Path, family: str) -> float:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    model = DiffusersPipeline(str(folder), train="full", device="cpu", call=tiny.CALL[family])
    chain = Chain(model.schedule, model.native_grid(STEPS), DDIM(0.0))
    ours = sample(ChainPolicy(model, chain, tiny.GUIDANCE[family])).x0
    latents = Noise.rows(0, 0, torch.arange(len(PROMPTS)), 1)(PRIOR, model.event_shape)
    guidance = {} if family == "flux" else {"guidance_scale": tiny.GUIDANCE[family]}
    call = {**tiny.CALL[family], **guidance, "num_inference_steps": STEPS, "output_type": "latent"}
    theirs = pipeline(PROMPTS, latents=latents, **call)[0]
    return float((ours - theirs).abs().max() / theirs.std())


def gradient(policy: ChainPolicy, trajectory: Trajectory) -> float:
    parameters, norms = list(policy.model.trainable().values()), []
    for k in trajectory.steps:
        loss = policy.transition(trajectory, k).log_prob(trajectory.after(k), reduce="mean").mean()
        gradients = torch.autograd.grad(loss, parameters)
        norms.append(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))
    return min(norms)


def row(family: str, folder: Path) -> list[float]:
    fp32, bf16 = policy(folder, family), policy(folder, family, precision="bf16")
    trajectory = sample(fp32)
    singles = [trajectory[i : i + 1] for i in range(len(trajectory))]
    stored = [sample(fp32, storage=dtype) for dtype in (torch.bfloat16, torch.float16)]
    return [
        golden(folder, family),
        deviation(fp32, trajectory),
        max(deviation(fp32, single) for single in singles),
        *(deviation(fp32, t) for t in stored),
        deviation(bf16, sample(bf16)),
        gradient(fp32, trajectory),
    ]


def main() -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for family in tiny.BUILD:
        with tempfile.TemporaryDirectory() as folder:
            tiny.build(family).save_pretrained(folder)
            numbers = [f"{value:.1e}" if value else "0" for value in row(family, Path(folder))]
        print(f"| {family} | " + " | ".join(numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
