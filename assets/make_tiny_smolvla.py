"""A tiny SmolVLA of LeRobot's own class (stub: grows into the script that clones it)."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

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
    """Each of `WORDS` is one token, everything else is bytes. Hand-written: training one is not deterministic."""
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "Ġ"  # what byte-level tokenizers write for a space
        for letter in word:
            if (left, letter) not in merges:
                merges.append((left, letter))
                vocabulary.append(left + letter)
            left += letter
    spelling = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=merges))
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


def write_vlm(folder: Path, *, image: int, patch: int, width: int, layers: int, vision_layers: int = 1) -> None:
    """The configuration, tokenizer and processor that SmolVLA builds its VLM from: a folder without weights."""
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
            "initializer_range": width**-0.5,  # the usual .02 is for wide networks: small ones stay silent for long
        },
    )
    size = {"longest_edge": image}
    images = SmolVLMImageProcessor(do_resize=True, size=size, max_image_size=size)
    videos = SmolVLMVideoProcessor(size=size, max_image_size=size)
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    SmolVLMProcessor(images, words, videos, image_seq_len=(image // patch // 2) ** 2).save_pretrained(folder)
