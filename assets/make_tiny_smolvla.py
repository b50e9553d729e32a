"""Clone a tiny SmolVLA on one CPU thread and write it as a LeRobot folder.

    python assets/make_tiny_smolvla.py --out assets/point-smolvla

A `SmolVLAPolicy` of LeRobot's own class with some 180 thousand parameters learns, from
demonstrations of the task `point_instructions`, to go to the goal that the instruction names. A
share of the demonstrations goes to another goal instead, as careless ones do: the clone can reach
every goal and follows its instruction about as often as its teachers did. Which goal is right, a
reward can tell it.

The folder holds everything: weights, processors with their statistics, and in vlm/ the
configuration, tokenizer and processor that SmolVLA builds its vision-language model from, under
that relative name.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from genpolicy.chain import DDIM, Chain
from genpolicy.contracts.task import Context
from genpolicy.evaluation.episode_scores import evaluate_control
from genpolicy.models.lerobot_flow import LeRobotFlow
from genpolicy.policy.policy import ChainPolicy
from genpolicy.tasks.point_instructions import CAMERA, PIXELS, STATE, PointInstructions

CHUNK = 4  # actions of a chunk, all of them executed
SEEDS = 2**40  # demonstrations begin from reset seeds from here on: a run's own have 31 bits
STEPS = 5  # of the sampler

WORDS = ("go", "to", "the", "red", "green", "blue", "yellow", "circle", "square", "triangle")
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Each of `WORDS` is one token, everything else is bytes. Hand-written:
    training one is not deterministic.
    """
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "Ġ"  # what byte-level tokenizers write for a space
        for letter in word:
            if (left, letter) not in merges:
                merges.append((left, letter))
                vocabulary.append(left + letter)
            left += letter
    spelling = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=merges)
    )
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    spelling.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=spelling,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
    )


