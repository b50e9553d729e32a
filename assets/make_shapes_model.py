"""Train the embedded shapes model on one CPU thread and write it as a StableDiffusion3Pipeline
folder.

    python assets/make_shapes_model.py --out assets/shapes-sd3
    python assets/make_shapes_model.py --resume assets/shapes-sd3 --minutes 5 --out longer

The first form trains a small autoencoder, then two text encoders and the transformer jointly, by
flow matching on pictures of the *pictured* captions only: first with right captions, then for a
short last phase with captions of which a share is wrong in one word, as captions on the web often
are. The model can then draw every picture but does not trust its prompt, which guidance or
reinforcement learning can mend. The second form continues that last phase of a finished folder: the
honest baseline for reinforcement learning with equal CPU time (`--caption-noise 0` gives it right
captions instead, of which there are none for the prompts of reinforcement learning).

Minutes are CPU minutes of training; `--steps...` replace them by numbers of steps, which makes a
run repeatable to the bit on one machine.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from genpolicy.rewards import _shapes as world

TOKENS = 10  # begin, the eight words of "a red circle left of a blue square", end
WIDTH = 96  # of the transformer, of its text tokens, and of the pooled text
PER_CAPTION = 64  # pictures rendered for each pictured caption
CAPTION_NOISE = 0.42  # share of pictures whose caption is wrong in one word, in the last phase
CAPTION_DROP = 0.1  # share of captions replaced by "", for classifier-free guidance
LONG_EVERY, LONG_BATCH, LONG_ZEROS = (
    25,
    16,
    256,
)  # every 25th batch is small and carries the 256 zero tokens of
# diffusers' default call; the others carry one
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


@dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up over `warm_up` steps, constant,
    linear fall in the last `decay` share.
    """

    lr: float
    warm_up: int
    decay: float
    ema: float  # decay of the moving average of the weights, a step

    def rate(self, clock: Clock) -> float:
        """Give the learning rate now."""
        fall = min(1.0, (1 - clock.progress) / self.decay) if self.decay else 1.0
        return self.lr * min(1.0, (clock.step + 1) / self.warm_up) * max(fall, 0.02)


def say(*parts: object) -> None:
    """One line of progress, stamped with CPU seconds."""
    print(f"[{time.process_time():7.1f}s]", *parts, flush=True)


class Clock:
    """Progress in [0, 1] of a phase that ends after so many steps, or else CPU minutes;
    pauses do not count.
    """

    def __init__(self, minutes: float, steps: int | None):
        self.seconds, self.steps, self.step = 60 * minutes, steps, 0
        self.start, self.paused = time.process_time(), 0.0

    @property
    def spent(self) -> float:
        """CPU seconds of the phase so far."""
        return time.process_time() - self.start - self.paused

    @property
    def progress(self) -> float:
        """0 at the start, 1 or more when the phase is over."""
        return self.step / self.steps if self.steps else self.spent / self.seconds

    def pause(self, work: Callable[[], None]) -> None:
        """Do something that does not count."""
        before = time.process_time()
        work()
        self.paused += time.process_time() - before


def clip_tokenizer() -> CLIPTokenizer:
    """Write a CLIP tokenizer in which every word of the world is one token, by rule.

    Byte-pair merges build each word from left to right, longest word first (so that no shorter
    word's merge breaks a longer one). Training a tokenizer would break ties differently from run to
    run.
    """
    words = sorted(
        {w for text in world.captions() for w in text.split()}, key=lambda w: (-len(w), w)
    )
    letters = [chr(code) for code in range(33, 127)]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        for i in range(1, len(word)):
            pair = word[:i], word[i] + ("</w>" if i == len(word) - 1 else "")
            if pair not in merges:
                merges.append(pair)
                vocab.append("".join(pair))
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, merges=merges, model_max_length=TOKENS
    )
    if any(len(tokenizer.tokenize(word)) != 1 for word in words):
        raise RuntimeError("a word of the world is not one token.")
    return tokenizer


def placeholder_t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """Build what stands in SD3's third text slot: all weights are 0, so its output is exactly 0.

    Its tokenizer reads every text as empty: the pipeline then never warns that a third prompt was
    cut.
    """
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(special.values())}, unk_token="<unk>")
    )
    words.normalizer = normalizers.Replace(Regex("[\\s\\S]+"), "")
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    config = T5Config(
        vocab_size=len(special), d_model=WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1
    )
    encoder = T5EncoderModel(config)
    for weight in encoder.parameters():
        nn.init.zeros_(weight)
    return encoder, PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=LONG_ZEROS, **special
    )


