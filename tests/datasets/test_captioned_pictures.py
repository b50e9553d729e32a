"""Captioned pictures: read in order, cut around the middle,
and bad input is told with its place.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genpolicy.contracts.dataset import Pictures
from genpolicy.datasets.captioned_pictures import METADATA, CaptionedPictures

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def entry(name: str, caption: str) -> str:
    return json.dumps({"file_name": name, "text": caption})


def folder_of(folder: Path, lines: list[str]) -> Path:
    """A folder with a picture of each colour, 8 x 8, and these lines of metadata."""
    for colour, value in COLOURS.items():
        Image.new("RGB", (8, 8), value).save(folder / f"{colour}.png")
    (folder / METADATA).write_text("\n".join(lines), encoding="utf-8")
    return folder


def read(folder: Path, height: int = 8, width: int = 8) -> CaptionedPictures:
    return CaptionedPictures(str(folder), height, width)


def save(folder: Path, name: str, pixels: np.ndarray) -> None:
    Image.fromarray(pixels.astype(np.uint8)).save(folder / name)


def test_rows_come_in_the_order_that_was_asked_for(tmp_path):
    lines = [entry(f"{colour}.png", f"a {colour} one") for colour in COLOURS]
    data = read(folder_of(tmp_path, [lines[0], "", *lines[1:]]))  # an empty line is no picture
    assert isinstance(data, Pictures)
    assert len(data) == 3
    context, pictures = data.pictures(torch.tensor([2, 0, 2]))
    assert list(context.prompts) == ["a blue one", "a red one", "a blue one"]
    assert pictures.shape == (3, 3, 8, 8)
    assert pictures.dtype == torch.float32
    assert torch.equal(pictures[0], torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand(3, 8, 8))
    assert torch.equal(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], pictures[1])  # control
    assert data.pictures(torch.tensor([], dtype=torch.long))[1].shape == (0, 3, 8, 8)


def test_a_caption_may_contain_separators_of_lines(tmp_path):
    caption = "a red\u2028one\u0085here"
    line = json.dumps({"file_name": "red.png", "text": caption}, ensure_ascii=False)
    data = read(folder_of(tmp_path, [line + "\r", entry("blue.png", "a blue one"), ""]))
    assert list(data.captions) == [caption, "a blue one"]


def test_values_are_those_of_the_file_over_255(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    save(tmp_path, "noise.png", pixels)
    (tmp_path / METADATA).write_text(entry("noise.png", "noise"))
    _, (picture,) = read(tmp_path).pictures(torch.tensor([0]))
    assert torch.equal((picture * 255).round().byte(), torch.tensor(pixels).byte().movedim(-1, 0))
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_grey_pictures_and_those_with_alpha_become_red_green_and_blue(tmp_path):
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "alpha.png")
    lines = [entry("grey.png", "grey"), entry("alpha.png", "red")]
    (tmp_path / METADATA).write_text("\n".join(lines))
    _, (grey, red) = read(tmp_path).pictures(torch.tensor([0, 1]))
    assert torch.allclose(grey, torch.full((3, 8, 8), 0.2))
    assert torch.equal(red[:, 0, 0], torch.tensor([1.0, 0, 0]))


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_of_grey_are_read_by_their_upper_eight(tmp_path, kind):
    """...upright; cut off at 255, as the library does it, nearly all would be white."""
    deep = np.random.default_rng(0).integers(0, 65536, (8, 12)).astype(np.uint16)
    turned = Image.Exif()
    turned[0x112] = 6
    Image.fromarray(deep).save(tmp_path / f"deep.{kind}", exif=turned)
    (tmp_path / METADATA).write_text(entry(f"deep.{kind}", "grey"))
    _, (picture,) = read(tmp_path, 12, 8).pictures(torch.tensor([0]))
    upright = np.ascontiguousarray(np.rot90(deep >> 8, -1).astype(np.uint8))
    assert torch.equal((picture * 255).round().byte(), torch.from_numpy(upright).expand(3, 12, 8))


def test_numbers_of_no_known_range_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 300.0, np.float32)).save(tmp_path / "float.tif")
    (tmp_path / METADATA).write_text(entry("float.tif", "grey"))
    with pytest.raises(ValueError, match=r"float\.tif is no picture .* no known range \(mode F\)"):
        read(tmp_path).pictures(torch.tensor([0]))


@pytest.mark.parametrize(("tag", "raised"), [(0, "struct.error"), (26, "TypeError")])
@pytest.mark.filterwarnings("ignore")  # the library's own, of the camera's tags
def test_whatever_a_decoder_stumbles_over_is_one_sentence(tmp_path, tag, raised):
    """A wrong byte in what the camera wrote, at which the library raises neither of its own."""
    tags = Image.Exif()
    tags[0x10F], tags[0x112] = "x" * 40, 6
    save(tmp_path, "noise.jpg", np.random.default_rng(0).integers(0, 256, (24, 24, 3)))
    with Image.open(tmp_path / "noise.jpg") as picture:
        picture.save(tmp_path / "camera.jpg", exif=tags)
    whole = (tmp_path / "camera.jpg").read_bytes()
    place = whole.index(b"Exif") + 17  # of the first tag's number, its second byte
    (tmp_path / "camera.jpg").write_bytes(whole[:place] + bytes([tag]) + whole[place + 1 :])
    (tmp_path / METADATA).write_text(entry("camera.jpg", "noise"))
    with pytest.raises(ValueError, match=r"camera\.jpg is no picture that can be read: "):
        read(tmp_path).pictures(torch.tensor([0]))
    (tmp_path / "camera.jpg").write_bytes(whole)  # control
    assert len(read(tmp_path).pictures(torch.tensor([0]))[1]) == 1


@pytest.mark.parametrize("upright", [False, True])
def test_a_picture_of_another_shape_is_cut_around_its_middle(tmp_path, upright):
    """The middle one of three bands of colour, side by side or one above the other, is kept."""
    wide = np.concatenate([np.full((8, 8, 3), COLOURS[c]) for c in COLOURS], 1)
    save(tmp_path, "bands.png", wide.swapaxes(0, 1) if upright else wide)
    (tmp_path / METADATA).write_text(entry("bands.png", "bands"))
    _, (picture,) = read(tmp_path).pictures(torch.tensor([0]))
    assert torch.equal(picture, torch.tensor([0.0, 1, 0]).view(3, 1, 1).expand(3, 8, 8))
    height, width = (24, 8) if upright else (8, 24)  # control: the whole shape keeps all of them
    _, (whole,) = read(tmp_path, height, width).pictures(torch.tensor([0]))
    assert whole.flatten(1).amax(1).tolist() == [1.0, 1.0, 1.0]


def test_a_smaller_picture_is_scaled_to_cover_the_whole(tmp_path):
    Image.new("RGB", (4, 2), COLOURS["red"]).save(tmp_path / "small.png")
    (tmp_path / METADATA).write_text(entry("small.png", "red"))
    _, (picture,) = read(tmp_path, 16, 8).pictures(torch.tensor([0]))
    assert torch.equal(picture, torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 16, 8))


# -- bad input ------------------------------------------------------------------------------------


def test_a_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(tmp_path))} .*no {METADATA}"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"file_name": "red.png", "text"', "a JSON object with file_name and text"),
        ('["red.png", "red"]', "a JSON object with file_name and text"),
        ('"red.png"', "a JSON object with file_name and text"),
        ('{"file_name": "red.png"}', "a JSON object with file_name and text"),
        ('{"text": "red"}', "a JSON object with file_name and text"),
        ('{"file_name": "red.png", "text": 3}', "file_name and text must be text"),
        ('{"file_name": null, "text": "red"}', "file_name and text must be text"),
        (entry("missing.png", "red"), "there is no file missing.png"),
        (entry("../outside.png", "red"), "there is no file ../outside.png"),
        (entry("link.png", "red"), "there is no file link.png"),
        (entry(".", "red"), "there is no file ."),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, told):
    inside = tmp_path / "inside"
    inside.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    folder_of(inside, [entry("red.png", "red"), "", line])
    with pytest.raises(ValueError, match=rf"{METADATA}, line 3: .*{re.escape(told)}") as error:
        read(inside)
    assert "\n" not in str(error.value)
    folder_of(inside, [entry("red.png", "red")])  # control: without the line it is read
    assert len(read(inside)) == 1


def test_metadata_that_name_no_picture_are_refused(tmp_path):
    with pytest.raises(ValueError, match="names no picture"):
        read(folder_of(tmp_path, ["", "  "]))


def test_metadata_that_are_no_text_are_refused(tmp_path):
    (tmp_path / METADATA).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / METADATA))} is no UTF-8"):
        read(tmp_path)


def damaged(whole: bytes, damage: str) -> bytes:
    """A picture's file with a damage."""
    second = whole.rindex(b"IDAT")  # name of the last part of its pixels
    return {
        "no picture": b"no picture",
        "empty": b"",
        "cut short": whole[: len(whole) // 2],
        "a broken part": whole[:second] + b"\0\0\0\0" + whole[second + 4 :],
    }[damage]


@pytest.mark.parametrize("damage", ["no picture", "empty", "cut short", "a broken part"])
def test_a_file_that_is_no_picture_is_named(tmp_path, damage):
    folder_of(tmp_path, [entry("noise.png", "noise")])
    save(tmp_path, "noise.png", np.random.default_rng(0).integers(0, 256, (256, 256, 3)))
    whole = (tmp_path / "noise.png").read_bytes()
    assert len(read(tmp_path).pictures(torch.tensor([0]))[1]) == 1  # control
    (tmp_path / "noise.png").write_bytes(damaged(whole, damage))
    with pytest.raises(ValueError, match=r"noise\.png is no picture that can be read"):
        read(tmp_path).pictures(torch.tensor([0]))


def test_a_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    folder_of(tmp_path, [entry("red.png", "red")])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)  # it refuses twice as many
    with pytest.raises(ValueError, match=r"red\.png is no picture that can be read"):
        read(tmp_path).pictures(torch.tensor([0]))


@pytest.mark.parametrize(("height", "width"), [(0, 8), (8, -1)])
def test_a_size_without_pixels_is_refused(tmp_path, height, width):
    with pytest.raises(ValueError, match=f"height {height} and width {width}"):
        read(folder_of(tmp_path, [entry("red.png", "red")]), height, width)
