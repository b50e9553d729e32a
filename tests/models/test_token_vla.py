"""A PaliGemma that says actions as tokens: its loss is transformers' own, it draws by noise alone,
and reads a prompt once for all samples.
"""

import contextlib
import functools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration

from assets.make_tiny_paligemma import processor
from genpolicy.chain import DDIM, Chain, Noise
from genpolicy.chain.values import joined
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.model import TokenModel
from genpolicy.contracts.task import Context
from genpolicy.models._token_vla_files import Lora
from genpolicy.models._token_vla_network import action_ids
from genpolicy.models._token_vla_prompt import IDS, PICTURES, VALID, text
from genpolicy.models.token_vla import TokenVLA
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from genpolicy.tasks.point_instructions import CAMERA, STATE
from tests import paligemma_tiny as tiny
from tests.models.test_mlp import Recorded as Vectors
from tests.point_recorded import Recorded

DIMS = 4  # of a chunk of two actions
BINS = 16


@functools.cache
def data() -> Recorded:
    return Recorded()


def made(**settings: Any) -> TokenVLA:
    given = {
        "pretrained": str(tiny.saved()),
        "device": "cpu",
        "chunk": 2,
        "bins": BINS,
        "words": 48,
    }
    model = TokenVLA(**{**given, **settings})
    if model.pretrained is None:
        model.initialise(data())
    return model


@functools.cache
def shared() -> TokenVLA:
    """One for all tests that change nothing, whose LoRA is no longer 0."""
    model = made()
    nudge(model)
    return model


def nudge(model: TokenVLA, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.trainable().values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))


def rows(count: int) -> tuple[Context, Tensor]:
    """Frames of several episodes, and what was done there."""
    context, actions, _ = data().rows(torch.arange(count) * 7 % len(data()), 1, range(2))
    return context, actions


def policy(model: Any) -> ChainPolicy:
    return ChainPolicy(model, Chain(model.schedule, model.grid(1), DDIM(0.0)))


def noises(count: int, iteration: int = 0) -> Noise:
    return Noise.rows(0, iteration, torch.arange(count), 1)


def transformer(model: TokenVLA) -> Any:
    return model._network.model


def sentence(model: TokenVLA, row: int, said: Tensor) -> dict[str, Tensor]:
    """What a user of transformers would hand the model for one row: the prompt without padding and
    the tokens ``said`` [D] behind the second <bos>.
    """
    context, _ = rows(row + 1)
    batch = model.encode(context[row : row + 1]).batch
    prompt = batch[IDS][0, : int(batch[VALID].sum())]
    begin = torch.tensor([model._network.begin])
    answer = torch.cat([begin, model._network.actions[said]])
    ids = torch.cat([prompt, answer])[None]
    kinds = torch.cat([torch.zeros_like(prompt), torch.ones_like(answer)])[None]
    labels = ids.clone()
    labels[:, : len(prompt) + 1] = -100
    return {
        "input_ids": ids,
        "pixel_values": batch[PICTURES][0],
        "token_type_ids": kinds,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
    }


# The contract, and the prompt


def test_it_is_a_token_model() -> None:
    assert isinstance(shared(), TokenModel)
    assert shared().event_shape == (2, 2)
    assert shared().shapes == {STATE: (2,), CAMERA: (3, 32, 32)}


def test_the_prompt_is_what_the_processor_makes_of_the_same_text() -> None:
    model = shared()
    context, _ = rows(3)
    batch = model.encode(context).batch
    state = model._scaling.standardised(STATE, context.observation[STATE][:, 0])
    processor = model._processor
    for row in range(3):
        words = text(context.prompts[row], state[row])
        assert words.startswith(f"Task: {context.prompts[row]}, State: ")
        pictures = context.observation[CAMERA][row, 0]
        own = processor(
            text=[f"<image>{words[:-1]}"], images=[pictures], do_rescale=False, return_tensors="pt"
        )
        length = int(batch[VALID][row].sum())
        assert torch.equal(own["input_ids"][0], batch[IDS][row, :length])
        assert torch.equal(own["pixel_values"], batch[PICTURES][row])
    assert batch[IDS].shape == (3, 16 + 48)


def test_the_state_is_in_bins_from_minus_to_plus_five_stds() -> None:
    state = torch.tensor([-5.0, -4.95, 0.0, 4.99, 5.0])
    assert text("  go_to\nit ", state) == "Task: go to it, State: 0 1 128 255 255;\n"