def write_vlm(
    folder: Path, *, image: int, patch: int, width: int, layers: int, vision_layers: int = 1
) -> None:
    """The configuration, tokenizer and processor that SmolVLA builds its VLM from:
    a folder without weights.
    """
    words = tokenizer()
    config = SmolVLMConfig(
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
        vision_config={
            "model_type": "smolvlm_vision",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 2,
            "image_size": image,
            "patch_size": patch,
            "initializer_range": width**-0.5,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": width // 4,
            "vocab_size": len(words),
            "max_position_embeddings": 256,
            "pad_token_id": words.pad_token_id,
            "initializer_range": width
            ** -0.5,  # the usual .02 is for wide networks: small ones stay silent for long
        },
    )
    size = {"longest_edge": image}
    images = SmolVLMImageProcessor(do_resize=True, size=size, max_image_size=size)
    videos = SmolVLMVideoProcessor(size=size, max_image_size=size)
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    SmolVLMProcessor(
        images, words, videos, image_seq_len=(image // patch // 2) ** 2
    ).save_pretrained(folder)


@dataclass
class Demonstrations:
    """Frames of all episodes, one after the other: state [F,2], picture bytes [F,3,P,P], action
    [F,2], instruction, and where each frame's episode ends.
    """

    state: Tensor
    picture: Tensor
    action: Tensor
    asked: Sequence[str]
    end: Tensor

    @classmethod
    def record(
        cls, task: PointInstructions, episodes: int, noise: float, seed: int
    ) -> Demonstrations:
        """The task's expert from the seeds ``seed``, ``seed`` + 1, ..."""
        shown = [task.demonstrate(seed + e, noise) for e in range(episodes)]
        lengths = torch.tensor([len(d.actions) for d in shown])
        return cls(
            torch.cat([d.observation[STATE] for d in shown]),
            torch.cat([(d.observation[CAMERA] * 255).round().byte() for d in shown]),
            torch.cat([d.actions for d in shown]),
            [task.asked(seed + e) for e, d in enumerate(shown) for _ in d.actions],
            lengths.cumsum(0).repeat_interleave(lengths),
        )

    def rows(self, index: Tensor) -> tuple[Context, Tensor, Tensor]:
        """The context seen at the frames ``index`` [B], the actions that follow [B,CHUNK,2], and a
        mask of those past the episode's end.
        """
        ahead = index[:, None] + torch.arange(CHUNK)
        last = self.end[index][:, None] - 1
        observation = {
            STATE: self.state[index][:, None],
            CAMERA: self.picture[index][:, None] / 255,
        }
        context = Context([self.asked[i] for i in index.tolist()], observation)
        return context, self.action[ahead.minimum(last)], ahead > last


def write_policy(folder: Path, data: Demonstrations, args: argparse.Namespace) -> None:
    """A SmolVLA with random weights and the demonstrations' statistics, as LeRobot saves one."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.processor import TokenizerProcessorStep

    write_vlm(folder / "vlm", image=PIXELS, patch=args.patch, width=args.width, layers=args.layers)
    picture, state = (
        PolicyFeature(FeatureType.VISUAL, (3, PIXELS, PIXELS)),
        PolicyFeature(FeatureType.STATE, (2,)),
    )
    config = SmolVLAConfig(
        input_features={CAMERA: picture, STATE: state},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        vlm_model_name=str(folder / "vlm"),
        num_vlm_layers=args.layers,
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_state_dim=4,
        max_action_dim=4,
        resize_imgs_with_padding=(PIXELS, PIXELS),
        tokenizer_max_length=16,
        num_steps=STEPS,
        push_to_hub=False,
        device="cpu",
    )
    moments = {STATE: data.state, "action": data.action}
    stats = {name: {"mean": value.mean(0), "std": value.std(0)} for name, value in moments.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        policy = SmolVLAPolicy(config)
        processors = make_pre_post_processors(config, dataset_stats=stats)
    config.vlm_model_name = "vlm"
    for step in processors[0].steps:
        if isinstance(step, TokenizerProcessorStep):
            step.tokenizer_name = "vlm"
    policy.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)


def clone(policy: ChainPolicy, data: Demonstrations, args: argparse.Namespace) -> None:
    """Behaviour cloning with AdamW, a cosine and averaged weights."""
    model: LeRobotFlow = policy.model  # type: ignore[assignment]
    parameters = list(model.trainable().values())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-4)
    generator = torch.Generator().manual_seed(args.seed)
    recent: list[float] = []
    for step in range(args.steps):
        index = torch.randint(len(data.state), (args.batch,), generator=generator)
        context, actions, pad = data.rows(index)
        event = model.event(actions)
        t = model.times(torch.rand(args.batch, generator=generator, dtype=torch.float64))
        noise = torch.randn(event.shape, generator=generator)
        loss = policy.supervised_loss(
            model.encode(context), event, t, noise, model.event_mask(pad)
        ).mean()
        for group in optimizer.param_groups:
            group["lr"] = (
                args.lr
                * min(1.0, (step + 1) / 50)
                * (0.01 + 0.99 * np.cos(np.pi / 2 * step / args.steps) ** 2)
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(args.ema, (1 + step) / (10 + step)))
        recent.append(loss.item())
        if (step + 1) % args.every == 0:
            say(f"step {step + 1}: loss {np.mean(recent):.3f}")
            recent.clear()
    for parameter, average in zip(parameters, averages, strict=True):
        parameter.data = average


def examine(policy: ChainPolicy, episodes: int) -> str:
    """Success with the ODE, on the reset seeds 0, 1, ..."""
    world = PointInstructions().environments(100, 1)
    found = evaluate_control(policy, world, episodes=episodes, seed=0).metrics()
    return f"success {found['success_rate']:.3f}"


def say(text: str) -> None:
    """One line of progress, stamped with CPU seconds."""
    print(f"{time.process_time():6.0f} s  {text}", flush=True)


def main() -> None:
    """Record, build, clone, save, examine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--episodes", type=int, default=800, help="demonstrations")
    add(
        "--mistaken",
        type=float,
        default=0.45,
        help="share of them that go to another goal than they are asked for",
    )
    add("--noise", type=float, default=0.3, help="std on their actions")
    add("--steps", type=int, default=500, help="optimiser steps")
    add("--batch", type=int, default=128, help="frames of a step")
    add("--lr", type=float, default=2e-3, help="learning rate at its peak")
    add("--ema", type=float, default=0.99, help="decay of the averaged weights, a step")
    add("--width", type=int, default=48, help="of the vision-language model")
    add("--layers", type=int, default=2, help="of its language part, and of the action expert")
    add("--patch", type=int, default=8, help="pixels of a patch's side")
    add("--every", type=int, default=250, help="steps between lines")
    add("--examine", type=int, default=400, help="episodes of an examination")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already: choose another folder, or delete it")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    data = Demonstrations.record(
        PointInstructions(mistaken=args.mistaken), args.episodes, args.noise, SEEDS
    )
    say(f"{args.episodes} demonstrations, {len(data.state)} frames")
    with tempfile.TemporaryDirectory() as staged:
        write_policy(Path(staged), data, args)
        model = LeRobotFlow(staged, train="full", device="cpu")
        say(f"{sum(p.numel() for p in model.policy.parameters())} parameters")
        policy = ChainPolicy(model, Chain(model.schedule, model.grid(STEPS), DDIM(0.0)))
        clone(policy, data, args)
        model.save(args.out)
    say(examine(policy, args.examine))


if __name__ == "__main__":
    main()
