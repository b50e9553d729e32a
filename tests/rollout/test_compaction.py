"""A run's journal becomes a data set that LeRobot opens and that trains here; what is damaged or was
never seen is said.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from genpolicy.cli.main import main
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.datasets._lerobot_import import quiet
from genpolicy.datasets.lerobot_dataset import LeRobotDataset
from genpolicy.policy.files import load
from genpolicy.rollout import tensor_file
from genpolicy.rollout.columns import (
    DECISION,
    DONE,
    EXECUTED,
    INTERVENTION,
    ITERATION,
    REWARD,
    START,
    SUCCESS,
    TRUNCATED,
)
from genpolicy.rollout.compaction import compact
from genpolicy.rollout.recorder import FRAMES
from genpolicy.rollout.replay import Replay
from genpolicy.rollout.store import EpisodeStore
from genpolicy.training.experiment import train
from tests.toy_control import GOAL, STATE, cloned, experiment

ITERATIONS, EPISODES = 2, 7


def trained(folder: Path, **sections):
    """A run of DPPO from a clone, of a few short iterations."""
    raw = experiment(
        folder,
        policy={"name": "mlp", "pretrained": cloned(folder)},
        method={"name": "dppo", "episodes": EPISODES},
        budget={"iterations": ITERATIONS},
        eval={"every": 0, "episodes": 2},
        environments=4,
        **sections,
    )
    del raw["data"]
    return train(parse.parse(raw)).folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder, and that of its data set."""
    folder = tmp_path_factory.mktemp("compacted")
    run = trained(folder, record=True)
    store = EpisodeStore(run)
    # a person took the second decision of the first episode
    path, first = next(store.whole(1))
    first["human"] = torch.zeros_like(first["rewards"], dtype=torch.bool)
    first["human"][1] = True
    tensor_file.write(path, first)
    done = compact(run, folder / "set", trust=True)
    assert (done.iterations, done.episodes, done.human) == (ITERATIONS, ITERATIONS * EPISODES, 2)
    return run, folder / "set"


def journal(run):
    store = EpisodeStore(run)
    return [(i, episode) for i in store.iterations() for _, episode in store.whole(i)]


def test_lerobot_reads_what_was_lived(made):
    run, folder = made
    with quiet():
        from lerobot.datasets.lerobot_dataset import LeRobotDataset as Theirs

        theirs = Theirs("local/set", root=folder)
        items = [theirs[frame] for frame in range(len(theirs))]
    columns = {n: torch.stack([torch.as_tensor(i[n]) for i in items]) for n in theirs.features}
    assert theirs.features[INTERVENTION] == {"dtype": "bool", "shape": (1,), "names": None}
    at = 0
    for number, (iteration, episode) in enumerate(journal(run)):
        taken = torch.arange(2) < episode["executed"][:, None]
        rows = slice(at, at + int(taken.sum()))
        at = rows.stop
        found = {name: value[rows] for name, value in columns.items()}
        assert (found["episode_index"] == number).all()
        assert (found[ITERATION] == iteration).all()
        assert torch.equal(found["action"], episode["actions"][taken].clamp(-1, 1))
        assert torch.equal(found[REWARD], episode["rewards"][taken].float())
        for name in (STATE, GOAL):
            assert torch.equal(found[name], episode[FRAMES][name])
        last = torch.arange(len(found["action"])) == len(found["action"]) - 1
        assert torch.equal(found[DONE], last)
        assert torch.equal(found[TRUNCATED], last & episode["truncated"][-1])
        assert torch.equal(found[SUCCESS], last & episode["success"][-1])
        human = episode.get("human", torch.zeros_like(taken))
        assert torch.equal(found[INTERVENTION], human[taken])
        decision = torch.arange(len(taken)).repeat_interleave(episode["executed"])
        assert torch.equal(found[DECISION], decision)
        assert torch.equal(found[EXECUTED], episode["executed"][decision])
        assert torch.equal(found[START], episode["start"][decision].flatten(1))
    assert at == len(theirs)
    assert columns[TRUNCATED].any()
    assert columns[SUCCESS].any()
    assert columns[INTERVENTION].any()