def test_two_cameras_are_two_pictures_in_their_order() -> None:
    model = made()
    shapes = {STATE: (2,), CAMERA: (3, 32, 32), "observation.images.wrist": (3, 32, 32)}
    model._adopt(shapes, 2, model._scaling)
    context, actions = rows(2)
    wrist = context.observation[CAMERA].flip(-1)
    both = Context(context.prompts, {**context.observation, "observation.images.wrist": wrist})
    seen = model.encode(both)
    assert seen.batch[PICTURES].shape == (2, 2, 3, 32, 32)
    swapped = {CAMERA: wrist, "observation.images.wrist": context.observation[CAMERA]}
    other = model.encode(Context(context.prompts, {**context.observation, **swapped}))
    losses = [model.token_losses(each, model.event(actions)) for each in (seen, other)]
    assert not torch.allclose(*losses)


def test_the_last_ids_that_are_not_special_are_actions_the_lowest_bin_last() -> None:
    words = processor(8).tokenizer
    ids = action_ids(words, len(words), 3)
    assert ids.tolist() == [len(words) - 1, len(words) - 2, len(words) - 3]
    every = action_ids(words, len(words), len(words) - len(words.all_special_ids))
    assert set(every.tolist()).isdisjoint(words.all_special_ids)


# The loss


def test_the_loss_is_the_cross_entropy_of_a_plain_forward_with_its_own_labels() -> None:
    model = shared()
    context, actions = rows(3)
    event = model.event(actions)
    losses = model.token_losses(model.encode(context), event).flatten(1)
    said = model._bins.tokens(event)
    for row in range(3):
        given = sentence(model, row, said[row])
        with torch.no_grad():
            plain = transformer(model)(**given)
        assert losses[row].mean().item() == pytest.approx(plain.loss.item(), rel=1e-5)
        logs = plain.logits[0, -DIMS - 1 : -1].log_softmax(-1)
        by_hand = -logs[torch.arange(DIMS), model._network.actions[said[row]]]
        assert torch.allclose(losses[row], by_hand, atol=1e-4)
        # the negative control: labels that are not shifted
        unshifted = -plain.logits[0, -DIMS:].log_softmax(-1)
        wrong = unshifted[torch.arange(DIMS), model._network.actions[said[row]]]
        assert not torch.allclose(losses[row], wrong, atol=1e-2)


def test_a_loss_depends_on_its_own_token_and_those_before_alone() -> None:
    model = shared()
    context, actions = rows(2)
    seen, event = model.encode(context), model.event(actions)
    before = model.token_losses(seen, event).flatten(1)
    for dim in range(DIMS):
        other = event.flatten(1).clone()
        other[:, dim] = -other[:, dim] + 0.3
        after = model.token_losses(seen, other.view_as(event)).flatten(1)
        changed = (after - before).abs().amax(0) > 1e-5
        assert changed.tolist() == [d >= dim for d in range(DIMS)]


def test_the_policys_loss_is_its_mean_without_noise_and_time() -> None:
    model = shared()
    context, actions = rows(3)
    seen, event = model.encode(context), model.event(actions)
    t, noise = torch.ones(3).double(), torch.randn_like(event)
    loss = policy(model).supervised_loss(seen, event, t, noise)
    assert torch.equal(loss, policy(model).supervised_loss(seen, event, t / 2, -noise))
    assert torch.allclose(loss, model.token_losses(seen, event).mean((1, 2)))


@pytest.mark.parametrize("train", ["lora", "full"])
def test_everything_that_is_to_learn_has_a_gradient(train: str) -> None:
    model = made(train=train)
    nudge(model)  # the gradient of A is 0 while B is
    context, actions = rows(4)
    model.token_losses(model.encode(context), model.event(actions)).sum().backward()
    assert all(
        bool(p.grad.abs().max() > 0) for p in model.trainable().values() if p.grad is not None
    )
    assert all(p.grad is not None for p in model.trainable().values())
    names = set(model.trainable())
    assert any("vision_tower" in name for name in names) == (train == "full")
    assert all("language_model" in name and ".policy." in name for name in names) == (
        train == "lora"
    )


# Generation


def levels(x: Tensor) -> Tensor:
    return torch.distributions.Normal(0, 1).cdf(x.flatten(1))


