"""CLIPScore on a tiny open_clip model that is saved to disk and loaded as a user would load it."""

import json
import sys
from dataclasses import asdict

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import leaf, make
from genpolicy.config.origin import PERSON
from genpolicy.contracts.task import Context
from genpolicy.rewards.clip_score import ClipScore, mean_cosine

torch.set_num_threads(1)

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ("a red circle", "a blue square left of a green triangle", "nothing")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """Register the architecture "genpolicy-tiny" with open_clip and save random weights of it."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "genpolicy-tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "genpolicy-tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("genpolicy-tiny")
    torch.save(model.state_dict(), folder / "weights.pt")
    return str(folder / "weights.pt")


@pytest.fixture(scope="module")
def scorer(checkpoint) -> ClipScore:
    return ClipScore(model="genpolicy-tiny", pretrained=checkpoint)


@pytest.fixture(scope="module")
def library(checkpoint):
    """The same weights through open_clip alone: (model, PIL transform, tokenizer)."""
    model, transform = open_clip.create_model_from_pretrained(
        "genpolicy-tiny", pretrained=checkpoint
    )
    return model.eval(), transform, open_clip.get_tokenizer("genpolicy-tiny")


def picture(kind: str, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Float [1, 3, height, width] at 8-bit levels: white noise, smooth, or saturated edges."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        values = torch.rand((1, 3, height, width), generator=generator)
    else:
        values = torch.rand((1, 3, -(-height // 8), -(-width // 8)), generator=generator)
        mode = {"smooth": "bicubic", "edges": "nearest"}[kind]
        values = values if kind == "smooth" else (values > 0.5).float()
        values = torch.nn.functional.interpolate(values, (height, width), mode=mode).clamp(0, 1)
    return (values * 255).round() / 255


def pil(tensor: torch.Tensor) -> Image.Image:
    return Image.fromarray(np.rint(tensor[0].numpy() * 255).astype(np.uint8).transpose(1, 2, 0))


def pictures(count: int, size: int = 32) -> torch.Tensor:
    return torch.cat([picture("noise", size, size, seed) for seed in range(count)])


def score(scorer, outputs, prompts=PROMPTS):
    return scorer(outputs, Context(prompts=prompts))


def by_hand(library, images, prompts=PROMPTS, normalised=True):
    """cos of open_clip's own embeddings behind its own PIL transform, in float64."""
    model, transform, tokenize = library
    with torch.no_grad():
        image = model.encode_image(torch.stack([transform(pil(x[None])) for x in images])).double()
        text = model.encode_text(tokenize(list(prompts))).double()
    dot = (image * text).sum(-1)
    return dot / image.norm(dim=-1) / text.norm(dim=-1) if normalised else dot


def test_equals_the_cosine_by_hand(scorer, library):
    images = pictures(3)
    result, truth = score(scorer, images), by_hand(library, images)
    assert result.shape == (3,)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=2e-6)
    assert not torch.isclose(
        result.double(), by_hand(library, images, normalised=False), atol=1e-3
    ).any()


def test_a_wrong_prompt_gives_another_score(scorer):
    images = pictures(3)
    assert (
        (score(scorer, images) - score(scorer, images, PROMPTS[1:] + PROMPTS[:1])).abs() > 1e-3
    ).all()


def test_scale_multiplies_the_cosine(scorer, checkpoint):
    images = pictures(3)
    scaled = ClipScore(model="genpolicy-tiny", pretrained=checkpoint, scale=2.5)
    torch.testing.assert_close(score(scaled, images), 2.5 * score(scorer, images))


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (48, 107), (96, 96), (16, 24)])
@pytest.mark.parametrize("kind", ["noise", "smooth", "edges"])
def test_preprocessing_equals_the_pil_transform(scorer, library, kind, size):
    """Within 1.25 of 255 levels (PIL rounds to 8 bits twice), exactly where nothing is resized."""
    image = picture(kind, *size)
    levels = 255 * torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    truth = library[1](pil(image))
    error = ((scorer.preprocess(image)[0] - truth) * levels).abs().max()
    assert error < (1e-3 if size == (32, 32) else 1.25)


def test_one_tensor_resize_would_miss_the_pil_transform(scorer, library):
    """The known-wrong variant: open_clip's own transform handed a float tensor,
    which is never clipped.
    """
    image = picture("edges", 96, 96)
    levels = 255 * torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    assert ((library[1](image)[0] - library[1](pil(image))) * levels).abs().max() > 5


