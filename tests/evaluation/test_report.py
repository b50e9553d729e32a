"""The display of a run: lines that survive a kill, and figures with the right things in them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from genpolicy.evaluation import curves, metrics_file, pictures

PROMPTS = ["a red circle", "a very long prompt " * 20, "x" * 200]


def lines(folder) -> list[dict]:
    """The lines as anybody reads them, without their checksums."""
    found = [json.loads(line) for line in (folder / metrics_file.METRICS).read_text().splitlines()]
    assert all(list(line)[-1] == "crc32" for line in found)
    return [{k: v for k, v in line.items() if k != "crc32"} for line in found]


def test_metrics_are_appended_and_read_back(tmp_path):
    assert metrics_file.read(tmp_path) == []
    metrics_file.append(tmp_path, {"iteration": 1, "reward/total": 0.5})
    metrics_file.append(
        tmp_path, {"iteration": 2, "eval/diversity": math.nan, "ci": [math.inf, 1.0]}
    )
    assert metrics_file.read(tmp_path) == [
        {"iteration": 1, "reward/total": 0.5},
        {"iteration": 2, "eval/diversity": None, "ci": [None, 1.0]},
    ]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    metrics_file.append(tmp_path, {"iteration": 1})
    with open(tmp_path / metrics_file.METRICS, "a") as file:
        file.write('{"iteration": 2, "reward/to')
    assert metrics_file.read(tmp_path) == [{"iteration": 1}]
    metrics_file.truncate(tmp_path, 1)
    metrics_file.append(tmp_path, {"iteration": 2})
    assert lines(tmp_path) == [{"iteration": 1}, {"iteration": 2}]


def test_truncate_drops_what_is_written_again(tmp_path):
    for iteration in range(5):
        metrics_file.append(tmp_path, {"iteration": iteration})
    metrics_file.truncate(tmp_path, 2)
    assert [line["iteration"] for line in lines(tmp_path)] == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [metrics_file.METRICS]


def test_write_json_is_whole_and_strict(tmp_path):
    metrics_file.write_json(tmp_path / "deep" / "eval.json", {"a": math.nan, "b": {"c": (1, 2.5)}})
    assert json.loads((tmp_path / "deep" / "eval.json").read_text()) == {
        "a": None,
        "b": {"c": [1, 2.5]},
    }
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["eval.json"]


def test_series_skips_what_is_missing():
    x, y = metrics_file.series(
        [{"iteration": 1, "a": 2.0}, {"iteration": 2}, {"iteration": 3, "a": None}], "a"
    )
    assert x.tolist() == [1.0]
    assert y.tolist() == [2.0]


@pytest.mark.parametrize("length", [1, 2, 23, 24, 120])
def test_smooth_keeps_a_line(length):
    line = np.arange(length, dtype=float)
    smoothed = curves.smooth(line)
    assert smoothed.shape == line.shape
    middle = slice(length // 4, length - length // 4)
    assert np.allclose(smoothed[middle], line[middle])


def test_pixels_round():
    picture = torch.tensor([0.0, 1.0, 0.5, 2.0, -1.0, 1 / 255]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert pictures.pixels(picture)[0, 0, :, 0].tolist() == [0, 255, 128, 255, 0, 1]


def colours(path) -> set[tuple[int, int, int]]:
    pixels = np.asarray(Image.open(path)).reshape(-1, 3)
    return {tuple(colour) for colour in pixels.tolist()}


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (3, 3, 300, 200), (3, 5, 3, 16, 24)])
def test_grid_shows_every_picture_over_its_prompt(tmp_path, shape):
    outputs = torch.zeros(shape)
    for i, level in enumerate((0.2, 0.4, 0.6)):
        outputs[i] = level
    pictures.grid(outputs, PROMPTS, tmp_path / "grid.png")
    seen = colours(tmp_path / "grid.png")
    assert {(51,) * 3, (102,) * 3, (153,) * 3} <= seen
    assert (tmp_path / "grid.txt").read_text().splitlines() == PROMPTS
    assert max(Image.open(tmp_path / "grid.png").size) < 3 * 4 * pictures.LARGEST + 100


def test_before_after_pairs_and_marks(tmp_path):
    before, after = torch.full((3, 3, 32, 32), 0.2), torch.full((3, 3, 32, 32), 0.8)
    pictures.before_after(before, after, PROMPTS, tmp_path / "plain.png")
    rewards = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    pictures.before_after(before, after, PROMPTS, tmp_path / "marked.png", rewards)
    marks = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (pictures.GOOD, pictures.BAD)}
    assert {(51,) * 3, (204,) * 3} <= colours(tmp_path / "plain.png")
    assert not marks & colours(tmp_path / "plain.png")
    assert marks <= colours(tmp_path / "marked.png")
    picture = np.asarray(Image.open(tmp_path / "plain.png"))[..., 0]
    row = next(line for line in picture if 51 in line and 204 in line)
    assert list(row).index(51) < list(row).index(204), "before must stand on the left"


def test_group_is_drawn_best_first(tmp_path):
    outputs = torch.stack([torch.full((3, 32, 32), level) for level in (0.2, 0.8)])
    rewards, advantages = torch.tensor([0.1, 0.9]), torch.tensor([-1.0, 1.0])
    pictures.group(outputs, "a red circle", rewards, advantages, tmp_path / "group.png")
    picture = np.asarray(Image.open(tmp_path / "group.png"))[..., 0]
    row = next(line for line in picture if 51 in line and 204 in line)
    assert list(row).index(204) < list(row).index(51)


def test_wrapping_ends_and_fits():
    for text in [*PROMPTS, "", "two words"]:
        for width in (40, 96, 400):
            wrapped = pictures._wrapped(text, width, 3)
            assert len(wrapped) <= 3
            assert all(pictures.font().getlength(line) <= width for line in wrapped)
    assert pictures._wrapped("two words", 400, 3) == ["two words"]


def run_metrics(iterations: int) -> list[dict]:
    found: list[dict] = []
    for i in range(iterations + 1):
        if i % 5 == 0:
            numbers = {"eval/reward/score": 0.1 * i, "eval/ci95/score": [0.1 * i - 1, 0.1 * i + 1]}
            found.append(
                {"iteration": i, **numbers, "eval/reward/total": 0.1 * i, "eval/diversity": 0.2}
            )
        if i:
            updates = {
                f"policy/clip_fraction{sign}": 0.1 for sign in ("", "_positive", "_negative")
            }
            times = {
                "time/sample": 1.0,
                "time/update": 2.0,
                **({"time/replay check": 1.0} if i == 1 else {}),
            }
            found.append(
                {"iteration": i, "reward/score": 0.1 * i, "grad_norm": 1.0, **updates, **times}
            )
    return found


def test_panels_say_what_a_run_has():
    titles = [title for title, _ in curves._panels(run_metrics(20))]
    assert titles == [
        "reward: score",
        "diversity within a prompt (pixel std)",
        "clipped share of all rows",
        "gradient norm before clipping",
        "seconds an iteration",
    ]
    kl = [{**line, "policy/kl": 0.1, "policy/log_ratio_square": 0.01} for line in run_metrics(20)]
    assert {"KL, as the method defines it", "log-ratio (root mean square)"} <= {
        title for title, _ in curves._panels(kl)
    }


def test_evaluation_includes_the_one_before_training():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    curves.evaluation(axes, run_metrics(20), "reward/score", "evaluation", curves.COLOURS[0])
    assert axes.lines[0].get_xdata().tolist() == [0, 5, 10, 15, 20]
    low, high = (
        axes.collections[0].get_paths()[0].vertices[:, 1].__getattribute__(end)()
        for end in ("min", "max")
    )
    assert (low, high) == (-1.0, 3.0)


def control_metrics(iterations: int, sparse: bool = True) -> list[dict]:
    """The metrics of a run in environments: each iteration takes 300 steps more than the last."""
    found: list[dict] = []
    for i in range(iterations + 1):
        if i:
            steps, critic = 150.0 * i * (i + 1), {"critic/explained": 0.5, "critic/loss": 0.1}
            episodes = {
                "episode/success": 0.01 * i,
                "episode/length": 90.0,
                "reward/return": 0.01 * i,
            }
            found.append(
                {"iteration": i, "env_steps": steps, "time/sample": 1.0, **episodes, **critic}
            )
        if i % 5 == 0:
            rate, band = 0.02 * i, [0.02 * i - 0.1, 0.02 * i + 0.1]
            judged = {
                "eval/success_rate": rate,
                "eval/ci95/success_rate": band,
                "eval/length": 80.0,
                "eval/n": 9,
            }
            returns = {"eval/return": rate if sparse else 7.0 + i, "eval/ci95/return": band}
            found.append({"iteration": i, **judged, **returns})
    return found


def test_panels_of_a_run_in_environments():
    titles = [title for title, _ in curves._panels(control_metrics(20))]
    assert titles == [
        "success rate",
        "environment steps of an episode",
        "share of the returns' variance explained by the value",
        "seconds an iteration",
    ]
    dense = [title for title, _ in curves._panels(control_metrics(20, sparse=False))]
    assert dense[:3] == ["success rate", "return", "environment steps of an episode"]
    unjudged = [
        {k: v for k, v in line.items() if "success" not in k} for line in control_metrics(20)
    ]
    assert next(title for title, _ in curves._panels(unjudged)) == "return"


def test_success_is_drawn_over_what_was_experienced():
    from matplotlib.figure import Figure

    lines, xlabel = curves.by_experience(control_metrics(20))
    assert xlabel == "environment steps"
    axes = Figure().add_subplot()
    dict(curves._panels(lines))["success rate"](axes)
    evaluated = next(line for line in axes.lines if line.get_label() == "evaluation, 95 % interval")
    assert evaluated.get_xdata().tolist() == [
        0,
        150 * 5 * 6,
        150 * 10 * 11,
        150 * 15 * 16,
        150 * 20 * 21,
    ]
    assert evaluated.get_ydata() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert any(line.get_label() == "training sampler" for line in axes.lines)
    assert curves.by_experience(run_metrics(20)) == (run_metrics(20), "iteration")
    cloning = [{"iteration": i, "env_steps": 0.0, "bc/loss": 1.0} for i in (1, 2)]
    assert curves.by_experience(cloning) == (cloning, "iteration")


def test_an_evaluation_without_an_interval_is_not_said_to_have_one():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    dict(curves._panels(control_metrics(20)))["environment steps of an episode"](axes)
    assert [line.get_label() for line in axes.lines][1:] == ["training sampler", "evaluation"]
    assert not axes.collections


@pytest.mark.parametrize("iterations", [0, 1, 20])
def test_curves_are_drawn(tmp_path, iterations):
    for metrics in (run_metrics, control_metrics):
        folder = tmp_path / metrics.__name__
        folder.mkdir()
        for line in metrics(iterations):
            metrics_file.append(folder, line)
        curves.figures(folder)
        assert [path.name for path in (folder / "figures").iterdir()] == ["curves.png"]
        assert min(Image.open(folder / "figures" / "curves.png").size) > 100


def test_a_run_without_lines_is_an_empty_figure(tmp_path):
    curves.figures(tmp_path)
    assert (tmp_path / "figures" / "curves.png").is_file()