def test_what_is_said_is_the_inverse_distribution_function_of_full_forwards() -> None:
    """Each token anew from one forward over the whole sentence so far, without any cache."""
    model = shared()
    context, _ = rows(4)
    x = torch.randn(4, *model.event_shape)
    found = model._bins.tokens(model.denoise(x, torch.ones(4), model.encode(context)).x0)
    ids, uniform = model._network.actions, levels(x)
    greedy = 0
    for row in range(4):
        said = torch.zeros(DIMS, dtype=torch.long)
        for dim in range(DIMS):
            with torch.no_grad():
                logits = transformer(model)(**sentence(model, row, said)).logits[0, -DIMS - 1 + dim]
            p = logits[ids].softmax(-1)
            said[dim] = int((p.cumsum(0) <= uniform[row, dim]).sum())
            greedy += int(said[dim] == p.argmax())
        assert torch.equal(found[row], said)
    assert greedy < 4 * DIMS, "control: it draws, and does not take the likeliest"


def test_frequencies_are_the_models_probabilities_among_actions() -> None:
    model = made(bins=4, chunk=1)
    nudge(model)
    context, _ = rows(1)
    count = 4000
    seen = model.encode(context)[torch.zeros(count, dtype=torch.long)]
    tokens = model._bins.tokens(policy(model).sample(seen, noises(count)).x0)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    ids = model._network.actions
    expected, whole = torch.zeros(16), torch.zeros(16)
    for i, pair in enumerate(pairs):
        with torch.no_grad():
            logits = transformer(model)(**sentence(model, 0, pair)).logits[0, -3:-1]
        among = logits[:, ids].log_softmax(-1)
        expected[i] = among[torch.arange(2), pair].sum().exp()
        whole[i] = logits.log_softmax(-1)[torch.arange(2), ids[pair]].sum().exp()
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    assert whole.sum() < 0.5, "of all words, actions are few: the network has not learned them"
    counts = torch.bincount(tokens[:, 0] * 4 + tokens[:, 1], minlength=16)

    def chi_square(probability: Tensor) -> float:
        return float(((counts - count * probability) ** 2 / (count * probability)).sum())

    assert chi_square(expected) < 37.7  # its .999 quantile, 15 degrees
    table = expected.view(4, 4)
    independent = table.sum(1)[:, None] * table.sum(0)
    assert chi_square(independent.flatten()) > 37.7, "control: tokens that hear none before them"
    assert chi_square(torch.full((16,), 1 / 16)) > 37.7, "control"


def test_a_sample_is_a_function_of_noise_and_of_what_is_seen_alone() -> None:
    model = shared()
    context, _ = rows(6)
    seen, noise = model.encode(context), noises(6)
    first = policy(model).sample(seen, noise).x0
    torch.manual_seed(9)
    assert torch.equal(first, policy(model).sample(model.encode(context), noise).x0)
    alone = policy(model).sample(model.encode(context[2:3]), noise[torch.tensor([2])]).x0
    assert (alone - first[2:3]).abs().max() < 1e-4
    assert not torch.equal(first, policy(model).sample(seen, noises(6, iteration=1)).x0)
    assert not torch.equal(first, policy(model).sample(seen[torch.arange(6).flip(0)], noise).x0)
    assert first.abs().max() < 1
    assert not first.requires_grad


def test_the_padding_of_a_prompt_does_not_change_a_row() -> None:
    """Its length in the batch is that of the longest text that may come."""
    short, long = made(), made(words=90)
    nudge(short), nudge(long)
    context, actions = rows(4)
    prompts = ["go", *context.prompts[1:]]
    context, event = Context(prompts, context.observation), short.event(actions)
    seen = [model.encode(context) for model in (short, long)]
    assert len(set(seen[0].batch[VALID].sum(1).tolist())) > 1
    assert torch.allclose(
        short.token_losses(seen[0], event), long.token_losses(seen[1], event), atol=1e-4
    )
    x0 = [policy(m).sample(s, noises(4)).x0 for m, s in zip((short, long), seen, strict=True)]
    assert (x0[0] - x0[1]).abs().max() < 1e-4
    assert torch.allclose(short.features(seen[0]), long.features(seen[1]), atol=1e-4)
    # the negative control: tokens that do not count are counted
    seen[1].store.batch[VALID][:] = 1
    assert not torch.allclose(
        short.token_losses(seen[0], event), long.token_losses(seen[1], event), atol=1e-4
    )


