"""Pairs of pictures: whose label says which was preferred, read at flat memory, and what is broken
is told with its row.
"""

import io
import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from genpolicy.config.leaves import make
from genpolicy.config.origin import PERSON
from genpolicy.contracts.dataset import Pairs, Pictures
from genpolicy.datasets import _pair_files, _pair_writer
from genpolicy.datasets.picture_pairs import PicturePairs

NAMES = ("jpg_0", "jpg_1", "label_0", "caption")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(grey: int, side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side), grey).save(file, "PNG")
    return file.getvalue()


DARK, BRIGHT = png(0), png(255)


def row(label: Any = 1.0, caption: Any = "a caption", first: Any = BRIGHT, second: Any = DARK):
    return first, second, label, caption


def write(folder: Path, rows: list[tuple], name: str = "train-00000.parquet", **types) -> Path:
    """A parquet file of these rows; types: of columns, where they are not bytes, floats and text."""
    kinds = dict(zip(NAMES, (pa.binary(), pa.binary(), pa.float64(), pa.string()), strict=True))
    columns = dict(zip(NAMES, zip(*rows, strict=True), strict=True))
    kinds |= types
    table = pa.table({n: pa.array(list(columns[n]), kinds[n]) for n in NAMES})
    folder.mkdir(exist_ok=True)
    pq.write_table(table.append_column("user_id", [[7] * len(rows)]), folder / name)
    return folder


def read(folder: Path, **settings: Any) -> PicturePairs:
    return PicturePairs(str(folder), 8, 8, **settings)


def greys(pictures: torch.Tensor) -> list[int]:
    """The mean grey of each picture, of 255."""
    return (pictures.flatten(1).mean(1) * 255).round().int().tolist()


def both(data: PicturePairs, *rows: int) -> tuple[list[str], list[int], list[int]]:
    context, preferred, other = data.pairs(torch.tensor(rows, dtype=torch.long))
    return list(context.prompts), greys(preferred), greys(other)


def test_the_label_says_which_picture_was_preferred(tmp_path):
    data = read(write(tmp_path, [row(1.0, "first"), row(0.0, "second")]))
    assert isinstance(data, Pairs)
    assert isinstance(data, Pictures)
    assert both(data, 0, 1) == (["first", "second"], [255, 0], [0, 255])
    context, preferred = data.pictures(torch.tensor([0, 1]))
    assert (list(context.prompts), greys(preferred)) == (["first", "second"], [255, 0])
    assert preferred.shape == (2, 3, 8, 8)
    assert preferred.dtype == torch.float32
    swapped = read(write(tmp_path / "swapped", [row(0.0, "first"), row(1.0, "second")]))
    assert both(swapped, 0, 1) == (["first", "second"], [0, 255], [255, 0])


def test_rows_are_the_files_in_the_order_of_their_names(tmp_path):
    for name, start in (("train-00001.parquet", 3), ("train-00000.parquet", 0)):
        write(tmp_path, [row(caption=str(start + n), first=png(start + n)) for n in range(3)], name)
    data = read(tmp_path)
    assert len(data) == 6
    assert both(data, *range(6))[:2] == ([*"012345"], [0, 1, 2, 3, 4, 5])
    assert both(data, 4, 0, 4)[:2] == (["4", "0", "4"], [4, 0, 4])
    assert [part.shape for part in data.pairs(torch.tensor([], dtype=torch.long))[1:]] == [
        (0, 3, 8, 8)
    ] * 2


def test_ties_are_left_out_and_counted(tmp_path):
    data = read(write(tmp_path, [row(0.5, "tie"), row(1.0, "a"), row(0.5, "tie"), row(0.0, "b")]))
    assert (len(data), data.ties) == (2, 2)
    assert both(data, 0, 1) == (["a", "b"], [255, 0], [0, 255])
    with pytest.raises(ValueError, match=r"all 2 pairs in .* are ties"):
        read(write(tmp_path / "ties", [row(0.5), row(0.5)]))


