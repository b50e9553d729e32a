"""SmolVLA, pi0 and pi0.5 of LeRobot's own classes, tiny:
golden, replay, padding, prefixes, losses, files.
"""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from genpolicy.chain import DDIM, SDE, Chain, Noise, Trajectory
from genpolicy.chain.noise import PRIOR
from genpolicy.chain.values import joined
from genpolicy.config import leaves
from genpolicy.config.origin import PERSON
from genpolicy.contracts.task import Context
from genpolicy.learning.objective import log_ratio
from genpolicy.models.lerobot_flow import LeRobotFlow
from genpolicy.policy.policy import ChainPolicy
from tests import lerobot_tiny_vla as tiny

FAMILIES = tiny.FAMILIES
KERNELS = (SDE(0.7), DDIM(1.0))
ROWS = 4
PROMPTS = [*tiny.PROMPTS, *tiny.PROMPTS]


@pytest.fixture(autouse=True, scope="module")
def _tiny_sizes() -> Iterator[None]:
    with tiny.sizes():
        yield


def load(family: str, folder: Path | None = None, **settings: Any) -> LeRobotFlow:
    words = {} if family == "smolvla" else {"tokenizer": tiny.words()}
    return LeRobotFlow(str(folder or tiny.saved(family)), device="cpu", **words, **settings)


@functools.cache
def shared(family: str, **settings: Any) -> LeRobotFlow:
    """The model of this family and these settings, made once, for the tests that change nothing."""
    return load(family, **settings)


def theirs(family: str, folder: Path | None = None) -> tuple[Any, Any, Any]:
    """The objects that a user of LeRobot has: policy, preprocessor, postprocessor;
    nothing of ours.
    """
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    folder = folder or tiny.saved(family)
    policy = get_policy_class(family).from_pretrained(folder)
    words = {} if family == "smolvla" else {"tokenizer_processor": {"tokenizer_name": tiny.words()}}
    pre, post = make_pre_post_processors(
        policy.config, pretrained_path=str(folder), preprocessor_overrides=words
    )
    return policy.eval(), pre, post


def batch(**more: Any) -> dict[str, Any]:
    return {
        "task": list(PROMPTS),
        **{n: v[:, -1] for n, v in tiny.observation(ROWS).items()},
        **more,
    }


def context() -> Context:
    return Context(PROMPTS, tiny.observation(ROWS))


def noises(rows: int = ROWS, iteration: int = 0) -> Noise:
    return Noise.rows(0, iteration, torch.arange(rows), 1)


def chain(model: LeRobotFlow, kernel: Any, **options: Any) -> ChainPolicy:
    return ChainPolicy(model, Chain(model.schedule, model.grid(tiny.STEPS), kernel, **options))


def sampled(model: LeRobotFlow, kernel: Any) -> tuple[ChainPolicy, Trajectory]:
    policy = chain(model, kernel)
    return policy, policy.sample(model.encode(context()), noises())


def ratio(policy: ChainPolicy, trajectory: Trajectory, k: int) -> Tensor:
    gaussians = policy.scored(policy.transition(trajectory, k)), policy.scored(trajectory.acted(k))
    return log_ratio(*gaussians, policy.model.scored(trajectory.after(k)), reduce="sum")


def nudge(model: LeRobotFlow, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.trainable().values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))


# Golden: LeRobot's own sampler


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_noise_is_lerobots_own_sampler(family):
    model = shared(family, padding="network")
    policy, pre, post = theirs(family)
    _, trajectory = sampled(model, DDIM(0.0))
    chunk = policy.predict_action_chunk(pre(batch()), noise=noises()(PRIOR, model.event_shape))
    assert chunk.std() > 0.1
    torch.testing.assert_close(model.scored(trajectory.x0), chunk, rtol=0, atol=1e-6)
    actions = model.decode(trajectory.x0)
    assert actions.shape == (ROWS, tiny.EXECUTED, tiny.ACTION)
    torch.testing.assert_close(actions, post(chunk)[:, : tiny.EXECUTED], rtol=0, atol=1e-6)
    _, zeroed = sampled(shared(family), DDIM(0.0))
    assert (model.scored(zeroed.x0) - chunk).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_seen_and_asked_matters(family):
    model = shared(family)
    seen = tiny.observation(ROWS)
    chunks = {}
    for name in ("nothing", "observation.state", *tiny.CAMERAS):
        changed = {n: 1 - v if n == name else v for n, v in seen.items()}
        chunks[name] = (
            chain(model, DDIM(0.0)).sample(model.encode(Context(PROMPTS, changed)), noises()).x0
        )
    others = Context(PROMPTS[::-1], seen)
    chunks["prompts"] = chain(model, DDIM(0.0)).sample(model.encode(others), noises()).x0
    plain = chunks.pop("nothing")
    assert {name for name, x0 in chunks.items() if not (x0 - plain).abs().max() > 1e-5} == set()