def test_best_of_is_the_highest_of_its_samples() -> None:
    model = shared()
    context, _ = rows(5)
    seen, noise = model.encode(context), noises(5)

    def value(_: Tensor, event: Tensor) -> Tensor:
        return event.flatten(1).sum(1)

    best = replace(policy(model), best_of=4, judge=value).sample(seen, noise).x0
    every = policy(model).sample(seen[torch.arange(5).repeat_interleave(4)], noise.fan(4)).x0
    worth = value(every, every).view(5, 4)
    assert torch.allclose(value(best, best), worth.amax(1))
    assert len(worth.unique()) == 20  # no two samples are the same chunk


# The prompt is read once


class Towers:
    """Counts the pictures of every run of the picture tower, and the rows of every forward."""

    def __init__(self, model: TokenVLA) -> None:
        self.pictures: list[int] = []
        self.forwards = 0
        network = transformer(model)
        network.model.vision_tower.register_forward_pre_hook(self._picture)
        network.register_forward_pre_hook(self._forward)

    def _picture(self, _: Any, given: Any) -> None:
        self.pictures.append(len(given[0]))

    def _forward(self, *_: Any) -> None:
        self.forwards += 1


def test_a_prompt_is_read_once_for_all_samples_and_for_the_critic() -> None:
    model = made()
    towers = Towers(model)
    context, _ = rows(6)
    seen = model.encode(context)
    before = model.evaluations
    policy(model).sample(seen[torch.arange(6).repeat_interleave(8)], noises(48))
    assert towers.pictures == [6]
    assert towers.forwards == DIMS, "one per token, for all rows together"
    assert model.evaluations - before == 48
    model.features(seen)
    policy(model).sample(seen[2:4], noises(2))
    assert towers.pictures == [6]
    # the negative control: what learns has changed
    nudge(model)
    model.features(seen)
    assert towers.pictures == [6, 6]


def test_without_keeping_a_prompt_is_read_once_for_the_samples_that_are_drawn_together() -> None:
    model = made(keep=False)
    towers = Towers(model)
    context, _ = rows(6)
    seen = model.encode(context)
    many = seen[torch.arange(6).repeat_interleave(8)]
    x0 = policy(model).sample(many, noises(48)).x0
    assert towers.pictures == [6]
    kept = made()
    twin = kept.encode(context)[torch.arange(6).repeat_interleave(8)]
    assert torch.equal(policy(kept).sample(twin, noises(48)).x0, x0)
    policy(model).sample(seen[2:4], noises(2))
    assert towers.pictures == [6, 2]


def test_without_keeping_few_prompts_are_in_memory_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("_token_vla_network", "_vla_prefix"):
        monkeypatch.setattr(f"genpolicy.models.{module}.ROWS", 4)
    model = made(keep=False)
    towers = Towers(model)
    context, _ = rows(6)
    found = model.features(joined([model.encode(context[:3]), model.encode(context[3:])]))
    assert towers.pictures == [4, 2]
    assert torch.allclose(found, made().features(made().encode(context)), atol=1e-5)
    x0 = policy(model).sample(model.encode(context), noises(6)).x0
    assert towers.pictures == [4, 2, 4, 2]
    assert (policy(made()).sample(made().encode(context), noises(6)).x0 - x0).abs().max() < 1e-4


def test_joined_conditions_remember_what_was_read() -> None:
    model = made()
    nudge(model)
    towers = Towers(model)
    context, _ = rows(6)
    whole = model.encode(context)
    parts = [model.encode(context[:2]), model.encode(context[2:])[torch.tensor([1, 0, 3])]]
    first = model.features(parts[0])
    seen: Any = joined(parts)
    assert len(seen) == 5
    features = model.features(seen)
    assert towers.pictures == [2, 3]
    assert torch.equal(features[:2], first)
    picked = torch.tensor([0, 1, 3, 2, 5])
    assert torch.allclose(features, model.features(whole)[picked], atol=1e-5)
    mixed = torch.tensor([4, 0, 2, 0])
    assert torch.equal(model.features(seen[mixed]), features[mixed])
    assert torch.equal(seen[mixed].batch[IDS], whole.batch[IDS][picked[mixed]])
    x0 = policy(model).sample(seen[mixed], noises(4)).x0
    assert (policy(model).sample(whole[picked[mixed]], noises(4)).x0 - x0).abs().max() < 1e-4
    assert towers.pictures == [2, 3, 6]


