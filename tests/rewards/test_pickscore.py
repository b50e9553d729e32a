"""PickScore on a tiny CLIPModel and CLIPProcessor,
saved to disk and loaded as a user would load them.
"""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf
from genpolicy.config.origin import PERSON
from genpolicy.contracts.task import Context
from genpolicy.rewards.pickscore import PickScore

torch.set_num_threads(1)

PROMPTS = ("a red cat", "a dog and a cat", "red")
WORDS = ("a", "red", "cat", "dog", "and")


@pytest.fixture(scope="module", params=["first end token", "largest id, as PickScore_v1"])
def folder(request, tmp_path_factory) -> str:
    """Random weights and a processor in one folder; both of transformers' ways to find the end of a
    text.

    PickScore_v1's config says eos_token_id 2, which means: the token with the largest id.
    """
    vocab = {}
    for letter in sorted(set("".join(WORDS))):
        vocab |= {letter: len(vocab)}
        vocab |= {f"{letter}</w>": len(vocab)}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[])
    end = 2 if request.param.startswith("largest") else tokenizer.eos_token_id
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(vocab),
            "max_position_embeddings": 16,
            "eos_token_id": end,
        },
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for (
        weight
    ) in model.parameters():  # the default init is so small that all texts would nearly coincide
        weight.data += 0.1 * torch.randn_like(weight)
    model.logit_scale.data.fill_(4.5)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.4] * 3
    )
    path = tmp_path_factory.mktemp("pickscore")
    model.save_pretrained(path)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def scorer(folder) -> PickScore:
    return PickScore(model=folder, processor=folder)


def pictures(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """White noise at 8-bit levels, float [count, 3, height, width]."""
    levels = torch.randint(
        256, (count, 3, height, width), generator=torch.Generator().manual_seed(0)
    )
    return levels / 255


def pils(images: torch.Tensor) -> list[Image.Image]:
    arrays = np.rint(images.numpy() * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(array) for array in arrays]


def library(folder, images, prompts=PROMPTS):
    """(model, its inputs) through transformers alone, from PIL pictures."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    return model, processor(
        text=list(prompts), images=pils(images), padding=True, return_tensors="pt"
    )


def score(scorer, outputs, prompts=PROMPTS):
    return scorer(outputs, Context(prompts=prompts))


def test_equals_the_models_own_logits(scorer, folder):
    images = pictures(3)
    model, inputs = library(folder, images)
    with torch.no_grad():
        truth = model(**inputs).logits_per_image.diagonal()
        image = model.get_image_features(inputs["pixel_values"]).pooler_output
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    result = score(scorer, images)
    assert result.shape == (3,)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, truth, rtol=0, atol=1e-4)  # of about 90
    # the known-wrong variants: embeddings of any length, no temperature
    assert not torch.isclose(
        result, model.logit_scale.exp() * (image * text).sum(-1), rtol=1e-2
    ).any()
    assert not torch.isclose(result, torch.cosine_similarity(image, text), rtol=1e-2).any()


def test_a_wrong_prompt_gives_another_score(scorer):
    images = pictures(3)
    assert (
        (score(scorer, images) - score(scorer, images, PROMPTS[1:] + PROMPTS[:1])).abs() > 1e-2
    ).all()


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (48, 107), (96, 96)])
def test_preprocessing_equals_the_processor(scorer, folder, backend, size):
    """Within 1.25 of 255 levels (they round to 8 bits twice), exactly where nothing is resized."""
    images = pictures(2, *size)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend=backend)
    truth = processor(images=pils(images), return_tensors="pt")["pixel_values"]
    levels = 255 * torch.tensor(processor.image_std)[:, None, None]
    error = ((scorer.preprocess(images) - truth) * levels).abs().max()
    assert error < (1e-3 if size == (32, 32) else 1.25)


def test_a_row_does_not_depend_on_its_batch(scorer, folder):
    images = pictures(3, 48, 48)
    whole = score(scorer, images)  # its texts are padded to the longest
    alone = [score(scorer, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=0, atol=1e-4)
    split = PickScore(model=folder, processor=folder, micro_batch=2)
    torch.testing.assert_close(whole, score(split, images), rtol=0, atol=1e-4)


def test_a_video_scores_the_mean_of_its_frames(scorer):
    images = pictures(6).view(3, 2, 3, 32, 32)
    mean = (score(scorer, images[:, 0]) + score(scorer, images[:, 1])) / 2
    torch.testing.assert_close(score(scorer, images), mean, rtol=0, atol=1e-4)


def test_gradient_flows_to_the_pictures_and_only_there(scorer):
    images = pictures(3, 48, 48).requires_grad_()
    score(scorer, images).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(weight.grad is None for weight in scorer._clip.parameters())


def test_long_prompts_are_cut_at_the_models_context(scorer):
    long = "a red dog and a cat " * 20
    assert score(scorer, pictures(1), (long,)).isfinite().all()


def test_loads_in_fp32_at_the_first_call_and_moves(folder, tmp_path):
    transformers.CLIPModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    scorer = PickScore(model=str(tmp_path), processor=folder)
    assert scorer._clip is None
    assert scorer.to("cpu") is scorer
    assert scorer._clip is None
    score(scorer, pictures(3))
    weights = scorer._clip
    scorer.load()
    assert scorer._clip is weights
    assert weights.dtype == torch.float32
    assert scorer.to("meta")._clip.device.type == "meta"


def test_missing_weights_are_refused_not_random(folder, tmp_path):
    model = transformers.CLIPModel.from_pretrained(folder)
    weights = {
        name: w for name, w in model.state_dict().items() if name != "visual_projection.weight"
    }
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ConfigError, match=r"lacks 1 weights, such as visual_projection\.weight"):
        PickScore(model=str(tmp_path), processor=folder).load()


def test_is_found_by_its_file_name():
    assert leaf("rewards", "pickscore", PERSON) is PickScore


def test_weights_that_cannot_be_fetched_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for scorer in (
        PickScore(),
        PickScore(processor=str(tmp_path / "laion/CLIP-ViT-H-14")),
    ):  # a missing folder
        with pytest.raises(
            OSError, match=r"^pickscore needs .*/CLIP-ViT-H-14.* cannot be fetched"
        ) as raised:
            scorer.load()
        assert "\n" not in str(raised.value)


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(OSError, match=r"^pickscore cannot load") as raised:
        PickScore(model=str(tmp_path), processor=str(tmp_path)).load()
    assert "\n" not in str(raised.value)


def test_wrong_shapes_are_one_sentence(scorer):
    with pytest.raises(ValueError, match="3 pictures but 2 prompts"):
        score(scorer, pictures(3), PROMPTS[:2])