def new_pipeline() -> StableDiffusion3Pipeline:
    """Build the untrained model."""
    tokenizer = clip_tokenizer()

    def text_encoder(width: int, layers: int, projection: int) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            max_position_embeddings=TOKENS,
            projection_dim=projection,
            hidden_act="gelu",
            **SPECIAL,
        )
        return CLIPTextModelWithProjection(config)

    t5, t5_tokenizer = placeholder_t5()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=WIDTH // 32,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=4,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=world.SIZE,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=text_encoder(64, 3, 64),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder(32, 2, 32),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def trained_modules(pipe: StableDiffusion3Pipeline) -> tuple[nn.Module, ...]:
    """Return what flow matching trains."""
    return pipe.transformer, pipe.text_encoder, pipe.text_encoder_2


def set_training(pipe: StableDiffusion3Pipeline, training: bool) -> None:
    """Switch what flow matching trains to training or evaluation."""
    for module in trained_modules(pipe):
        module.train(training)


def to_bytes(images: Tensor) -> np.ndarray:
    """Turn decoded [-1, 1] pictures into uint8 [B, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def as_tensor(drawn: np.ndarray) -> Tensor:
    """Turn uint8 [B, H, W, 3] into [-1, 1] pictures [B, 3, H, W]."""
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def pictures(seed: int) -> Tensor:
    """Draw `PER_CAPTION` true pictures of each pictured caption in turn, [B, 3,
    32, 32] in [-1, 1].
    """
    rng = np.random.default_rng(seed)
    scenes = [world.parse(text) for text in world.split().pictured]
    return as_tensor(
        np.stack([world.render(scene, rng) for scene in scenes for _ in range(PER_CAPTION)])
    )


def train_vae(vae: AutoencoderKL, images: Tensor, clock: Clock, seed: int, batch: int = 16) -> None:
    """Squared error + .1 absolute error + 2e-4 KL a latent element, cosine rate;
    then fix shift and scale.
    """
    draws = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0)
    vae.train()
    while clock.progress < 1:
        for group in optimiser.param_groups:
            group["lr"] = (
                2e-3
                * min(1, (clock.step + 1) / 50)
                * (0.01 + 0.99 * np.cos(np.pi / 2 * clock.progress) ** 2)
            )
        x = images[torch.randint(len(images), (batch,), generator=draws)]
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator=draws)).sample
        mse = F.mse_loss(y, x)
        loss = (
            mse + 0.1 * F.l1_loss(y, x) + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        clock.step += 1
        if clock.step % 200 == 0:
            say(f"vae step {clock.step}: mse {mse.item():.5f}")
    vae.eval()
    latents = encode(vae, images)
    vae.register_to_config(
        shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior means, unscaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(256)])


@torch.no_grad()
def ceiling(vae: AutoencoderKL, n: int = 1024) -> float:
    """Strict score of reconstructed true pictures of all captions: what no policy here can beat."""
    rng = np.random.default_rng(99)
    texts = [world.captions()[i] for i in rng.integers(len(world.captions()), size=n)]
    drawn = np.stack([world.render(world.parse(text), rng) for text in texts])
    return float(world.scores(through(vae, drawn), texts)[:, 0].mean())


@torch.no_grad()
def through(vae: AutoencoderKL, drawn: np.ndarray) -> np.ndarray:
    """Give what the autoencoder makes of pictures, uint8 [B, H, W, 3]."""
    return to_bytes(vae.decode(encode(vae, as_tensor(drawn))).sample)


def one_word_off(texts: tuple[str, ...]) -> list[list[int]]:
    """The captions that differ from each caption in one of colour, shape,
    relation, colour, shape.
    """
    slots = [(*s.first, s.relation, *s.second) for s in map(world.parse, texts)]
    return [
        [
            j
            for j, other in enumerate(slots)
            if sum(a != b for a, b in zip(slot, other, strict=True)) == 1
        ]
        for slot in slots
    ]


def text_embeddings(
    pipe: StableDiffusion3Pipeline, ids: Tensor, zeros: int
) -> tuple[Tensor, Tensor]:
    """Tokens [B, TOKENS + zeros, WIDTH] and pooled [B, WIDTH],
    as the pipeline's `encode_prompt` has them.
    """
    first = pipe.text_encoder(ids, output_hidden_states=True)
    second = pipe.text_encoder_2(ids, output_hidden_states=True)
    tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    pooled = torch.cat([first.text_embeds, second.text_embeds], -1)
    return F.pad(tokens, (0, 0, 0, zeros)), pooled


def train_flow(
    pipe: StableDiffusion3Pipeline,
    texts: tuple[str, ...],
    latents: Tensor,
    clock: Clock,
    seed: int,
    schedule: Schedule,
    caption_noise: float,
    every: float = 0.0,
    checkpoint: Callable[[StableDiffusion3Pipeline, Clock], None] | None = None,
    batch: int = 64,
) -> None:
    """Flow matching: x_t = (1 - t) x_0 + t eps with logit-normal t, loss |v - (eps - x_0)|^2.

    `latents` holds `PER_CAPTION` pictures of each of the captions `texts` in turn. With probability
    `caption_noise` a picture gets another of these captions that differs in one word. The pipeline ends with the moving average of the weights; `checkpoint` sees that average
    every `every` CPU minutes.
    """
    encode_ids = {"padding": "max_length", "max_length": TOKENS, "return_tensors": "pt"}
    ids = pipe.tokenizer(list(texts), **encode_ids).input_ids
    empty = pipe.tokenizer([""], **encode_ids).input_ids
    near = one_word_off(texts)
    near_count = torch.tensor([len(others) for others in near])
    near_index = nn.utils.rnn.pad_sequence(
        [torch.tensor(others) for others in near], batch_first=True
    )

    draws = torch.Generator().manual_seed(seed)
    weights = [p for module in trained_modules(pipe) for p in module.parameters()]
    average = [p.detach().clone() for p in weights]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.99))
    next_checkpoint, mean_loss = 60 * every, 0.0
    set_training(pipe, True)
    while clock.progress < 1:
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(clock)
        long = clock.step % LONG_EVERY == LONG_EVERY - 1
        size = LONG_BATCH if long else batch
        rows = torch.randint(len(latents), (size,), generator=draws)
        names = rows // PER_CAPTION
        pick = (torch.rand(size, generator=draws) * near_count[names]).long()
        noisy = torch.rand(size, generator=draws) < caption_noise
        names = torch.where(noisy, near_index[names, pick], names)
        dropped = torch.rand(size, 1, generator=draws) < CAPTION_DROP
        tokens, pooled = text_embeddings(
            pipe, torch.where(dropped, empty, ids[names]), LONG_ZEROS if long else 1
        )
        t = torch.randn(size, generator=draws).sigmoid()
        x_0 = latents[rows]
        eps = torch.randn(x_0.shape, generator=draws)
        x_t = torch.lerp(x_0, eps, t[:, None, None, None])
        velocity = pipe.transformer(
            x_t,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=1000 * t,
            return_dict=False,
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
            say(f"flow step {clock.step}: loss {mean_loss:.4f}, {clock.spent:.0f} CPU s")
        if checkpoint and clock.spent >= next_checkpoint:
            next_checkpoint += 60 * every
            swap(weights, average)
            set_training(pipe, False)
            clock.pause(lambda: checkpoint(pipe, clock))
            set_training(pipe, True)
            swap(weights, average)
    swap(weights, average)
    set_training(pipe, False)


@torch.no_grad()
def swap(weights: list[nn.Parameter], average: list[Tensor]) -> None:
    """Exchange two sets of weights."""
    for weight, other in zip(weights, average, strict=True):
        kept = weight.clone()
        weight.copy_(other)
        other.copy_(kept)


@torch.no_grad()
def sample(
    pipe: StableDiffusion3Pipeline, texts: list[str], guidance: float, seed: int, steps: int = 8
) -> np.ndarray:
    """One picture a caption with `steps` real steps (t = 1, ..., 1/steps), uint8 [B, 32, 32, 3]."""
    draws, images = torch.Generator().manual_seed(seed), []
    for start in range(0, len(texts), 128):
        images.append(
            pipe(
                texts[start : start + 128],
                sigmas=np.linspace(1, 1 / steps, steps),
                num_inference_steps=steps,
                guidance_scale=guidance,
                max_sequence_length=1,
                height=world.SIZE,
                width=world.SIZE,
                generator=draws,
                output_type="np",
            ).images
        )
    return (np.concatenate(images) * 255).round().astype(np.uint8)


def report(pipe: StableDiffusion3Pipeline, parts: dict[str, list[str]], each: int = 2) -> str:
    """Strict / dense of each part at guidance 1 and 2, `each` pictures a caption."""
    cells = []
    for name, texts in parts.items():
        for guidance in (1.0, 2.0):
            strict, dense = world.scores(
                sample(pipe, texts * each, guidance, seed=1), texts * each
            ).mean(0)
            cells.append(f"{name} g{guidance:g} {strict:.3f}/{dense:.3f}")
    return "  ".join(cells)


def write(pipe: StableDiffusion3Pipeline, out: Path, captions: dict[str, tuple[str, ...]]) -> None:
    """Write the folder: safetensors and the captions of each part.

    Transformer and autoencoder are stored in fp16. The small text encoders stay in fp32:
    transformers loads weights in the precision they are stored in, diffusers in fp32, and the two
    must meet.
    """
    stored = copy.deepcopy(pipe)
    stored.transformer.half()
    stored.vae.half()
    stored.save_pretrained(out, safe_serialization=True)
    for file in out.rglob(
        "*.json"
    ):  # diffusers notes where a part was loaded from: a path of this machine
        kept = [
            line
            for line in file.read_text(encoding="utf-8").splitlines()
            if '"_name_or_path"' not in line
        ]
        file.write_text("\n".join(kept) + "\n", encoding="utf-8")
    for name, texts in captions.items():
        (out / f"captions_{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def load(folder: Path) -> StableDiffusion3Pipeline:
    """Load a written folder, in fp32."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add(
        "--resume",
        type=Path,
        help="only continue the last phase from this finished folder, for --minutes",
    )
    add("--vae", type=Path, help="take the autoencoder from this finished folder")
    add("--minutes-vae", type=float, default=4.0, help="CPU minutes for the autoencoder")
    add("--minutes", type=float, default=5.25, help="CPU minutes for transformer and text encoders")
    add(
        "--minutes-noisy",
        type=float,
        default=1.0,
        help="CPU minutes on top of them with noisy captions",
    )
    add("--steps-vae", type=int, help="optimiser steps, instead of --minutes-vae")
    add("--steps", type=int, help="optimiser steps, instead of --minutes")
    add("--steps-noisy", type=int, help="optimiser steps, instead of --minutes-noisy")
    add(
        "--caption-noise",
        type=float,
        default=CAPTION_NOISE,
        help="share of captions with one word wrong",
    )
    add("--checkpoints", type=Path, help="also write a folder every --every minutes under this one")
    add("--every", type=float, default=0.5, help="CPU minutes between checkpoints")
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
    images = pictures(args.seed)
    sizes = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    sizes = [f"{name} {sum(p.numel() for p in part.parameters())}" for name, part in sizes.items()]
    say(f"{len(images)} pictures; parameters: {', '.join(sizes)}")

    if args.vae:
        pipe.register_modules(vae=load(args.vae).vae)
    elif not args.resume:
        train_vae(pipe.vae, images, Clock(args.minutes_vae, args.steps_vae), args.seed)
    pipe.vae.requires_grad_(False)
    shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
    say(
        f"strict {ceiling(pipe.vae):.4f} on reconstructions (n 1024), shift {shift:.4f},"
        f" scale {scale:.4f}"
    )

    parts = {"pictured": list(world.split().pictured[::3]), "train": list(world.split().train)}

    def checkpoint(pipe: StableDiffusion3Pipeline, clock: Clock) -> None:
        say(f"flow step {clock.step}, {clock.spent:.0f} CPU s: {report(pipe, parts)}")
        write(pipe, args.checkpoints / f"{clock.step:05d}", world.split()._asdict())

    latents = (encode(pipe.vae, images) - shift) * scale
    see = checkpoint if args.checkpoints else None
    noisy = Schedule(lr=5e-4, warm_up=30, decay=0.5, ema=0.99), args.caption_noise, args.every, see
    clock = Clock(args.minutes, args.steps)
    if args.resume:
        train_flow(pipe, world.split().pictured, latents, clock, args.seed, *noisy)
    else:
        clean = Schedule(lr=1.5e-3, warm_up=100, decay=0.0, ema=0.998), 0.0, args.every, see
        train_flow(pipe, world.split().pictured, latents, clock, args.seed, *clean)
        say(
            f"after {clock.step} steps, {clock.spent:.0f} CPU s of right captions:"
            f" {report(pipe, parts)}"
        )
        clock = Clock(args.minutes_noisy, args.steps_noisy)
        train_flow(pipe, world.split().pictured, latents, clock, args.seed + 1, *noisy)
    say(f"after {clock.step} steps, {clock.spent:.0f} CPU s: {report(pipe, parts, each=4)}")
    write(pipe, args.out, world.split()._asdict())
    say("wrote", args.out.name)


if __name__ == "__main__":
    main()