def test_features_are_those_of_a_critic() -> None:
    model = shared()
    context, _ = rows(3)
    found = model.features(model.encode(context))
    assert found.shape == (3, tiny.WIDTH + 2)
    assert not found.requires_grad
    told = Context(["go to the blue square"] * 3, context.observation)
    assert not torch.allclose(model.features(model.encode(told)), found)


# Files


def acted(model: TokenVLA) -> dict[str, Tensor]:
    context, actions = rows(4)
    seen, event = model.encode(context), model.event(actions)
    with torch.no_grad():
        losses = model.token_losses(seen, event)
    x0 = policy(model).sample(seen, noises(4)).x0
    return {"losses": losses, "x0": x0, "features": model.features(seen), "out": model.decode(x0)}


def kept(folder: Path) -> dict[str, TokenVLA]:
    """One that learned with a LoRA and one that learned whole, each saved in a folder of its name."""
    models = {}
    for train in ("lora", "full"):
        lora = Lora(rank=3, alpha=5, targets=("q_proj", "up_proj"))
        models[train] = made(train=train, lora=lora)
        nudge(models[train])
        (folder / train).mkdir()
        models[train].save(folder / train)
        assert (folder / train / "model.safetensors").is_file() == (train == "full")
    return models


def again(folder: Path, base: str) -> dict[str, TokenVLA]:
    """Those that `kept` has saved, loaded."""
    lora = TokenVLA(base, lora=Lora(start=str(folder / "lora")), device="cpu")
    return {"lora": lora, "full": TokenVLA(str(folder / "full"), train="full", device="cpu")}


def test_a_saved_one_acts_bit_for_bit_alike(tmp_path: Path) -> None:
    models = kept(tmp_path)
    for train, model in again(tmp_path, str(tiny.saved())).items():
        wanted, found = acted(models[train]), acted(model)
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
        assert model.trainable().keys() == models[train].trainable().keys()
        # the negative control: the PaliGemma that it came from
        assert not torch.equal(acted(made())["losses"], found["losses"])


LOAD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.models import test_token_vla as t
from safetensors.torch import save_file
for name, model in t.again(Path(sys.argv[1]), sys.argv[2]).items():
    save_file(t.acted(model), f"{sys.argv[1]}/{name}.acted")