# Replay


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_is_exact(family, kernel):
    policy, trajectory = sampled(shared(family), kernel)
    assert list(trajectory.steps) == [0, 1, 2, 3]
    for k in trajectory.steps:
        assert ratio(policy, trajectory, k).abs().max() <= 1e-6
    fresh = Trajectory(**{**vars(trajectory), "condition": policy.model.encode(context())})
    for k in trajectory.steps:
        one_by_one = torch.cat([ratio(policy, fresh[row : row + 1], k) for row in range(ROWS)])
        assert one_by_one.abs().max() <= 1e-4
    at = torch.tensor([0, 3, 1, 2])
    gaussian, acted = (
        policy.scored(policy.transition(trajectory, at)),
        policy.scored(trajectory.acted(at)),
    )
    assert (gaussian.mean - acted.mean).abs().max() <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_notices_other_weights(family):
    model = load(family)
    policy, trajectory = sampled(model, SDE(0.7))
    nudge(model)
    assert all(ratio(policy, trajectory, k).abs().max() > 1e-2 for k in trajectory.steps)


@pytest.mark.parametrize("train", ["expert", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_is_exact_in_bf16(family, train):
    model = shared(family, precision="bf16", train=train)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in model.policy.parameters()}
    policy, trajectory = sampled(model, SDE(0.7))
    assert trajectory.x.dtype == torch.float32
    with torch.no_grad():
        assert (
            max(float(ratio(policy, trajectory, k).abs().max()) for k in trajectory.steps) <= 1e-6
        )
    _, exact = sampled(shared(family), SDE(0.7))
    error = model.scored(trajectory.x0 - exact.x0)
    assert 0 < error.abs().mean() < 0.1 * model.scored(exact.x0).std()


# Padded dims


def joint_and_scored(model: LeRobotFlow) -> tuple[Tensor, Tensor]:
    """Log-ratios after a change of weights, over all dims and over the robot's own."""
    policy, trajectory = sampled(model, SDE(0.7))
    nudge(model)
    pairs = [
        (policy.transition(trajectory, k), trajectory.acted(k), trajectory.after(k))
        for k in trajectory.steps
    ]
    everything = torch.stack([log_ratio(*pair, reduce="sum") for pair in pairs]).sum(0)
    return everything, torch.stack([ratio(policy, trajectory, k) for k in trajectory.steps]).sum(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_acts_through_padded_dims(family):
    everything, scored = joint_and_scored(load(family))
    assert scored.abs().min() > 1e-2
    torch.testing.assert_close(everything, scored)
    everything, scored = joint_and_scored(load(family, padding="network"))
    assert (everything - scored).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_dims_follow_their_exact_flow(family):
    model = shared(family)
    x, t = torch.randn(ROWS, *model.event_shape), torch.tensor([1.0, 0.75, 0.5, 0.25])
    prediction = model.denoise(x, t, model.encode(context()))
    padded = slice(tiny.ACTION, None)
    assert bool((prediction.x0[..., padded] == 0).all())
    torch.testing.assert_close(prediction.eps[..., padded], x[..., padded] / t[:, None, None])
    _, trajectory = sampled(model, DDIM(0.0))
    assert bool((trajectory.x0[..., padded] == 0).all())
    network = shared(family, padding="network").denoise(x, t, model.encode(context()))
    assert network.x0[..., padded].abs().min() > 0
    assert torch.equal(network.x0[..., : tiny.ACTION], prediction.x0[..., : tiny.ACTION])


# A time per row, and prefixes


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_times_are_one_call(family):
    model = shared(family)
    x, t, seen = (
        torch.randn(ROWS, *model.event_shape),
        torch.tensor([1.0, 0.3, 0.9, 0.001]),
        model.encode(context()),
    )
    with torch.no_grad():
        before = model.evaluations
        together = model.denoise(x, t, seen).x0
        assert model.evaluations - before == ROWS
        alone = [model.denoise(x[i : i + 1], t[i : i + 1], seen[i : i + 1]).x0 for i in range(ROWS)]
        others = model.denoise(x, t.flip(0), seen).x0
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert (others - together).abs().max() > 1e-2


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every run of the vision-language model."""
    from genpolicy.models import _lerobot_flow_networks as networks

    rows: list[int] = []
    real = networks.encode_prefix

    def counted(policy: Any, family: Any, batch: Any) -> Any:
        rows.append(len(next(iter(batch.values()))))
        return real(policy, family, batch)

    monkeypatch.setattr(networks, "encode_prefix", counted)
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefix_is_encoded_once(family, encoded):
    model = load(family)
    encoded.clear()
    policy, trajectory = sampled(model, SDE(0.7))
    assert encoded == [ROWS]
    ratio(policy, trajectory, 0).sum().backward()
    nudge(model)  # the expert's weights: the prefix stays right
    ratio(policy, trajectory[1:3], 1).sum().backward()
    ratio(policy, trajectory[torch.tensor([3, 0])], 1).sum().backward()
    assert encoded == [ROWS]


def test_missing_prefixes_alone_are_encoded(encoded, monkeypatch):
    model = load("smolvla")
    encoded.clear()
    seen = model.encode(context())
    x, t = torch.randn(ROWS, *model.event_shape), torch.full((ROWS,), 0.5)
    with torch.no_grad():
        two = model.denoise(x[1:3], t[1:3], seen[1:3]).x0
        again = model.denoise(x[2:3], t[2:3], seen[torch.tensor([2])]).x0
        assert encoded == [2]
        everything = model.denoise(x, t, seen).x0
        assert encoded == [2, 2]
        monkeypatch.setattr("genpolicy.models._vla_prefix.ROWS", 3)
        features = model.features(model.encode(context()))
        assert encoded == [2, 2, 3, 1]
    torch.testing.assert_close(
        torch.cat([two[1:], two]), torch.cat([again, everything[1:3]]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(features, model.features(seen), rtol=0, atol=1e-5)
    assert features.shape[-1] == 32 + tiny.STATE
    assert not features.requires_grad


def test_prefixes_need_not_be_kept(encoded):
    model = load("smolvla", keep=False)
    encoded.clear()
    policy, trajectory = sampled(model, SDE(0.7))
    assert encoded == [ROWS]
    part = trajectory[1:3]
    assert ratio(policy, part, 0).abs().max() <= 1e-4
    ratio(policy, part, 1)
    assert encoded == [ROWS, 2]


def test_rows_that_are_picked_twice_are_encoded_once(encoded):
    model = load("smolvla", keep=False)
    encoded.clear()
    seen = model.encode(context())
    x, t = torch.randn(8, *model.event_shape), torch.full((8,), 0.5)
    with torch.no_grad():
        both = model.denoise(x, t, seen[torch.tensor([3, 3, 1, 1, 0, 0, 2, 2])]).x0
        assert encoded == [ROWS]
        one = model.denoise(x[2:3], t[2:3], seen[1:2]).x0
    torch.testing.assert_close(both[2:3], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_conditions_are_those_of_all_rows(family, encoded):
    """Their texts are of different lengths, and what one of them has encoded is not encoded again."""
    model = load(family)
    encoded.clear()
    frames = tiny.observation(ROWS)
    told = ["go", "go to the red circle, and stay there", *PROMPTS[2:]]
    whole = model.encode(Context(told, frames))
    parts = [
        model.encode(Context(told[rows], {name: v[rows] for name, v in frames.items()}))
        for rows in (slice(0, 1), slice(1, None))
    ]
    x, t = torch.randn(ROWS, *model.event_shape), torch.full((ROWS,), 0.5)
    with torch.no_grad():
        model.features(parts[0])
        seen = joined(parts)
        found = model.denoise(x, t, seen).x0
        assert encoded == [1, ROWS - 1]
        features = model.features(seen)
        assert encoded == [1, ROWS - 1]
        torch.testing.assert_close(found, model.denoise(x, t, whole).x0, rtol=0, atol=1e-5)
        torch.testing.assert_close(features, model.features(whole), rtol=0, atol=1e-5)
        order = torch.tensor([2, 0, 3, 1])
        picked = model.denoise(x[order], t, seen[order]).x0
        torch.testing.assert_close(picked, found[order], rtol=0, atol=1e-5)
        assert (model.denoise(x, t, seen[order]).x0 - found).abs().max() > 1e-3, "control"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_that_learns_is_made_anew(family, encoded):
    model = load(family, train="full")
    encoded.clear()
    seen = model.encode(context())
    x, t = torch.randn(ROWS, *model.event_shape), torch.full((ROWS,), 0.5)
    with torch.no_grad():
        before = model.denoise(x, t, seen).x0
        assert torch.equal(model.denoise(x, t, seen).x0, before)
    assert encoded == [ROWS]
    model.denoise(x, t, seen).x0.sum().backward()
    assert encoded == [ROWS] * 2
    nudge(model)
    with torch.no_grad():
        after = model.denoise(x, t, seen).x0
    assert encoded == [ROWS] * 3
    assert torch.equal(after, model.denoise(x, t, model.encode(context())).x0.detach())


def test_one_evaluations_graph_does_not_live_on_in_the_next():
    model = shared("smolvla")
    seen = model.encode(context())
    x, t = torch.randn(ROWS, *model.event_shape), torch.full((ROWS,), 0.5)
    for _ in range(2):
        model.denoise(x, t, seen).x0.sum().backward()
    prefix = model._networks.prefix(seen)
    assert not any(value.requires_grad for value in prefix.tensors())

    reused = DynamicCache(prefix.layers)  # as LeRobot's sampler does, which takes no gradients
    model.policy.model.denoise_step(prefix.valid, reused, x, t).sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        model.policy.model.denoise_step(prefix.valid, reused, x, t).sum().backward()


# What learns


@pytest.mark.parametrize("train", ["expert", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_all_that_learns_and_nothing_else(family, train):
    model = load(family, train=train)
    policy, trajectory = sampled(model, SDE(0.7))
    for k in trajectory.steps:
        ratio(policy, trajectory, k).sum().backward()
    parameters = dict(model.policy.model.named_parameters())
    learning = model.trainable()
    still = {
        name for name, p in learning.items() if p.grad is None or not bool((p.grad != 0).any())
    }
    assert {
        name
        for name in still
        if "embeddings.position_embedding" not in name and "k_proj.bias" not in name
    } == set()
    assert all(p.grad is None for name, p in parameters.items() if name not in learning)
    prefix = {name for name in parameters if name.startswith(model._family.prefix)}
    head = {name for name in parameters if "lm_head" in name}
    assert not head & set(learning)
    if train == "expert":
        assert set(learning) == set(parameters) - prefix - head
    else:
        assert set(parameters) - prefix - head < set(learning)
        assert any("vision" in name for name in learning)
        assert any("state_proj" in name for name in learning) == (family != "pi05")


def test_evaluations_are_counted_in_rows_and_gradients_twice():
    model = load("smolvla")
    assert model.evaluations == 0
    policy, trajectory = sampled(model, SDE(0.7))
    assert model.evaluations == ROWS * tiny.STEPS
    policy.transition(trajectory, 0)
    assert model.evaluations == ROWS * (tiny.STEPS + 2)


# Supervised


@pytest.mark.parametrize("family", FAMILIES)
def test_the_supervised_loss_is_lerobots_own(family):
    model = shared(family, train="full")
    policy, pre, _ = theirs(family)
    generator = torch.Generator().manual_seed(5)
    actions = torch.randn(ROWS, tiny.CHUNK, tiny.ACTION, generator=generator)
    pad = torch.tensor([[False] * 4, [False, False, True, True], [False] * 3 + [True], [False] * 4])
    noise, t = (
        torch.randn(ROWS, *model.event_shape, generator=generator),
        torch.tensor([0.9, 0.5, 0.25, 0.1]),
    )
    made = pre(batch(action=actions, action_is_pad=pad))
    if family == "smolvla":
        expected, _ = policy.forward(made, noise, t, reduction="none")
    else:
        words = (made["observation.language.tokens"], made["observation.language.attention_mask"])
        state = (policy.prepare_state(made),) if family == "pi0" else ()
        losses = policy.model.forward(
            *policy._preprocess_images(made), *words, *state, policy.prepare_action(made), noise, t
        )
        expected = losses[..., : tiny.ACTION].mean((1, 2))
    event = model.event(actions)
    assert torch.equal(
        event[..., tiny.ACTION :], torch.zeros(ROWS, tiny.CHUNK, tiny.MAX_ACTION - tiny.ACTION)
    )
    seen, supervised = model.encode(context()), chain(model, DDIM(0.0)).supervised_loss
    ours = supervised(seen, event, t, noise, model.event_mask(pad))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (supervised(seen, event, t, noise) - expected).abs().min() > 1e-2
    inside = supervised(seen, event, t, noise, model.event_mask(torch.zeros_like(pad)))
    assert torch.equal(inside == ours, ~pad.any(1) | (family != "smolvla"))


@pytest.mark.parametrize("family", FAMILIES)
def test_actions_there_and_back(family):
    model = shared(family)
    actions = torch.randn(ROWS, tiny.CHUNK, tiny.ACTION)
    event = model.event(actions)
    assert event.shape == (ROWS, *model.event_shape)
    assert (model.scored(event) - actions).abs().min() > 1e-3
    torch.testing.assert_close(model.decode(event), actions[:, : model.executed], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_times_are_lerobots_own_distribution(family):
    model = shared(family)
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    times = model.times(uniform)
    assert times.dtype == torch.float64
    torch.testing.assert_close(times, 0.999 * uniform ** (2 / 3) + 0.001)
    drawn = theirs(family)[0].model.sample_time(10_000, torch.device("cpu")).double().sort().values
    assert (drawn - times).abs().max() < 0.03
    assert (drawn - uniform).abs().max() > 0.1


# Files


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_is_an_ordinary_lerobot_policy(family, tmp_path):
    model = load(family)
    nudge(model)
    model.save(tmp_path / "saved")
    _, ours = sampled(model, DDIM(0.0))
    _, again = sampled(load(family, tmp_path / "saved"), DDIM(0.0))
    assert torch.equal(again.x0, ours.x0)
    policy, pre, _ = theirs(family, tmp_path / "saved")
    chunk = policy.predict_action_chunk(pre(batch()), noise=noises()(PRIOR, model.event_shape))
    network = load(family, tmp_path / "saved", padding="network")
    torch.testing.assert_close(
        model.scored(sampled(network, DDIM(0.0))[1].x0), chunk, rtol=0, atol=5e-6
    )
    own, saved = (
        json.loads((f / "config.json").read_text())
        for f in (tiny.saved(family), tmp_path / "saved")
    )
    assert own == saved
    own, saved = (
        json.loads((f / "policy_preprocessor.json").read_text())
        for f in (tiny.saved(family), tmp_path / "saved")
    )
    assert own["steps"] == saved["steps"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_moves_to_another_machine(family, tmp_path, monkeypatch):
    here = tmp_path / "here"
    shutil.copytree(tiny.saved(family), here)
    if family == "smolvla":
        shutil.move(here / "vlm", tmp_path / "smolvlm")
        settings = json.loads((here / "config.json").read_text())
        assert Path(settings["vlm_model_name"]) == tiny.saved(family) / "vlm"
        words = tmp_path / "smolvlm"
    else:
        words = Path(shutil.copytree(tiny.words(), tmp_path / "words"))
    model = LeRobotFlow(str(here), tokenizer=str(words), device="cpu")
    model.save(tmp_path / "there")
    shutil.rmtree(words)
    shutil.rmtree(here)
    moved = LeRobotFlow(str(tmp_path / "there"), device="cpu")
    assert torch.equal(sampled(moved, DDIM(0.0))[1].x0, sampled(model, DDIM(0.0))[1].x0)
    moved.save(tmp_path / "again")
    assert (tmp_path / "again" / "vlm").is_dir()
    shutil.rmtree(tmp_path / "there" / "vlm")
    if family != "smolvla":  # what is left names the hub

        def gated(name: str) -> None:
            raise OSError(f"{name} is gated\nand so on")

        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", gated)
        with pytest.raises(
            ValueError, match=r"set policy\.tokenizer .*paligemma-3b-pt-224 is gated$"
        ):
            LeRobotFlow(str(tmp_path / "there"), device="cpu")


STATISTICS = {"mean": 0.5, "std": 2.0, "q01": -1.0, "q99": 3.0}


class Recorded:
    """A data set of another robot: 2 numbers of state, 3 of action, one camera."""

    def __init__(self, **shapes: tuple[int, ...] | None) -> None:
        camera = {"observation.images.front": (3, 24, 24), "observation.environment_state": (9,)}
        vectors = {"observation.state": (2,), "action": (3,)}
        self.shapes = {
            name: shape
            for name, shape in {**vectors, **camera, **shapes}.items()
            if shape is not None
        }
        self.stats = {
            n: {s: torch.full(vectors[n], v) for s, v in STATISTICS.items()} for n in vectors
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_learns_another_robot(family, tmp_path):
    words = {} if family == "smolvla" else {"tokenizer": tiny.words()}
    model = LeRobotFlow(base=str(tiny.saved(family)), device="cpu", **words)
    assert model.pretrained is None
    model.initialise(Recorded())
    assert model.shapes == {"observation.images.front": (3, 24, 24), "observation.state": (2,)}
    assert model.action_dim == 3
    own = theirs(family)[0].state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.policy.state_dict().items())
    seen = {
        "observation.state": torch.rand(2, 1, 2),
        "observation.images.front": torch.rand(2, 1, 3, 24, 24),
    }
    policy = chain(model, DDIM(0.0))
    x0 = policy.sample(model.encode(Context(PROMPTS[:2], seen)), noises(2)).x0
    expected = (
        (x0[:, : tiny.EXECUTED, :3] + 1) * 2 - 1
        if family == "pi05"
        else x0[:, : tiny.EXECUTED, :3] * 2 + 0.5
    )
    torch.testing.assert_close(model.decode(x0), expected, rtol=0, atol=1e-5)
    model.save(tmp_path)
    again = load(family, tmp_path, base=str(tiny.saved(family)))
    assert again.shapes == model.shapes
    assert torch.equal(
        chain(again, DDIM(0.0)).sample(again.encode(Context(PROMPTS[:2], seen)), noises(2)).x0, x0
    )


def test_found_by_name():
    made = leaves.make(
        "models",
        {"name": "lerobot_flow", "pretrained": str(tiny.saved("smolvla")), "device": "cpu"},
        PERSON,
    )
    assert isinstance(made, LeRobotFlow)


# Bad inputs: one sentence each


def broken(family: str, folder: Path, change: Any) -> Path:
    shutil.copytree(tiny.saved(family), folder)
    change(folder)
    return folder


def without_weights(folder: Path, forget: str) -> None:
    weights = {n: v for n, v in load_file(folder / "model.safetensors").items() if forget not in n}
    save_file(weights, folder / "model.safetensors")


def with_setting(folder: Path, **settings: Any) -> None:
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**old, **settings}))


def without_statistics(folder: Path) -> None:
    for file in folder.glob("*normalizer_processor.safetensors"):
        save_file(
            {n: v for n, v in load_file(file).items() if n not in ("action.mean", "action.q01")},
            file,
        )


WRONG = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 100), "is damaged"),
    "missing": (lambda f: without_weights(f, "action_out_proj"), "action_out_proj"),
    "other size": (lambda f: with_setting(f, max_action_dim=7), "(is damaged|were not loaded)"),
    "other type": (
        lambda f: with_setting(f, type="act"),
        "type act; valid here: smolvla, pi0, pi05",
    ),
    "unknown key": (lambda f: with_setting(f, colour="red"), "is damaged.*colour"),
    "statistics": (without_statistics, r"no statistic (mean|q01) of action"),
    "processors": (
        lambda f: (f / "policy_preprocessor.json").unlink(),
        "has no policy_preprocessor.json",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_folders(family, case, tmp_path):
    change, sentence = WRONG[case]
    folder = broken(family, tmp_path / "broken", change)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        load(family, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_relative_actions_are_refused(family, tmp_path):
    folder = broken(
        family, tmp_path / "relative", lambda f: with_setting(f, use_relative_actions=True)
    )
    with pytest.raises(ValueError, match="trained with use_relative_actions"):
        load(family, folder)


def test_wrong_settings(tmp_path):
    with pytest.raises(ValueError, match="needs pretrained, or base"):
        LeRobotFlow()
    with pytest.raises(FileNotFoundError, match="no such folder, and no hub id"):
        LeRobotFlow(str(tmp_path / "nothing"))
    model = shared("smolvla")
    with pytest.raises(ValueError, match=r"observation\.images\.wrist is missing"):
        model.encode(
            Context(PROMPTS, {n: v for n, v in tiny.observation(ROWS).items() if "wrist" not in n})
        )
    with pytest.raises(
        ValueError, match=r"observation\.state comes as \[2, 3\]; this policy needs \[1, 3\]"
    ):
        model.encode(
            Context(
                PROMPTS, {**tiny.observation(ROWS), "observation.state": torch.zeros(ROWS, 2, 3)}
            )
        )
    with pytest.raises(ValueError, match=r"set chain\.guidance to 1"):
        model.negative(model.encode(context()))
    for shapes, sentence in (
        ({"action": (6,)}, r"action has 6 dims; .* has room for 5"),
        (
            {"observation.images.front": None},
            "needs observation.state and a camera; the data set has",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            LeRobotFlow(base=str(tiny.saved("smolvla")), device="cpu").initialise(
                Recorded(**shapes)
            )