HUB = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def test_pictures_may_be_kept_as_the_hub_keeps_them_and_labels_as_whole_numbers(tmp_path):
    kept = [{"bytes": content, "path": "x.png"} for content in (BRIGHT, DARK)]
    write(tmp_path, [row(0, "a", *kept)], jpg_0=HUB, jpg_1=HUB, label_0=pa.int64())
    assert both(read(tmp_path), 0) == (["a"], [0], [255])


def test_a_picture_of_another_size_is_cut_around_its_middle(tmp_path):
    file = io.BytesIO()
    bands = np.repeat(np.array([0, 100, 200], np.uint8), 8)[None].repeat(8, 0)
    Image.fromarray(bands).save(file, "PNG")
    data = read(write(tmp_path, [row(first=file.getvalue())]))
    assert both(data, 0)[1] == [100]
    with pytest.raises(ValueError, match="height 0 and width 8"):
        PicturePairs(str(tmp_path), 0, 8)


def test_a_folder_of_several_splits_must_say_which(tmp_path):
    write(tmp_path, [row(caption="t")], "train-00000-of-00001-b66a.parquet")
    write(tmp_path, [row(caption="v")], "validation_unique-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="several splits, train, validation_unique: name one as"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no split 'test'; valid are train, validation_unique"):
        read(tmp_path, split="test")
    assert both(read(tmp_path, split="validation_unique"), 0)[0] == ["v"]
    for name in ("0000.parquet", "0001.parquet"):  # control: numbers alone are one split
        write(tmp_path / "numbers", [row()], name)
    assert len(read(tmp_path / "numbers")) == 2


def test_the_section_of_an_experiment_is_decoded(tmp_path):
    write(tmp_path, [row()])
    section = {"name": "picture_pairs", "root": str(tmp_path), "height": 8, "width": 8}
    assert len(make("datasets", section, PERSON)) == 1


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    assert both(read(write(tmp_path, [row(caption="old")])), 0)[1] == [255]
    write(tmp_path, [row(caption="new", first=png(9))])
    assert both(read(tmp_path), 0)[:2] == (["new"], [9])


# -- a folder of files -----------------------------------------------------------------------------


def line(chosen: Any = "bright.png", rejected: Any = "dark.png", caption: Any = "a caption") -> str:
    found = {"chosen_file_name": chosen, "rejected_file_name": rejected, "caption": caption}
    return json.dumps(found)


def filed(folder: Path, lines: list[str]) -> Path:
    """A folder of two pictures with these lines of metadata."""
    (folder / "inside").mkdir(parents=True, exist_ok=True)
    (folder / "bright.png").write_bytes(BRIGHT)
    (folder / "inside" / "dark.png").write_bytes(DARK)
    (folder / "metadata.jsonl").write_text("\n".join(lines).replace('"dark', '"inside/dark'))
    return folder


def test_pairs_may_be_files_of_a_folder(tmp_path):
    data = read(filed(tmp_path, [line(caption="a"), "", line("dark.png", "bright.png", "b")]))
    assert isinstance(data, Pairs)
    assert (len(data), data.ties) == (2, 0)
    assert both(data, 1, 0, 1) == (["b", "a", "b"], [0, 255, 0], [255, 0, 255])
    context, preferred = data.pictures(torch.tensor([1, 0]))
    assert (list(context.prompts), greys(preferred)) == (["b", "a"], [0, 255])
    assert data.pairs(torch.tensor([], dtype=torch.long))[2].shape == (0, 3, 8, 8)


def test_the_library_reads_that_folder_too(tmp_path):
    theirs = datasets.load_dataset("imagefolder", data_dir=str(filed(tmp_path, [line()])))["train"]
    (one,) = theirs
    assert one["caption"] == "a caption"
    assert (np.asarray(one["chosen"]).mean(), np.asarray(one["rejected"]).mean()) == (255, 0)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ('{"file_name": "bright.png", "text": "a"}', "it must be a JSON object with chosen_file"),
        (line(caption=" "), "its caption is empty"),
        (line(caption=None), "and caption must be text"),
        (line(rejected=3), "and caption must be text"),
        (line(rejected="none.png"), "there is no file none.png"),
        (line(chosen="../outside.png"), "there is no file ../outside.png"),
        ("{", "it must be a JSON object with"),
    ],
)
def test_a_broken_line_of_a_folder_is_told_with_its_number(tmp_path, broken, told):
    (tmp_path / "outside.png").write_bytes(BRIGHT)
    folder = filed(tmp_path / "pairs", [line(), "", broken])
    said = rf"^{re.escape(str(folder))}/metadata\.jsonl, line 3: .*{re.escape(told)}"
    with pytest.raises(ValueError, match=said) as error:
        read(folder)
    assert "\n" not in str(error.value)
    assert len(read(filed(tmp_path / "pairs", [line()]))) == 1  # control


