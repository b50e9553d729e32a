"""genpolicy pairs: a policy's samples, of which a reward prefers one, as a data set to learn from."""

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from genpolicy.cli.main import main
from genpolicy.config.seal import unsealed
from genpolicy.contracts.task import Context
from genpolicy.datasets.picture_pairs import PicturePairs
from genpolicy.rollout import judged_pairs
from tests import toy, toy_control
from tests.toy import PROMPTS, brightness

GROUPS = 60


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the toy, of one iteration."""
    folder = tmp_path_factory.mktemp("toy")
    path = folder / "experiment.yaml"
    sections = {"budget": {"iterations": 1}, "eval": {"every": 0, "samples": 4}}
    path.write_text(yaml.safe_dump(toy.experiment(folder, **sections)))
    assert main(["train", str(path)]) == 0
    return folder / "run"


def pairs(run: Path, out: Path, *options: str) -> int:
    return main(["pairs", str(run), "--trust", "--out", str(out), *options])


def made(out: Path) -> dict:
    return unsealed((out / "genpolicy.json").read_text())


def margins(out: Path) -> torch.Tensor:
    """The reward of the preferred picture over that of the other, [R]."""
    data = PicturePairs(str(out), 8, 8)
    context, preferred, other = data.pairs(torch.arange(len(data)))
    return brightness(preferred, context) - brightness(other, context)


def files(out: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(out.glob("*.parquet"))]


def test_the_best_of_each_group_is_preferred_to_its_worst(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert pairs(run, out, "--groups", str(GROUPS), "--members", "4") == 0
    assert f"{GROUPS} pairs of {GROUPS} groups, 0 of them with the wrong label" in (
        capsys.readouterr().out
    )
    assert (margins(out) > 0).all()
    data = PicturePairs(str(out), 8, 8)
    asked, _ = data.pictures(torch.arange(GROUPS))
    assert list(asked.prompts) == [PROMPTS[n % 4] for n in range(GROUPS)]
    labels = pq.read_table(out / "train-00000.parquet")["label_0"].to_pylist()
    assert 0.25 < sum(labels) / GROUPS < 0.75, "the preferred one stands on either side"
    told = made(out)
    assert told["reward"] == {"brightness": 1.0, "brightness_strict": 0.0}
    assert told["policy"] == str(run / "policy")
    counts = {"groups": GROUPS, "members": 4, "seed": 0, "wrong": 0.0, "pairs": GROUPS}
    assert {key: told[key] for key in counts} == counts
    assert (told["dropped"], told["flipped"]) == (0, 0)


def test_more_members_have_larger_margins(run, tmp_path):
    for members in ("2", "16"):
        assert pairs(run, tmp_path / members, "--groups", "40", "--members", members) == 0
    assert margins(tmp_path / "16").mean() > 1.5 * margins(tmp_path / "2").mean()


def test_a_share_of_the_labels_is_wrong_as_the_seed_says(run, tmp_path):
    asked = ("--groups", str(GROUPS), "--members", "3")
    for name, options in {
        "right": (),
        "some": ("--wrong", "0.3"),
        "again": ("--wrong", "0.3"),
        "more": ("--wrong", "0.5"),
        "all": ("--wrong", "1"),
        "seed": ("--wrong", "0.3", "--seed", "1"),
    }.items():
        assert pairs(run, tmp_path / name, *asked, *options) == 0
    wrong = {name: margins(tmp_path / name) < 0 for name in ("right", "some", "more", "all")}
    assert not wrong["right"].any()
    assert wrong["all"].all()
    assert 0.15 < wrong["some"].float().mean() < 0.45
    assert not (wrong["some"] & ~wrong["more"]).any(), "a larger share adds to a smaller one"
    assert int(wrong["some"].sum()) == made(tmp_path / "some")["flipped"]
    assert torch.equal(margins(tmp_path / "right").abs(), margins(tmp_path / "some").abs())
    assert files(tmp_path / "some") == files(tmp_path / "again")
    assert files(tmp_path / "some") != files(tmp_path / "seed")


def test_groups_that_the_reward_sees_alike_are_dropped_and_counted(run, tmp_path, capsys):
    strict = ("--reward", "tests.toy:brightness_strict")
    asked = ("--groups", str(GROUPS), "--members", "3", *strict)
    assert pairs(run, tmp_path / "out", *asked) == 0
    told = made(tmp_path / "out")
    assert 0 < told["pairs"] < GROUPS
    assert told["pairs"] + told["dropped"] == GROUPS
    assert (margins(tmp_path / "out") > 0).all()
    assert len(PicturePairs(str(tmp_path / "out"), 8, 8)) == told["pairs"]
    constant = ("--reward", "tests.toy:constant", "--groups", "3")
    assert pairs(run, tmp_path / "none", *constant) == 2
    assert "judges all 8 samples alike in each of the 3 groups" in capsys.readouterr().err
    assert not list(tmp_path.glob("*none*"))


def test_any_block_of_groups_draws_the_same_pairs(run, tmp_path, monkeypatch):
    asked = ("--groups", "7", "--members", "3")
    assert pairs(run, tmp_path / "whole", *asked) == 0
    monkeypatch.setattr(judged_pairs, "BLOCK", 7)
    assert pairs(run, tmp_path / "parts", *asked) == 0
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_a_policy_learns_from_the_pairs_it_drew(run, tmp_path):
    """Cloning takes the preferred ones."""
    assert pairs(run, tmp_path / "out", "--members", "4") == 0
    raw = toy.experiment(
        tmp_path,
        data={"name": "picture_pairs", "root": str(tmp_path / "out"), "height": 8, "width": 8},
        method={"name": "bc", "batch": 8, "updates": 2},
        budget={"iterations": 1},
        eval={"every": 0, "samples": 4},
    )
    (tmp_path / "bc.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "bc.yaml")]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("bc/loss" in json.loads(line) for line in lines)


class Videos(toy.ToyModel):
    """``policy: {name: "tests.cli.test_pairs:Videos"}``: it decodes to two frames."""

    def decode(self, x0):
        return super().decode(x0)[:, None].expand(-1, 2, -1, -1, -1)


def bright_frames(outputs: torch.Tensor, context: Context) -> torch.Tensor:
    return outputs.flatten(1).mean(1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--members", "1"), "--members is 1; it must be at least 2"),
        (("--groups", "0"), "--groups is 0; it must be at least 1"),
        (("--wrong", "1.5"), "--wrong is 1.5; it must be between 0 and 1"),
        (("--wrong", "nan"), "--wrong is nan; it must be between 0 and 1"),
        (("--prompts", "nowhere.txt"), "prompt file nowhere.txt does not exist"),
        (("--reward", "tests.toy:nan"), "rewards must be finite"),
        (("--steps", "0"), "steps"),
    ],
)
def test_bad_options_are_told_and_leave_nothing(run, tmp_path, capsys, options, told):
    assert pairs(run, tmp_path / "out", *options) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_what_draws_no_pictures_and_what_is_there_is_refused(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert pairs(run, tmp_path / "out") == 2
    assert "exists already: choose another folder" in capsys.readouterr().err
    folder = tmp_path / "acts"
    folder.mkdir()
    raw = toy_control.experiment(folder, budget={"iterations": 1})
    (folder / "experiment.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(folder / "experiment.yaml")]) == 0
    assert pairs(folder / "run", tmp_path / "pairs") == 2
    assert "acts, it does not draw: genpolicy demonstrate" in capsys.readouterr().err
    assert not list(tmp_path.glob("*pairs*"))


def test_pairs_of_videos_are_what_was_drawn(tmp_path):
    """Frame by frame, and the first frame where pictures are asked for."""
    raw = toy.experiment(
        tmp_path,
        policy={"name": "tests.cli.test_pairs:Videos"},
        reward={"tests.cli.test_pairs:bright_frames": 1.0},
        budget={"iterations": 1},
        eval={"every": 0, "samples": 4},
    )
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "experiment.yaml")]) == 0
    assert pairs(tmp_path / "run", tmp_path / "out", "--groups", "8", "--members", "4") == 0
    out = str(tmp_path / "out")
    stills = PicturePairs(out, 8, 8)
    frames = 2
    films = PicturePairs(out, 8, 8, frames=frames)
    rows = torch.arange(len(films))
    context, preferred, other = films.pairs(rows)
    assert preferred.shape == (len(films), frames, 3, 8, 8)
    assert (bright_frames(preferred, context) >= bright_frames(other, context)).all()
    assert torch.equal(stills.pairs(rows)[1], preferred[:, 0])
    assert films.pictures(rows[:0])[1].shape == (0, frames, 3, 8, 8)
    with pytest.raises(ValueError, match=f"has {frames} frames, and 99 are asked for"):
        PicturePairs(out, 8, 8, frames=99).pictures(rows)
    with pytest.raises(ValueError, match="frames is 0"):
        PicturePairs(out, 8, 8, frames=0)


def test_a_policy_that_comes_from_no_run_needs_prompts_and_a_reward(tmp_path, capsys):
    assert main(["pairs", "assets/shapes-sd3", "--out", str(tmp_path / "out")]) == 2
    assert "name its --prompts FILE and --reward NAME" in capsys.readouterr().err
