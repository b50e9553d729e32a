"""Behaviour cloning: the loss by hand, the same on any number of processes, padding,
and that it learns to act.
"""

import json
import types
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest

import genpolicy
from genpolicy.chain import Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.methods.bc import BC
from genpolicy.methods.parts.imitation import Imitation, recorded
from genpolicy.models.toy import Toy
from genpolicy.policy.files import saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.training.draws import Draws
from genpolicy.training.experiment import train
from tests import toy
from tests.peers import peers, together
from tests.toy_control import experiment, prepared

SMALL = {"name": "bc", "batch": 12, "updates": 3}


def once(run, method):
    """One iteration of the method, without what a run does around it."""
    run.iterations = lambda: iter([1])
    method.train(run)
    return run


def drawn(seed, iteration, update, batch, frames, shape):
    """The method's draws by hand: frames, uniform times and noise of one update."""
    generator = Draws(seed).generator("imitation", iteration, update)
    rows = torch.from_numpy(generator.integers(frames, size=batch))
    uniform = torch.from_numpy(generator.random(batch))
    return (
        rows,
        uniform,
        torch.from_numpy(generator.standard_normal((batch, *shape), dtype=np.float32)),
    )


@pytest.mark.parametrize("family", ["vp", "flow"])
def test_the_loss_is_the_plain_mean_square_of_the_networks_output(tmp_path, family):
    """epsilon: (out - eps)^2; velocity: (out - (eps - x0))^2; at alpha x0 + sigma eps;
    actions scaled to [-1, 1].
    """
    run, method = prepared(
        tmp_path,
        policy={"name": "mlp", "hidden": 32, "family": family},
        method={**SMALL, "updates": 1},
    )
    model, data = run.policy.model, run.data
    rows, uniform, noise = drawn(0, 1, 0, 12, len(data), model.event_shape)
    low, high = data.stats["action"]["min"], data.stats["action"]["max"]
    first, end = data.first[rows], data.end[rows]
    frames = torch.stack([torch.minimum(rows + j, end - 1) for j in range(4)], 1)
    assert (frames >= first[:, None]).all()
    x0 = 2 * (data.values["action"][frames] - low) / (high - low) - 1
    seen = [
        (data.values[n][rows] - data.stats[n]["mean"]) / data.stats[n]["std"]
        for n in ("observation.state", "observation.environment_state")
    ]
    t = model.times(uniform)
    alpha, sigma = (
        f(t).float()[:, None, None] for f in (model.schedule.alpha, model.schedule.sigma)
    )
    output = model._network(alpha * x0 + sigma * noise, model._time(t), torch.cat(seen, -1))
    loss = ((output - (noise if family == "vp" else noise - x0)) ** 2).mean()
    expected = torch.autograd.grad(loss, run.trainable)
    once(run, method)
    metrics = run.metrics.close()
    assert metrics["bc/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    norm = float(torch.stack([g.norm() for g in expected]).norm())
    assert metrics["bc/grad_norm"] == pytest.approx(norm, rel=1e-3)
    for parameter, gradient in zip(run.trainable, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient / max(1.0, norm), rtol=1e-3, atol=1e-6)
    wrong = ((output - x0) ** 2).mean()  # control: another target is another loss
    assert abs(float((wrong - loss).detach())) > 0.05


def test_every_update_draws_anew(tmp_path):
    run, method = prepared(tmp_path, method=SMALL)
    seen = []
    honest = run.policy.model.times
    run.policy.model.times = lambda uniform: seen.append(uniform) or honest(uniform)
    once(run, method)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    for update, uniform in enumerate(seen):
        assert torch.equal(uniform, drawn(0, 1, update, 12, len(run.data), (4, 2))[1])
    assert (run.metrics.seen, run.metrics.collected) == (3 * 12, 0)
    assert run.learner.optimizer.updates == 3


def test_frames_and_times_are_uniform(tmp_path):
    run, _ = prepared(tmp_path, method={"name": "bc", "batch": 4000})
    imitation = Imitation(run, recorded(run.data, run.policy.model), len(run.data), 4000)
    frames, uniform, noise, _ = imitation.draw(0)
    assert frames.min() >= 0
    assert frames.max() < len(run.data)
    assert kstest((frames.double() / len(run.data)).numpy(), "uniform").pvalue > 1e-3
    assert kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    assert kstest(noise.flatten().double().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_a_batch(tmp_path, count):
    """The union of the shares is the batch, and the weights afterwards are those of one process."""
    found = {}
    for processes in (1, count):
        accelerators, built = peers(processes), []
        for index, accelerator in enumerate(accelerators):
            folder = tmp_path / f"{processes}-{index}"
            folder.mkdir()
            built.append(
                prepared(
                    folder,
                    accelerator,
                    method={**SMALL, "batch": 11},
                    optimizer={"lr": 1e-3, "eps": 1e-4},
                )
            )
        found[processes] = together(
            [partial(once, run, method) for run, method in built], accelerators
        )
        shares = [
            Imitation(run, recorded(run.data, run.policy.model), 50, 11).draw(1)[:3]
            for run, _ in built
        ]
        whole = drawn(0, 1, 1, 11, 50, (4, 2))
        for part, everything in zip(zip(*shares, strict=True), whole, strict=True):
            assert sum(len(p) for p in part) == 11
            for index, mine in enumerate(part):
                assert torch.equal(mine, everything[index::processes])
    (one,) = found[1]
    for run in found[count]:
        assert (
            max(
                float((a - b).detach().abs().max())
                for a, b in zip(one.trainable, run.trainable, strict=True)
            )
            < 1e-6
        )
        assert run.metrics.numbers["bc/loss"] == pytest.approx(
            one.metrics.numbers["bc/loss"], rel=1e-5
        )


def test_micro_batches_change_nothing(tmp_path):
    found = []
    for micro_batch in ("auto", 5, 1):
        folder = tmp_path / str(micro_batch)
        folder.mkdir()
        run, method = prepared(
            folder, method=SMALL, micro_batch=micro_batch, optimizer={"lr": 1e-3, "eps": 1e-4}
        )
        found.append(once(run, method))
    for other in found[1:]:
        assert (
            max(
                float((a - b).detach().abs().max())
                for a, b in zip(found[0].trainable, other.trainable, strict=True)
            )
            < 1e-6
        )


def test_actions_outside_the_episode_do_not_count_where_the_family_says_so(tmp_path):
    """The loss is, by hand, each row's mean over the actions inside its episode.
    The network still sees the others.
    """
    run, method = prepared(tmp_path, method={**SMALL, "updates": 1})
    model = run.policy.model
    model.event_mask = types.MethodType(lambda self, pad: ~pad[..., None], model)
    rows, uniform, noise = drawn(0, 1, 0, 12, len(run.data), model.event_shape)
    context, actions, pad = run.data.rows(rows, 1, range(4))
    assert pad.any()
    t, x0 = model.times(uniform), model.event(actions)
    alpha, sigma = (
        f(t).float()[:, None, None] for f in (model.schedule.alpha, model.schedule.sigma)
    )
    with torch.no_grad():
        output = model._network(alpha * x0 + sigma * noise, model._time(t), model.encode(context))
    squares = ((output - noise) ** 2).mean(2)
    inside = torch.stack([row[~out].mean() for row, out in zip(squares, pad, strict=True)]).mean()
    once(run, method)
    assert run.metrics.numbers["bc/loss"] == [pytest.approx(float(inside), rel=1e-4)]
    assert float(squares.mean()) != pytest.approx(float(inside), rel=1e-3)  # control: all of them


def test_a_mask_divides_by_what_it_keeps(tmp_path):
    run, _ = prepared(tmp_path, method=SMALL)
    policy: ChainPolicy = run.policy
    context, actions, pad = run.data.rows(torch.arange(len(run.data)), 1, range(4))
    short = pad.any(1).nonzero().flatten()[:6]
    condition, event = policy.model.encode(context)[short], policy.model.event(actions)[short]
    t, noise = torch.full((6,), 0.5).double(), torch.randn_like(event)
    mask = ~pad[short][..., None]
    found = policy.supervised_loss(condition, event, t, noise, mask)
    squares = torch.stack(
        [policy.supervised_loss(condition, event, t, noise, _only(j)) for j in range(4)], 1
    )
    expected = (squares * mask[..., 0]).sum(1) / mask[..., 0].sum(1)
    assert torch.allclose(found, expected, rtol=1e-4)


def _only(j):
    mask = torch.zeros(6, 4, 1, dtype=torch.bool)
    mask[:, j] = True
    return mask


@pytest.mark.parametrize("family", ["vp", "flow"])
def test_it_learns_to_act(tmp_path, family):
    raw = experiment(
        tmp_path,
        policy={"name": "mlp", "hidden": 32, "blocks": 1, "chunk": 2, "family": family},
        method={"name": "bc", "batch": 128, "updates": 100},
        optimizer={"lr": 3e-3, "ema": 0.99},
        budget={"iterations": 3},
        eval={"every": 0, "episodes": 40},
        environments=40,
    )
    result = train(parse.parse(raw))
    assert result.before["success_rate"] < 0.3
    assert result.after["success_rate"] > 0.6
    losses = [
        m["bc/loss"]
        for m in map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
        if "bc/loss" in m
    ]
    assert losses[-1] < 0.8 * losses[0]
    assert result.summary["env_steps"] == result.summary["env_decisions"] == 0
    assert result.summary["replay_gap"] is None
    assert genpolicy.load(result.folder).model.executed == 2


def test_control_shuffled_actions_teach_nothing(tmp_path):
    raw = experiment(
        tmp_path,
        policy={"name": "mlp", "hidden": 32, "blocks": 1, "chunk": 2},
        data={"name": "tests.toy_control:Shuffled"},
        method={"name": "bc", "batch": 128, "updates": 100},
        optimizer={"lr": 3e-3},
        budget={"iterations": 3},
        eval={"every": 0, "episodes": 40},
        environments=40,
    )
    assert train(parse.parse(raw)).after["success_rate"] < 0.4


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(ConfigError, match="name them in the data section"):
        train(parse.parse(toy.experiment(tmp_path, method={"name": "bc"})))
    with pytest.raises(ConfigError, match="batch is 0"):
        BC(batch=0)
    with pytest.raises(ConfigError, match="updates is 0"):
        BC(updates=0)


def test_a_batch_smaller_than_the_processes_is_still_a_batch(tmp_path):
    def work(run, method):
        return once(run, method).metrics.numbers["bc/loss"]

    accelerators, built = peers(3), []
    for index, accelerator in enumerate(accelerators):
        folder = tmp_path / str(index)
        folder.mkdir()
        built.append(prepared(folder, accelerator, method={**SMALL, "batch": 2}))
    losses = together([partial(work, run, method) for run, method in built], accelerators)
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_any_seed_trains(tmp_path, seed):
    raw = experiment(
        tmp_path,
        method=SMALL,
        budget={"iterations": 1},
        seed=seed,
        eval={"every": 0, "episodes": 2},
    )
    assert train(parse.parse(raw)).summary["iterations"] == 1


# -- pictures with captions -----------------------------------------------------------------------

CAPTIONED = {"bright": 204, "dark": 51}
"""Captions and the grey of their pictures, of 255."""


def captioned(folder, shuffled=False):
    """The data section of a new folder of pictures of 8 x 8 pixels, 12 of each caption; shuffled:
    half of each caption's pictures are the other's.
    """
    folder.mkdir()
    lines = []
    for caption, grey in CAPTIONED.items():
        for number in range(12):
            shown = 255 - grey if shuffled and number % 2 else grey
            name = f"{caption}-{number}.png"
            Image.new("L", (8, 8), shown).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"name": "captioned_pictures", "root": str(folder), "height": 8, "width": 8}


def draws(folder, data):
    """A run on pictures, and the mean brightness of what it draws for each caption before and
    after it.
    """
    raw = toy.experiment(
        folder,
        data=data,
        method={"name": "bc", "batch": 32, "updates": 60},
        optimizer={"lr": 1e-2},
        budget={"iterations": 4},
        eval={"every": 0, "samples": 8},
        threads=1,
    )
    result = train(parse.parse(raw))
    before = brightness(ChainPolicy(Toy(), saved(result.folder, trust=True).load().chain))
    return result, before, brightness(genpolicy.load(result.folder, trust=True))


def brightness(policy):
    """The mean brightness of 64 pictures of each caption."""
    found = {}
    for caption in CAPTIONED:
        condition = policy.model.encode(Context([caption] * 64))
        noise = Noise.rows(0, 0, torch.arange(64), 1)
        with torch.no_grad():
            x0 = policy.sample(condition, noise).x0
        found[caption] = float(policy.model.decode(x0).mean())
    return found


def distance(shown):
    """The mean distance of brightness from the recorded pictures'."""
    return sum(abs(shown[caption] - grey / 255) for caption, grey in CAPTIONED.items()) / 2


def losses_of(result):
    lines = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
    return [line["bc/loss"] for line in lines if "bc/loss" in line]


def test_it_learns_to_draw_captioned_pictures(tmp_path):
    result, before, after = draws(tmp_path, captioned(tmp_path / "pictures"))
    losses = losses_of(result)
    assert losses[-1] < 0.8 * losses[0]
    assert distance(after) < 0.1 * distance(before)
    assert after["bright"] - after["dark"] > 0.3
    assert result.summary["env_steps"] == 0


def test_control_shuffled_captions_do_not_tell_pictures_apart(tmp_path):
    _, _, after = draws(tmp_path, captioned(tmp_path / "pictures", shuffled=True))
    assert abs(after["bright"] - after["dark"]) < 0.1


def test_data_of_the_other_world_are_refused_in_one_sentence(tmp_path):
    frames = {"name": "tests.toy_control:Recorded", "episodes": 2}
    with pytest.raises(ConfigError) as error:
        train(parse.parse(toy.experiment(tmp_path, method=SMALL, data=frames)))
    told = "the data section names recorded episodes, and the task is one of prompts"
    assert str(error.value) == told
    pictures = captioned(tmp_path / "pictures")
    with pytest.raises(ConfigError) as error:
        train(parse.parse(experiment(tmp_path, method=SMALL, data=pictures)))
    told = "the data section names pictures, and the task is one of robots"
    assert str(error.value) == told
    assert not (tmp_path / "run").exists()


def test_bad_pictures_are_told_before_any_work_starts(tmp_path):
    data = captioned(tmp_path / "pictures")
    with pytest.raises(ConfigError, match="several folders are learned from as one only where"):
        train(parse.parse(toy.experiment(tmp_path, method=SMALL, data=[data, data])))
    (tmp_path / "pictures" / "bright-0.png").unlink()
    with pytest.raises(ConfigError, match=r"metadata\.jsonl, line 1: there is no file"):
        train(parse.parse(toy.experiment(tmp_path, method=SMALL, data=data)))


def test_pictures_of_another_size_are_told_before_any_work(tmp_path):
    data = captioned(tmp_path / "pictures")
    with pytest.raises(ConfigError, match=r"picture of row 0, .*, of 9 x 8 pixels"):
        draws(tmp_path, {**data, "height": 9})
    assert not (tmp_path / "run").exists()