def test_a_broken_file_of_a_folder_is_told_with_its_line(tmp_path):
    data = read(filed(tmp_path, [line(), line()]))
    (tmp_path / "inside" / "dark.png").write_bytes(noisy()[:3000])
    said = r"metadata\.jsonl, line 2: inside/dark\.png is no picture that can be read"
    with pytest.raises(ValueError, match=said):
        data.pairs(torch.tensor([1]))
    assert greys(data.pictures(torch.tensor([1]))[1]) == [255]  # control: the other one


def test_a_folder_of_files_has_no_splits_no_parquet_files_and_is_not_empty(tmp_path):
    filed(tmp_path, [line()])
    with pytest.raises(ValueError, match=r"split is 'train', and .*metadata\.jsonl has none"):
        read(tmp_path, split="train")
    write(tmp_path, [row()])
    with pytest.raises(ValueError, match=r"holds both metadata\.jsonl and parquet files"):
        read(tmp_path)
    with pytest.raises(ValueError, match="names no pair"):
        read(filed(tmp_path / "empty", [""]))


# -- memory ---------------------------------------------------------------------------------------

PAIRS, SIDE, BOUND = 10_000, 24, 16.0
"""Pairs, pixels of a side, and MB by which the memory of the process may grow."""


def resident() -> float:
    """MB that the process holds, without the files that are mapped into it: those pages are the
    system's, which takes them back as it likes.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read in /proc")
def test_ten_thousand_pairs_are_read_at_flat_memory(tmp_path):
    known = [png(grey, SIDE) for grey in range(256)]
    rows = [row(n % 2, f"{n}", known[n % 256], known[-1 - n % 256]) for n in range(PAIRS)]
    for part in range(4):
        write(tmp_path, rows[part::4], f"train-{part:05d}.parquet")
    # in a process of its own, which has no memory left over from other tests
    code = f"from {__name__} import grown; grown({str(tmp_path)!r})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    streamed, held = map(float, told.stdout.split())
    assert streamed < BOUND
    assert held > BOUND, "control: a third of them, held, are more than the bound"


def grown(folder: str) -> None:
    """Prints by how many MB the process grows while all pairs are read, and while it holds some."""
    data = PicturePairs(folder, SIDE, SIDE)
    data.pairs(torch.arange(100))  # what is imported and kept once
    before = most = resident()
    for index in torch.randperm(PAIRS).split(100):
        assert len(data.pairs(index)[1]) == len(index)
        most = max(most, resident())
    held = [data.pairs(index) for index in torch.arange(3000).split(100)]
    assert len(held) == 30
    print(most - before, resident() - before)


# -- broken rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (row(label=None), "label_0 is missing; it must be 1 where the first"),
        (row(label=float("nan")), "label_0 is missing"),
        (row(label=0.3), "label_0 is 0.3"),
        (row(label=-1.0), "label_0 is -1"),
        (row(caption=None), "its caption is empty"),
        (row(caption=""), "its caption is empty"),
        (row(0.5, caption=" \n"), "its caption is empty"),
    ],
)
def test_a_broken_label_or_caption_is_told_with_its_row(tmp_path, monkeypatch, broken, told):
    monkeypatch.setattr(_pair_files, "BATCH", 2)  # the row is not in the first batch
    write(tmp_path, [row()] * 3)
    write(tmp_path, [row(0.5), row(), row(), broken, row()], "train-00001.parquet")
    file = tmp_path / "train-00001.parquet"
    said = rf"^{re.escape(str(file))}, row 3 \(the first is 0\): {re.escape(told)}"
    with pytest.raises(ValueError, match=said) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    write(tmp_path, [row()] * 5, "train-00001.parquet")  # control
    assert len(read(tmp_path)) == 8


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)


def noisy() -> bytes:
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("side", ["jpg_0", "jpg_1"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no picture", "is no picture that can be read: it is none of BMP, GIF, JPEG"),
        (noisy()[:3000], "is no picture that can be read: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "it is none of BMP"),
    ],
    ids=["no picture", "cut short", "a program (EPS)"],
)
def test_a_broken_picture_is_told_with_its_row(tmp_path, side, content, told):
    broken = row(first=content) if side == "jpg_0" else row(second=content)
    write(tmp_path, [row()] * 2)
    write(tmp_path, [row(0.5), row(), broken], "train-00001.parquet")
    data = read(tmp_path)
    file = re.escape(str(tmp_path / "train-00001.parquet"))
    said = rf"^{file}, row 2 \(the first is 0\): {side} .*{re.escape(told)}"
    with pytest.raises(ValueError, match=said) as error:
        data.pairs(torch.tensor([0, 3]))  # the tie is no row of the data set
    assert "\n" not in str(error.value)
    assert "0x" not in str(error.value)
    assert both(data, 0, 1, 2)[1] == [255] * 3  # control: the others
    if side == "jpg_1":  # who learns from the preferred ones does not read the others
        assert greys(data.pictures(torch.tensor([3]))[1]) == [255]


@pytest.mark.parametrize("side", ["jpg_0", "jpg_1"])
@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("content", [None, b""])
def test_a_missing_picture_is_told_with_its_row_when_the_folder_is_opened(
    tmp_path, side, hub, content
):
    """...and not in the middle of a run; a tie may lack one, since nothing reads it."""
    kept = (lambda content: {"bytes": content, "path": None}) if hub else (lambda content: content)
    types = {"jpg_0": HUB, "jpg_1": HUB} if hub else {}

    def rows(content: bytes | None) -> list[tuple]:
        found = {"jpg_0": kept(BRIGHT), "jpg_1": kept(DARK)}
        whole, lacking = dict(found), {**found, side: kept(content)}
        tie = row(0.5, first=lacking["jpg_0"], second=lacking["jpg_1"])
        last = row(first=lacking["jpg_0"], second=lacking["jpg_1"])
        return [tie, row(first=whole["jpg_0"], second=whole["jpg_1"]), last]

    write(tmp_path, rows(BRIGHT)[:2], **types)
    write(tmp_path, rows(content), "train-00001.parquet", **types)
    file = re.escape(str(tmp_path / "train-00001.parquet"))
    with pytest.raises(ValueError, match=rf"^{file}, row 2 .*: {side} has no picture in the file"):
        read(tmp_path)
    write(tmp_path, rows(content)[:2], "train-00001.parquet", **types)  # control: the tie
    assert len(read(tmp_path)) == 2


def test_a_caption_that_is_no_utf8_is_told_with_its_row(tmp_path):
    _, offsets, content = pa.array([b"fine", b"\xff\xfe", b"fine"]).buffers()
    write(tmp_path, [row()] * 3)
    table = pq.read_table(tmp_path / "train-00000.parquet")
    captions = pa.Array.from_buffers(pa.string(), 3, [None, offsets, content])
    pq.write_table(table.set_column(3, "caption", captions), tmp_path / "train-00000.parquet")
    with pytest.raises(ValueError, match=r"00000\.parquet, row 1 .*: its caption is no UTF-8 text"):
        read(tmp_path)


def test_a_path_beside_a_picture_is_not_followed(tmp_path):
    (tmp_path / "mine.png").write_bytes(BRIGHT)
    stored = {"bytes": None, "path": str(tmp_path / "mine.png")}
    write(tmp_path, [row(first=stored, second={"bytes": DARK, "path": None})], jpg_0=HUB, jpg_1=HUB)
    theirs = datasets.Dataset.from_parquet(str(tmp_path / "train-00000.parquet"))
    assert np.asarray(theirs.cast_column("jpg_0", datasets.Image())[0]["jpg_0"]).mean() == 255, (
        "control: the library itself follows it"
    )
    with pytest.raises(ValueError, match="jpg_0 has no picture in the file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("types", "values", "told"),
    [
        ({"jpg_0": pa.string()}, {"first": "x.png"}, "jpg_0 is string, and must be the bytes"),
        ({"label_0": pa.string()}, {"label": "1"}, "label_0 is string, and must be a number"),
        ({"caption": pa.int64()}, {"caption": 1}, "caption is int64, and must be text"),
    ],
)
def test_columns_of_another_kind_are_told(tmp_path, types, values, told):
    with pytest.raises(ValueError, match=told):
        read(write(tmp_path, [row(**values)], **types))


def test_files_that_hold_no_pairs_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder of parquet files"):
        read(tmp_path / "nowhere")
    write(tmp_path, [row()])
    file = tmp_path / "train-00001.parquet"
    pq.write_table(pq.read_table(tmp_path / "train-00000.parquet").drop_columns("label_0"), file)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} has no label_0: pairs of pict"):
        read(tmp_path)
    file.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is no parquet file"):
        read(tmp_path)
    write(tmp_path, [row(1)], "train-00001.parquet", label_0=pa.int64())
    with pytest.raises(ValueError, match=r"00001\.parquet holds its columns .* not as .*00000"):
        read(tmp_path)
    empty = pq.read_table(tmp_path / "train-00000.parquet")[:0]
    (tmp_path / "empty").mkdir()
    pq.write_table(empty, tmp_path / "empty" / "train.parquet")
    with pytest.raises(ValueError, match="have no rows"):
        read(tmp_path / "empty")


# -- writing --------------------------------------------------------------------------------------


def drawn(count: int) -> list[tuple[str, torch.Tensor, torch.Tensor, bool]]:
    """Captions, preferred pictures, others, and which stands first."""
    pictures = torch.randint(256, (count, 2, 3, 8, 8)) / 255
    return [(f"caption {n}", *pictures[n], n % 3 == 0) for n in range(count)]


def test_what_is_written_is_read_to_the_byte_and_files_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(_pair_writer, "SHARD", 5000)
    monkeypatch.setattr(_pair_writer, "TOGETHER", 3)
    pairs = drawn(50)
    with PicturePairs.recording(tmp_path / "out", {"seed": 0}) as keep:
        for one in pairs:
            keep(*one)
        assert not (tmp_path / "out").exists()
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(files) > 2
    sizes = [
        sum(
            len(p["bytes"])
            for n in NAMES[:2]
            for p in pq.read_table(file, columns=[n])[n].to_pylist()
        )
        for file in files
    ]
    assert all(5000 <= size < 6000 for size in sizes[:-1])
    data = read(tmp_path / "out")
    context, preferred, other = data.pairs(torch.arange(50))
    assert list(context.prompts) == [caption for caption, *_ in pairs]
    assert torch.equal(preferred, torch.stack([one[1] for one in pairs]))
    assert torch.equal(other, torch.stack([one[2] for one in pairs]))
    labels = torch.cat([torch.tensor(pq.read_table(file)["label_0"].to_pylist()) for file in files])
    assert labels.tolist() == [float(one[3]) for one in pairs]
    theirs = datasets.load_dataset(str(tmp_path / "out"))["train"]
    assert theirs[0]["jpg_0"].size == (8, 8), "the library sees pictures"
    assert theirs[1]["label_1"] == 1.0


def test_nothing_is_left_of_a_recording_that_failed(tmp_path):
    with suppress(RuntimeError), PicturePairs.recording(tmp_path / "out", {}) as keep:
        keep(*drawn(1)[0])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(FileExistsError, match="exists already"),
        PicturePairs.recording(tmp_path / "out", {}),
    ):
        pass


@pytest.mark.parametrize("part", [b"caption 0", b"IHDR"], ids=["a caption", "a picture"])
def test_a_damaged_byte_of_what_we_wrote_is_found(tmp_path, part, capfd):
    with PicturePairs.recording(tmp_path / "out", {"seed": 0}) as keep:
        for one in drawn(5):
            keep(*one)
    (file,) = (tmp_path / "out").glob("*.parquet")
    assert len(read(tmp_path / "out")) == 5  # control
    whole = file.read_bytes()
    place = whole.index(part)
    file.write_bytes(whole[:place] + b"C" + whole[place + 1 :])
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.* can't be read: ") as error:
        read(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
