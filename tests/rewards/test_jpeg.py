"""JPEG rewards against Pillow: exact sizes, unit, sign, order, video and bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from genpolicy.contracts.reward import RewardError
from genpolicy.contracts.task import Context
from genpolicy.rewards.jpeg_compressibility import jpeg_compressibility
from genpolicy.rewards.jpeg_incompressibility import jpeg_incompressibility

CONTEXT = Context(prompts=("",) * 3)


@pytest.fixture
def pictures() -> torch.Tensor:
    """Flat, gradient and noise, float [3, 3, 40, 56]."""
    flat = torch.full((3, 40, 56), 0.5)
    gradient = torch.linspace(0, 1, 56).expand(3, 40, 56)
    noise = torch.rand((3, 40, 56), generator=torch.Generator().manual_seed(0))
    return torch.stack([flat, gradient, noise])


def file_bytes(picture: torch.Tensor, path, quality: int = 95) -> int:
    array = np.rint(picture.numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(array).save(path, quality=quality)
    return path.stat().st_size


def test_size_is_that_of_the_file_on_disk_in_decimal_kilobytes(pictures, tmp_path):
    path = tmp_path / "picture.jpg"
    size = jpeg_incompressibility(pictures, CONTEXT)
    expected = torch.tensor([file_bytes(picture, path) for picture in pictures]) / 1000
    assert size.dtype == torch.float32
    assert size.shape == (3,)
    assert torch.equal(size, expected)
    # the known-wrong variants: another quality, binary kilobytes
    other = torch.tensor([file_bytes(picture, path, quality=75) for picture in pictures]) / 1000
    assert not torch.isclose(size, other)[
        1:
    ].any()  # a flat picture has the same size at any quality
    assert not torch.isclose(size, expected * 1000 / 1024).any()


def test_flat_is_smaller_than_gradient_is_smaller_than_noise(pictures):
    flat, gradient, noise = jpeg_incompressibility(pictures, CONTEXT).tolist()
    assert flat < gradient < noise
    flat, gradient, noise = jpeg_compressibility(pictures, CONTEXT).tolist()
    assert flat > gradient > noise


def test_the_two_rewards_are_each_other_with_the_sign_turned(pictures):
    assert torch.equal(
        jpeg_compressibility(pictures, CONTEXT), -jpeg_incompressibility(pictures, CONTEXT)
    )


def test_a_video_scores_the_mean_of_its_frames(pictures):
    video = torch.stack([pictures, pictures.flip(0)], dim=1)  # [B, F, 3, H, W]
    each = jpeg_incompressibility(pictures, CONTEXT)
    mean = (each + each.flip(0)) / 2
    torch.testing.assert_close(jpeg_incompressibility(video, CONTEXT), mean, rtol=1e-6, atol=0)


def test_values_outside_the_range_are_clipped_not_wrapped(pictures):
    far = (pictures - 0.5) * 10 + 0.5
    assert torch.equal(
        jpeg_incompressibility(far, CONTEXT), jpeg_incompressibility(far.clamp(0, 1), CONTEXT)
    )


def test_half_precision_is_widened_before_rounding(pictures):
    half = pictures.bfloat16()
    assert torch.equal(
        jpeg_incompressibility(half, CONTEXT), jpeg_incompressibility(half.float(), CONTEXT)
    )


def test_no_gradient_and_no_complaint_about_one(pictures):
    assert not jpeg_incompressibility(pictures.requires_grad_(), CONTEXT).requires_grad


def test_bad_input_is_one_sentence(pictures):
    with pytest.raises(ValueError, match=r"not \[3, 40, 56, 3\]"):
        jpeg_incompressibility(pictures.permute(0, 2, 3, 1), CONTEXT)
    pictures[0, 0, 0, 0] = float("nan")  # as a picture this would be one black pixel
    with pytest.raises(RewardError, match="NaN"):
        jpeg_compressibility(pictures, CONTEXT)