def test_lerobots_own_tools_work_on_it(made, tmp_path):
    """Merging, deleting episodes, its replay buffer, and what a policy of its would take."""
    _, folder = made
    with quiet():
        from lerobot.datasets.dataset_tools import delete_episodes, merge_datasets
        from lerobot.datasets.lerobot_dataset import LeRobotDataset as Theirs
        from lerobot.rl.buffer import ReplayBuffer
        from lerobot.utils.feature_utils import dataset_to_policy_features

        theirs = Theirs("local/set", root=folder)
        assert set(dataset_to_policy_features(theirs.meta.features)) == {STATE, GOAL, "action"}
        merge_datasets([theirs, theirs], output_repo_id="local/two", output_dir=tmp_path / "two")
        delete_episodes(theirs, [0], repo_id="local/less", output_dir=tmp_path / "less")
        buffer = ReplayBuffer.from_lerobot_dataset(
            theirs, device="cpu", state_keys=[STATE], capacity=1000
        )
    assert len(buffer) == len(theirs)
    assert int(buffer.dones[: len(buffer)].sum()) == ITERATIONS * EPISODES
    ours = LeRobotDataset(str(folder))
    twice, less = (LeRobotDataset(str(tmp_path / name)) for name in ("two", "less"))
    for name, values in ours.columns.items():
        assert torch.equal(twice.columns[name], torch.cat([values, values])), name
        assert torch.equal(less.columns[name], values[ours.episode > 0]), name


def test_the_data_set_tells_a_replay_what_the_journal_does(made):
    """Where a decision began, a frame of the data set is that decision: one story, not two."""
    run, folder = made
    model = load(run / "policy").model
    lived = Replay.of_episodes([episode for _, episode in journal(run)], True, model)
    read = Replay.of_dataset(LeRobotDataset(str(folder)), model, cut_fails=True)
    decision = LeRobotDataset(str(folder)).columns[DECISION].flatten()
    begins = torch.ones_like(decision, dtype=torch.bool)
    begins[1:] = (decision[1:] != decision[:-1]) | (read.episode[1:] != read.episode[:-1])
    same = read[begins.nonzero().flatten()]
    assert len(same) == len(lived)
    for name in ("executed", "human", "terminated", "success", "episode", "first"):
        assert torch.equal(getattr(same, name), getattr(lived, name)), name
    assert torch.equal(same.rewards.float(), lived.rewards.float())
    assert torch.equal(same.start.nan_to_num(), lived.start.nan_to_num())
    assert bool(lived.start.isnan().any())
    for name in (STATE, GOAL):
        seen, kept = same.views.observation[name], lived.views.observation[name]
        assert torch.equal(seen[same.now], kept[lived.now])
        going = ~lived.terminated  # nothing was recorded after an episode's last action
        assert torch.equal(seen[same.after[going]], kept[lived.after[going]])
    acted, planned = model.decode(same.event), model.decode(lived.event).clamp(-1, 1)
    inside = torch.arange(2) < lived.executed[:, None]
    assert torch.allclose(acted[inside], planned[inside], atol=1e-5)


def test_the_data_set_trains_here(made, tmp_path):
    _, folder = made
    raw = experiment(tmp_path, data={"name": "lerobot_dataset", "root": str(folder)})
    raw["policy"] = {"name": "mlp", "hidden": 16, "blocks": 1, "chunk": 2}
    raw |= {"budget": {"iterations": 2}, "eval": {"every": 0, "episodes": 2}}
    assert train(parse.parse(raw)).summary["iterations"] == 2