@pytest.mark.parametrize("fit", ["shortest", "squash"])
def test_size_mean_std_and_fit_come_from_the_checkpoint(tmp_path, fit):
    """A folder that says how its pictures were normalised, as SigLIP's do, through "local-dir:"."""
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bilinear",
        "resize_mode": fit,
    }
    config = {"model_cfg": TINY, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(open_clip.CLIP(**TINY).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    name = f"local-dir:{tmp_path}"
    _, transform = open_clip.create_model_from_pretrained(name)
    image = picture("smooth", 48, 80)
    error = (ClipScore(model=name).preprocess(image)[0] - transform(pil(image))).abs().max()
    assert error * 0.25 * 255 < 1.25


@pytest.mark.parametrize("asks", [{"tokenizer_kwargs": {"trust_remote_code": True}}, {}])
def test_code_beside_a_tokenizer_is_not_run(tmp_path, monkeypatch, asks):
    """Neither because the checkpoint says so, nor because somebody answers yes to transformers' question."""
    mark = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import PreTrainedTokenizer\nclass Evil(PreTrainedTokenizer):\n    pass\n"
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["own.Evil", None]}})
    )
    text = {**TINY["text_cfg"], "hf_tokenizer_name": "own", **asks}
    config = {"model_cfg": {**TINY, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(open_clip.CLIP(**TINY).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(OSError, match="clip_score cannot load"):
        ClipScore(model=f"local-dir:{tmp_path}").load()
    assert not mark.exists()


def test_a_row_does_not_depend_on_its_batch(scorer, checkpoint):
    images = pictures(3, size=48)
    whole = score(scorer, images)
    alone = [score(scorer, images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=0, atol=1e-6)
    split = ClipScore(model="genpolicy-tiny", pretrained=checkpoint, micro_batch=2)
    torch.testing.assert_close(whole, score(split, images), rtol=0, atol=1e-6)
    shared = score(scorer, images, PROMPTS[:1] * 3)  # encoded once, used three times
    torch.testing.assert_close(shared[0], whole[0], rtol=0, atol=1e-6)
    assert shared.unique().numel() == 3


def test_a_video_scores_the_mean_of_its_frames(scorer):
    images = pictures(6).view(3, 2, 3, 32, 32)
    mean = (score(scorer, images[:, 0]) + score(scorer, images[:, 1])) / 2
    torch.testing.assert_close(score(scorer, images), mean, rtol=0, atol=1e-6)


def test_gradient_flows_to_the_pictures_and_only_there(scorer):
    images = pictures(3, size=48).requires_grad_()
    score(scorer, images).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(weight.grad is None for weight in scorer._clip.parameters())
    # along the gradient, the change of the score is the one that the gradient says
    direction = images.grad / images.grad.norm()
    step = 1e-2
    with torch.no_grad():
        change = (
            score(scorer, images + step * direction) - score(scorer, images - step * direction)
        ).sum()
    torch.testing.assert_close(change / (2 * step), images.grad.norm(), rtol=0.02, atol=0)


def test_fp32_under_autocast_and_from_half_precision(scorer):
    images = pictures(3).bfloat16()
    plain = score(scorer, images.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(scorer, images), plain)


def test_loads_once_at_the_first_call_and_moves(checkpoint):
    scorer = ClipScore(model="genpolicy-tiny", pretrained=checkpoint)
    assert asdict(scorer) == asdict(ClipScore("genpolicy-tiny", checkpoint))
    assert scorer._clip is None
    assert scorer.to("cpu") is scorer
    assert scorer._clip is None
    score(scorer, pictures(3))
    weights = scorer._clip
    scorer.load()
    assert scorer._clip is weights
    assert next(scorer.to("meta")._clip.parameters()).device.type == "meta"


def test_the_activation_is_the_tags(checkpoint, monkeypatch):
    """OpenAI's tags need QuickGELU under plain architecture names; open_clip alone only warns."""
    tag = {"url": "", "hf_hub": "", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "genpolicy-tiny", {"quick": tag})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: checkpoint)
    quick = ClipScore(model="genpolicy-tiny", pretrained="quick")
    quick.load()
    names = {type(module).__name__ for module in quick._clip.modules()}
    assert "QuickGELU" in names
    assert "GELU" not in names


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(
        ConfigError, match=r"^clip_score needs open_clip: pip install genpolicy\[rewards\]$"
    ):
        ClipScore().load()


def test_weights_that_cannot_be_fetched_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"^clip_score needs laion/.* cannot be fetched") as raised:
        ClipScore().load()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "ViT-B/32"}, r"model is 'ViT-B/32'; did you mean .*ViT-B-32"),
        (
            {"pretrained": "laion2b"},
            r"pretrained \(a tag or a file\) is 'laion2b'; did you mean laion2b_",
        ),
    ],
)
def test_wrong_names_bring_the_nearest(settings, message):
    with pytest.raises(ConfigError, match=message):
        ClipScore(**settings).load()


def test_is_found_by_its_file_name_and_takes_its_settings_from_yaml():
    assert leaf("rewards", "clip_score", PERSON) is ClipScore
    assert make("rewards", {"name": "clip_score", "scale": 2.5}, PERSON) == ClipScore(scale=2.5)
    with pytest.raises(ConfigError, match="micro_batch is 0"):
        make("rewards", {"name": "clip_score", "micro_batch": 0}, PERSON)


def test_a_checkpoint_of_another_model_is_refused(checkpoint):
    with pytest.raises(OSError, match="clip_score cannot load ViT-S-32-alt from"):
        ClipScore(model="ViT-S-32-alt", pretrained=checkpoint).load()


def test_wrong_shapes_are_one_sentence(scorer):
    with pytest.raises(ValueError, match="3 pictures but 2 prompts"):
        score(scorer, pictures(3), PROMPTS[:2])
    with pytest.raises(ValueError, match=r"not \[3, 32, 32, 3\]"):
        score(scorer, pictures(3).permute(0, 2, 3, 1))


def test_mean_cosine_of_known_vectors():
    """Two pictures whose "embeddings" are their mean colours: cosines 1 and sqrt(1/2)."""
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0], images[1, :2] = 0.3, 0.7
    result = mean_cosine(
        images,
        ("x", "x"),
        lambda x: x.mean((2, 3)),
        lambda texts: torch.tensor([[2.0, 0, 0]]),
        "cpu",
        8,
    )
    torch.testing.assert_close(result, torch.tensor([1.0, 0.5**0.5]))
