"""Train the embedded motion model on one CPU thread and write it as a WanPipeline folder.

    python assets/make_motion_model.py --out assets/motion-wan
    python assets/make_motion_model.py --resume assets/motion-wan --minutes 5 --out longer

The first form trains a small autoencoder of videos, then a text encoder and the transformer
jointly, by flow matching on videos of the *pictured* captions only. In a share of these videos the
object pauses on its way. Their captions are true and say nothing of it, so that the model learns
that things which move often pause; guidance asks for more of what the caption says and does not
mend it, reinforcement learning with a checker can. The second form continues from a finished
folder: the honest baseline for reinforcement learning with equal CPU time (`--paused 0` gives it
even motions only).

Minutes are CPU minutes of training; `--steps...` replace them by numbers of steps, which makes a
run repeatable to the bit on one machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import diffusers
import make_shapes_model as base
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from genpolicy.rewards import _motion as world
from genpolicy.rewards._shapes import SIZE

CALL = {"height": SIZE, "width": SIZE, "num_frames": world.FRAMES, "max_sequence_length": 8}
TOKENS = CALL[
    "max_sequence_length"
]  # the five words of "a red circle moves right", the end, and two of padding
TEXT_WIDTH = 64
WIDTH, HEADS, LAYERS = 96, 4, 4  # of the transformer
PER_CAPTION = 96  # videos rendered for each pictured caption
PAUSE = 3  # steps, of 8, for which the object stands still in the paused videos
PAUSED = 0.6  # share of the videos that are paused
OBJECT = 8.0  # weight of an object's pixels in the autoencoder's training
NARROW = 0.05  # std of the posterior
STILL = 0.35  # share of the autoencoder's training that sees single frames
CAPTION_DROP = 0.1  # share of captions replaced by "", for classifier-free guidance


def tokenizer() -> T5TokenizerFast:
    """Build a T5 tokenizer in which every word of the world is one token."""
    words = sorted({word for text in world.captions() for word in text.split()})
    pieces = ["<pad>", "</s>", "<unk>", *("▁" + word for word in words)]
    scores = [(piece, 0.0 if place < 3 else -1.0) for place, piece in enumerate(pieces)]
    return T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=TOKENS)


def new_pipeline() -> WanPipeline:
    """Build the untrained model.

    The autoencoder has Wan 2.2's patches of 2 x 2 pixels and joins 8 x 8 pixels and four frames:
    the latents of 9 x 32 x 32 are 16 x 3 x 4 x 4.
    """
    words = tokenizer()
    channels = 16
    return WanPipeline(
        tokenizer=words,
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(words),
                d_model=TEXT_WIDTH,
                d_kv=16,
                d_ff=2 * TEXT_WIDTH,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=words.pad_token_id,
                eos_token_id=words.eos_token_id,
            )
        ),
        vae=AutoencoderKLWan(
            base_dim=16,
            z_dim=channels,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=4,
            scale_factor_spatial=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            in_channels=channels,
            out_channels=channels,
            text_dim=TEXT_WIDTH,
            freq_dim=64,
            ffn_dim=3 * WIDTH,
            num_layers=LAYERS,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
    )


def videos(texts: tuple[str, ...], each: int, paused: float, seed: int) -> np.ndarray:
    """Draw ``each`` videos of each caption in turn, a share of them paused: uint8 [N, 9, 32, 32,
    3].
    """
    rng = np.random.default_rng(seed)
    motions = [world.parse(text) for text in texts for _ in range(each)]
    return np.stack(
        [world.render(motion, rng, PAUSE * int(rng.random() < paused)) for motion in motions]
    )


def as_tensor(drawn: np.ndarray) -> Tensor:
    """Turn uint8 [B, F, H, W, 3] into what the autoencoder takes, [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(drawn).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_bytes(decoded: Tensor) -> np.ndarray:
    """Turn decoded videos [B, 3, F, H, W] in [-1, 1] into uint8 [B, F, H, W, 3]."""
    return ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


@torch.no_grad()
def flatten_time(vae: AutoencoderKLWan) -> None:
    """Set the weights so that a frame sees itself alone: a video is encoded by the last frame of
    each four, and decoded as frames that stand still.

    What single frames teach is then right for videos from their first step on.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv3d) or module.kernel_size[0] == 1:
            continue
        module.weight[:, :, :-1] = 0.0
        if name.endswith("time_conv"):  # halves or doubles the frames, with as many copies
            one = torch.eye(module.in_channels)
            copies = module.out_channels // module.in_channels
            module.weight[:, :, -1, 0, 0] = one.repeat(copies, 1)
            module.bias.zero_()


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode to [B, 3, F, H, W] without the last step of the autoencoder, which cuts at -1 and 1:
    a pale background that overshoots would have no gradient, and stay white.
    """
    frames: list[Tensor] = []
    hook = vae.decoder.register_forward_hook(lambda _, __, output: frames.append(output))
    try:
        vae.decode(latents)
    finally:
        hook.remove()
    return unpatchify(torch.cat(frames, 2), patch_size=vae.config.patch_size)


def object_weight(x: Tensor) -> Tensor:
    """Weights of the pixels of videos [B, 3, F, H, W] with mean 1: those of an object, which differ
    from the corner's, and are a tenth of all, count `OBJECT` times as much as the others.
    """
    differs = (x - x[..., :1, :1]).abs().amax(1, keepdim=True) > 0.1
    weight = 1 + (OBJECT - 1) * differs.float()
    return weight / weight.mean()


def train_vae(vae: AutoencoderKLWan, drawn: np.ndarray, clock: base.Clock, seed: int) -> None:
    """Squared error + .1 absolute error + 1e-4 of the squared latent mean, with noise of a fixed std
    on it; then fix mean and std of each channel.

    The first `STILL` of it sees single frames, 16 at a time, which cost a ninth of videos: what is
    in space is learned there, and what is in time from two videos at a time, at a falling rate. The
    std is fixed at `NARROW` because a posterior that begins at std 1 hides the objects.
    """
    flatten_time(vae)
    with torch.no_grad():
        vae.quant_conv.weight[vae.z_dim :] = 0.0
        vae.quant_conv.bias[vae.z_dim :] = 2 * np.log(NARROW)  # log variance
    draws = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0)
    vae.train()
    while clock.progress < 1:
        still = clock.progress < STILL
        size = 16 if still else 2
        part = max(0.0, (clock.progress - STILL) / (1 - STILL))
        for group in optimiser.param_groups:
            fall = 0.01 + 0.99 * np.cos(np.pi / 2 * part) ** 2
            group["lr"] = 2e-3 * min(1, (clock.step + 1) / 50) * fall
        rows = torch.randint(len(drawn), (size,), generator=draws)
        frames = torch.randint(world.FRAMES, (size,), generator=draws)
        x = as_tensor(drawn[rows, frames][:, None] if still else drawn[rows])
        mean = vae.encode(x).latent_dist.mean
        y = decode(vae, mean + NARROW * torch.randn(mean.shape, generator=draws))
        weight = object_weight(x)
        mse = (weight * (y - x).square()).mean()
        loss = mse + 0.1 * (weight * (y - x).abs()).mean() + 1e-4 * mean.square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        clock.step += 1
        if clock.step % 200 == 0:
            base.say(f"vae step {clock.step}: mse {mse.item():.5f}, {clock.spent:.0f} CPU s")
    vae.eval()
    latents = encode(vae, drawn)
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(),
        latents_std=latents.std((0, 2, 3, 4)).tolist(),
    )