def test_a_data_set_that_lerobot_recorded_with_interventions_trains_here(tmp_path):
    """The features of LeRobot's DAgger strategy, and an outcome that was added."""
    vector = {"dtype": "float32", "shape": (2,), "names": None}
    flag = {"dtype": "bool", "shape": (1,), "names": None}
    features = {STATE: vector, GOAL: vector, "action": vector, INTERVENTION: flag, SUCCESS: flag}
    draw, length, person = np.random.default_rng(0), 9, range(4, 7)
    with quiet():
        from lerobot.datasets.lerobot_dataset import LeRobotDataset as Theirs

        theirs = Theirs.create("local/rollout_x", fps=10, features=features, root=tmp_path / "set")
        for episode in range(4):
            for h in range(length):
                frame = {n: draw.standard_normal(2, np.float32) for n in (STATE, GOAL, "action")}
                frame[INTERVENTION] = np.array([h in person])
                frame[SUCCESS] = np.array([h == length - 1 and episode < 3])
                theirs.add_frame({**frame, "task": "walk"})
            theirs.save_episode()
        theirs.finalize()
    raw = experiment(tmp_path, data={"name": "lerobot_dataset", "root": str(tmp_path / "set")})
    raw |= {"budget": {"iterations": 1}, "eval": {"every": 0, "episodes": 2}}
    run = train(parse.parse(raw)).folder
    model, ours = load(run / "policy").model, LeRobotDataset(str(tmp_path / "set"))
    found = Replay.of_dataset(ours, model)
    assert found.human.any(1).sum() == 4 * len(person)
    assert found.executed[:length].tolist() == [4, 3, 2, 1, 3, 2, 1, 2, 1]
    assert found.terminated.sum() == 3 * 2
    assert found.success.sum() == 3 * length
    del ours.columns[SUCCESS]
    with pytest.raises(ConfigError, match="nothing says what came of them"):
        Replay.of_dataset(ours, model)


def test_what_is_damaged_or_missing_is_named_and_left_out(made, tmp_path, capsys):
    run, _ = made
    files = sorted((run / "episodes/2").glob("*.pt"))
    damaged, lost = files[1], files[3]
    kept = {file: file.read_bytes() for file in (damaged, lost)}
    try:
        damaged.write_bytes(kept[damaged][:1000])
        lost.unlink()
        assert main(["compact", str(run), "--out", str(tmp_path / "set"), "--trust"]) == 0
    finally:
        for file, content in kept.items():
            file.write_bytes(content)
    told = capsys.readouterr()
    assert f"{damaged} is damaged" in told.err
    assert f"iteration 2: {EPISODES - 2} of its episodes are there, and 3-0" in told.err
    assert f"{ITERATIONS * EPISODES - 2} episodes of {ITERATIONS} iterations" in told.out
    assert LeRobotDataset(str(tmp_path / "set")).episode.max() == ITERATIONS * EPISODES - 3


def test_a_file_that_is_whole_and_holds_something_else_is_named_and_left_out(
    made, tmp_path, capsys
):
    run, _ = made
    copy = shutil.copytree(run, tmp_path / "run")
    files = sorted((copy / "episodes/2").glob("*.pt"))
    lacking, longer = tensor_file.read(files[1]), tensor_file.read(files[2])
    del lacking["start"]
    longer[FRAMES][STATE] = longer[FRAMES][STATE].repeat(2, 1)
    changed = {files[0]: [1, 2], files[1]: lacking, files[2]: longer}
    for file, content in changed.items():
        tensor_file.write(file, content)
    assert main(["compact", str(copy), "--out", str(tmp_path / "set"), "--trust"]) == 0
    told = capsys.readouterr()
    for file in changed:
        assert str(file) in told.err
    assert told.err.count("it is left out") == len(changed)
    assert f"{ITERATIONS * EPISODES - len(changed)} episodes of {ITERATIONS}" in told.out


def test_bad_requests_are_one_sentence_and_write_nothing(made, tmp_path, capsys):
    run, folder = made
    out = str(tmp_path / "set")

    def told(*words):
        assert main(["compact", *words]) == 2
        assert not Path(out).exists()
        return capsys.readouterr().err

    assert "is no run's folder" in told(str(tmp_path), "--out", out)
    assert "exists already" in told(str(run), "--out", str(folder), "--trust")
    assert "--trust" in told(str(run), "--out", out), "the task is named by a path"
    plain = trained(tmp_path / "plain")
    assert "record: true" in told(str(plain), "--out", out, "--trust")
    store = EpisodeStore(plain)
    _, episode = next(EpisodeStore(run).whole(1))
    store.write(1, "0-0-x", {n: value for n, value in episode.items() if n != FRAMES})
    assert "only what was seen at its decisions" in told(str(plain), "--out", out, "--trust")
    assert not list(tmp_path.glob(".set*"))