"""


@pytest.mark.slow
def test_it_does_so_in_another_process(tmp_path: Path) -> None:
    models = kept(tmp_path)
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), str(tiny.saved())], check=True)
    for train, model in models.items():
        wanted, found = acted(model), load_file(tmp_path / f"{train}.acted")
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_the_folder_of_a_whole_one_is_one_of_transformers(tmp_path: Path) -> None:
    model = made(train="full")
    nudge(model)
    model.save(tmp_path)
    plain = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path).eval()
    given = sentence(model, 0, torch.arange(DIMS))
    with torch.no_grad():
        assert torch.equal(plain(**given).logits, transformer(model)(**given).logits)


def test_the_folder_of_a_lora_is_one_of_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model = made()
    nudge(model)
    model.save(tmp_path)
    plain = PaliGemmaForConditionalGeneration.from_pretrained(tiny.saved()).eval()
    given = sentence(model, 0, torch.arange(DIMS))
    with torch.no_grad():
        before = plain(**given).logits
        after = PeftModel.from_pretrained(plain, tmp_path).eval()(**given).logits
        assert torch.equal(after, transformer(model)(**given).logits)
    assert not torch.allclose(before, after, atol=1e-2)


def test_a_new_lora_changes_nothing_and_is_the_same_in_every_process() -> None:
    model = made()
    context, actions = rows(2)
    losses = [
        each.token_losses(each.encode(context), each.event(actions))
        for each in (model, made(train="full"))
    ]
    assert torch.equal(*losses)
    torch.manual_seed(77)
    again = made().trainable()
    assert all(torch.equal(value, again[name]) for name, value in model.trainable().items())


# Half precision


def test_in_bf16_what_is_frozen_is_stored_in_it_and_what_learns_is_not() -> None:
    model = made(precision="bf16")
    nudge(model)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    frozen = {p.dtype for p in transformer(model).parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    found, exact = acted(model), acted(shared())
    assert found["losses"].dtype == torch.float32
    assert torch.allclose(found["losses"], exact["losses"], atol=0.3)


# What is refused


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ({"steps": 2}, "in one step from pure noise, and steps is 2"),
        ({"steps": 1, "start": 0.5}, "start 0.5"),
        ({"steps": 1, "window": (0, 1)}, "leave window out"),
    ],
)
def test_a_chain_that_it_can_not_walk_is_refused(sampler: dict[str, Any], said: str) -> None:
    ode = {"name": "ddim", "eta": 0.0}
    make_policy(shared(), ChainConfig(steps=1, kernel=ode))
    with pytest.raises(ConfigError, match=said):
        make_policy(shared(), ChainConfig(**{"kernel": ode, **sampler}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pretrained": None}, "needs pretrained"),
        ({"bins": 5000}, "the vocabulary has 1450 tokens that are not special"),
        ({"bins": 1}, "bins is 1"),
        ({"words": 4}, "policy.words is 4"),
        ({"train": "expert"}, "policy.train is 'expert'"),
        ({"precision": "fp16"}, "policy.precision is 'fp16'"),
        ({"train": "full", "lora": Lora(start="somewhere")}, "starts from policy.pretrained alone"),
        ({"lora": Lora(targets=("nothing",))}, "lora.targets nothing match no layer"),
        ({"lora": Lora(rank=0)}, "rank is 0"),
        ({"lora": Lora(alpha=0)}, "alpha is 0"),
        ({"lora": Lora(start="nowhere")}, "is no saved token_vla"),
        ({"pretrained": "nowhere"}, "is no folder of a PaliGemma"),
    ],
)
def test_settings_that_are_none_are_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said) as raised:
        made(**settings)
    assert "\n" not in str(raised.value)


def test_a_data_set_without_pictures_is_refused() -> None:
    model = TokenVLA(str(tiny.saved()), device="cpu")
    with pytest.raises(ValueError, match="and a camera; the data set has"):
        model.initialise(Vectors())


def test_an_observation_without_its_picture_is_refused() -> None:
    context, _ = rows(2)
    blind = Context(context.prompts, {STATE: context.observation[STATE]})
    with pytest.raises(ValueError, match=f"observation {CAMERA} is missing"):
        shared().encode(blind)


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(tiny.saved(), folder / "copy"))


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[:-1]), folder / "model.safetensors", {"format": "pt"})


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGE = {
    "another model": (lambda f: change(f / "config.json", model_type="gemma"), "model_type gemma"),
    "a weight is lost": (lose_a_weight, "1 of its weights are missing"),
    "a pickle": (only_a_pickle, "can't be read"),
    "no words": (lambda f: (f / "tokenizer.json").unlink(), "can't be read"),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"),
        "can't be read",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_one_sentence(tmp_path: Path, what: str) -> None:
    damage, said = DAMAGE[what]
    folder = copied(tmp_path)
    assert made(pretrained=str(folder)).bins == BINS, "control"
    damage(folder)
    with pytest.raises(ValueError, match=said) as raised:
        made(pretrained=str(folder))
    assert "\n" not in str(raised.value)


def test_an_adapter_is_no_paligemma(tmp_path: Path) -> None:
    shared().save(tmp_path)
    with pytest.raises(ValueError, match=r"name it as policy\.lora\.start"):
        TokenVLA(str(tmp_path), device="cpu")


def test_an_adapter_of_another_network_is_refused(tmp_path: Path) -> None:
    shared().save(tmp_path / "adapter")
    other = tiny.build(tmp_path / "other", width=64)
    with pytest.raises(ValueError, match="does not fit the PaliGemma"):
        TokenVLA(str(other), device="cpu", lora=Lora(start=str(tmp_path / "adapter")))


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json", "config.json"])
def test_code_beside_the_weights_is_not_run(tmp_path: Path, file: str) -> None:
    folder = copied(tmp_path)
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoModel", "AutoConfig")
    change(folder / file, auto_map=dict.fromkeys(names, "evil.Evil"))
    with contextlib.suppress(ValueError):
        made(pretrained=str(folder))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bins": "many"}, "bins is 'many'"),
        ({"targets": 3}, "targets is 3"),
        ({"run": "evil:main"}, "has no key 'run'"),
        ({"bins": 9999}, "set bins to at most"),
        ({"action_dim": "two"}, "action_dim is 'two'"),
    ],
)
def test_settings_of_a_folder_are_read_as_strictly(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    model = made(train="full")
    model.save(tmp_path)
    change(tmp_path / "token_vla.json", **settings)
    with pytest.raises(ValueError, match=said) as raised:
        TokenVLA(str(tmp_path), train="full", device="cpu")
    assert "\n" not in str(raised.value)