@torch.no_grad()
def encode(vae: AutoencoderKLWan, drawn: np.ndarray) -> Tensor:
    """Posterior means of videos, unscaled, [N, 16, 3, 4, 4]."""
    parts = np.array_split(drawn, -(-len(drawn) // 64))
    return torch.cat([vae.encode(as_tensor(part)).latent_dist.mean for part in parts])


@torch.no_grad()
def ceiling(vae: AutoencoderKLWan, each: int = 5) -> float:
    """Strict score of reconstructed true videos of all captions: what no policy here can beat."""
    texts = tuple(world.captions())
    latents = encode(vae, videos(texts, each, 0.0, seed=99))
    decoded = np.concatenate([to_bytes(vae.decode(part).sample) for part in latents.split(64)])
    return float(world.scores(decoded, [text for text in texts for _ in range(each)])[:, 0].mean())


def text_embeddings(pipe: WanPipeline, ids: Tensor) -> Tensor:
    """Embeddings [B, TOKENS, TEXT_WIDTH], zero on padding, as the pipeline's `encode_prompt` has
    them.
    """
    mask = ids != pipe.tokenizer.pad_token_id
    return pipe.text_encoder(ids, mask).last_hidden_state * mask[..., None]


def train_flow(
    pipe: WanPipeline, latents: Tensor, clock: base.Clock, seed: int, schedule: base.Schedule
) -> None:
    """Flow matching: x_t = (1 - t) x_0 + t eps with logit-normal t, loss |v - (eps - x_0)|^2.

    `latents` holds `PER_CAPTION` videos of each pictured caption in turn, in the pipeline's scale.
    The pipeline ends with the moving average of the weights.
    """
    encode_ids = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
    ids = pipe.tokenizer(list(world.split().pictured), **encode_ids).input_ids
    empty = pipe.tokenizer([""], **encode_ids).input_ids
    draws = torch.Generator().manual_seed(seed)
    modules = (pipe.transformer, pipe.text_encoder)
    weights = [p for module in modules for p in module.parameters()]
    average = [p.detach().clone() for p in weights]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.99))
    size, mean_loss = 64, 0.0
    for module in modules:
        module.train()
    while clock.progress < 1:
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(clock)
        rows = torch.randint(len(latents), (size,), generator=draws)
        dropped = torch.rand(size, 1, generator=draws) < CAPTION_DROP
        tokens = text_embeddings(pipe, torch.where(dropped, empty, ids[rows // PER_CAPTION]))
        t = torch.randn(size, generator=draws).sigmoid()
        x_0 = latents[rows]
        eps = torch.randn(x_0.shape, generator=draws)
        x_t = torch.lerp(x_0, eps, t[:, None, None, None, None])
        velocity = pipe.transformer(
            x_t, timestep=1000 * t, encoder_hidden_states=tokens, return_dict=False
        )[0]
        loss = F.mse_loss(velocity, eps - x_0)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        clock.step += 1
        keep = min(schedule.ema, clock.step / (10 + clock.step))
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - keep)
        mean_loss += 0.01 * (loss.item() - mean_loss) if mean_loss else loss.item()
        if clock.step % 200 == 0:
            base.say(f"flow step {clock.step}: loss {mean_loss:.4f}, {clock.spent:.0f} CPU s")
    base.swap(weights, average)
    for module in modules:
        module.eval()


@torch.no_grad()
def sample(pipe: WanPipeline, texts: list[str], guidance: float, seed: int) -> np.ndarray:
    """One video per caption with eight real steps, uint8 [B, 9, 32, 32, 3].

    Of the nine steps that diffusers makes the last begins at noise time .001.
    """
    drawn = pipe(
        texts,
        num_inference_steps=9,
        guidance_scale=guidance,
        **CALL,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames
    return (drawn * 255).round().astype(np.uint8)


def report(pipe: WanPipeline, each: int) -> str:
    """Strict / dense of each part at three guidances, so many videos per caption."""
    cells = []
    for name, texts in world.split()._asdict().items():
        for guidance in (1.0, 2.0, 4.0):
            asked = list(texts) * each
            strict, dense = world.scores(sample(pipe, asked, guidance, seed=1), asked).mean(0)
            cells.append(f"{name} g{guidance:g} {strict:.3f}/{dense:.3f}")
    return "  ".join(cells)


def write(pipe: WanPipeline, out: Path) -> None:
    """Write the folder: safetensors, captions, and the call and the sampler with which genpolicy
    draws from it (Wan's own default is a long video of 480 x 832).
    """
    base.write(pipe, out, world.split()._asdict())
    section = {"name": "diffusers_pipeline", "train": "full", "call": CALL}
    sampler = {"steps": 8, "kernel": {"name": "ddim", "eta": 0.0}}
    told = json.dumps({"policy": section, "chain": sampler}, indent=1)
    (out / "genpolicy.json").write_text(told + "\n", encoding="utf-8")


def load(folder: Path) -> WanPipeline:
    """Load a written folder, in fp32."""
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--resume", type=Path, help="only continue from this finished folder, for --minutes")
    add("--vae", type=Path, help="take the autoencoder from this finished folder")
    add("--minutes-vae", type=float, default=14.0, help="CPU minutes for the autoencoder")
    add("--minutes", type=float, default=15.0, help="CPU minutes for transformer and text encoder")
    add("--steps-vae", type=int, help="optimiser steps, instead of --minutes-vae")
    add("--steps", type=int, help="optimiser steps, instead of --minutes")
    add("--paused", type=float, default=PAUSED, help="share of the videos with a pause")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, or continue to train, and write the folder."""
    args = arguments()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    pipe = load(args.resume) if args.resume else new_pipeline()
    pipe.set_progress_bar_config(disable=True)
    drawn = videos(world.split().pictured, PER_CAPTION, args.paused, args.seed)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    sizes = [f"{name} {sum(p.numel() for p in part.parameters())}" for name, part in parts.items()]
    base.say(f"{len(drawn)} videos; parameters: {', '.join(sizes)}")

    if args.vae:
        pipe.register_modules(vae=load(args.vae).vae)
    elif not args.resume:
        train_vae(pipe.vae, drawn, base.Clock(args.minutes_vae, args.steps_vae), args.seed)
        write(pipe, args.out)
    pipe.vae.requires_grad_(False)
    base.say(f"strict {ceiling(pipe.vae):.4f} on reconstructed true videos (n 240)")

    mean, std = (
        torch.tensor(pipe.vae.config[name])[:, None, None, None]
        for name in ("latents_mean", "latents_std")
    )
    latents = (encode(pipe.vae, drawn) - mean) / std
    clock = base.Clock(args.minutes, args.steps)
    schedule = base.Schedule(lr=1.5e-3, warm_up=100, decay=0.3, ema=0.998)
    train_flow(pipe, latents, clock, args.seed, schedule)
    write(pipe, args.out)
    base.say(f"after {clock.step} steps, {clock.spent:.0f} CPU s: {report(pipe, each=4)}")
    base.say("wrote", args.out.name)


if __name__ == "__main__":
    main()
