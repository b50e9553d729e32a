"""The meaning of a network's output: what models may say, that it is saved, and what reads it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.chain import DDIM, Chain, Noise
from genpolicy.chain.noise import PRIOR
from genpolicy.chain.values import expand
from genpolicy.config.leaves import make
from genpolicy.config.origin import PERSON
from genpolicy.contracts.task import Context
from genpolicy.models import mlp, toy
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.models.lerobot_diffusion import LeRobotDiffusion
from genpolicy.models.lerobot_flow import LeRobotFlow
from genpolicy.models.toy import Toy
from genpolicy.policy.policy import ChainPolicy
from tests import lerobot_tiny, lerobot_tiny_vla, tiny
from tests.models import test_diffusers_pipeline as pipelines
from tests.models import test_mlp as mlps

OF_FAMILY = {
    "vp": ("epsilon", "sample", "v_prediction"),
    "flow": ("velocity", "sample"),
    "gaussian": ("sample",),
}
HEADS = [(family, head) for family, heads in OF_FAMILY.items() for head in heads]
TOYS = [(family, head) for family, head in HEADS if family != "gaussian"]
OTHERS = [(family, head) for family, head in HEADS if head != OF_FAMILY[family][0]]
ROWS = 4


def ode(model: Any, condition: Any, steps: int = 3) -> Tensor:
    """Samples [ROWS,*E] of the deterministic chain from the same noise."""
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(steps), DDIM(0.0)))
    with torch.no_grad():
        return policy.sample(condition, Noise.rows(0, 0, torch.arange(ROWS), 1)).x0


def target(head: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The regression target of a head, by its definition."""
    targets = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "velocity": noise - x0,
    }
    return targets[head]


# Our own small networks


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_an_mlps_head_is_saved_with_it(family: Any, head: Any, tmp_path: Path) -> None:
    model = mlps.made(family=family, prediction_type=head)
    assert model.parametrisation == head
    _, _, condition = mlps.rows(model, ROWS)
    model.save(tmp_path)
    again = mlp.MLP(pretrained=str(tmp_path))
    assert again.parametrisation == head
    assert (again.clip is None) == (family != "vp")
    acted = ode(model, condition)
    assert torch.equal(ode(again, condition), acted)
    settings = json.loads((tmp_path / "mlp.json").read_text())
    del settings["prediction_type"]  # as before it was a setting
    (tmp_path / "mlp.json").write_text(json.dumps(settings))
    stripped = mlp.MLP(pretrained=str(tmp_path))
    assert stripped.parametrisation == OF_FAMILY[family][0]
    same = torch.equal(ode(stripped, condition), acted)
    assert same == (head == OF_FAMILY[family][0])


@pytest.mark.parametrize(("family", "head"), OTHERS)
def test_a_student_of_another_head_starts_from_the_same_weights(
    family: Any, head: Any, tmp_path: Path
) -> None:
    teacher = mlps.made(family=family)
    teacher.save(tmp_path)
    student = mlp.MLP(pretrained=str(tmp_path), prediction_type=head)
    assert (teacher.parametrisation, student.parametrisation) == (OF_FAMILY[family][0], head)
    for name, parameter in student.trainable().items():
        assert torch.equal(parameter, teacher.trainable()[name]), name
    _, _, condition = mlps.rows(teacher, ROWS)
    assert not torch.equal(ode(student, condition), ode(teacher, condition))
    student.save(tmp_path)
    assert mlp.MLP(pretrained=str(tmp_path)).parametrisation == head


def told(caplog: pytest.LogCaptureFixture, make: Callable[[], Any]) -> list[str]:
    """The warnings of a model that is made."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make()
    return [record.getMessage() for record in caplog.records]


def test_a_head_that_is_not_the_saved_ones_is_told(tmp_path: Path, caplog: Any) -> None:
    sentence = (
        "policy.prediction_type is sample, and the saved policy says {}: training begins with its"
        " weights as they are, and teaches them the new meaning"
    )
    mlps.made(family="vp").save(tmp_path)
    Toy().save(tmp_path)
    for kind, own in ((mlp.MLP, "epsilon"), (Toy, "velocity")):
        other = told(caplog, lambda kind=kind: kind(str(tmp_path), prediction_type="sample"))
        assert other == [sentence.format(own)]
        for head in (own, None):  # control
            same = lambda kind=kind, head=head: kind(str(tmp_path), prediction_type=head)  # noqa: E731
            assert told(caplog, same) == []
    student = tmp_path / "student"
    student.mkdir()
    mlps.made(family="vp", prediction_type="sample").save(student)
    assert told(caplog, lambda: mlp.MLP(str(student), prediction_type="sample")) == [], "control"


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_the_loss_is_that_of_the_heads_own_target(family: Any, head: Any) -> None:
    model = mlps.made(family=family, prediction_type=head)
    x0, t, condition = mlps.rows(model, 8)
    t = t.clamp(0.05, 0.95)  # neither end: what divides by alpha or sigma rounds there
    noise = torch.randn_like(x0)
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(1)))
    loss = policy.supervised_loss(condition, x0, t, noise)
    alpha, sigma = (expand(f(t), x0) for f in (model.schedule.alpha, model.schedule.sigma))
    x = alpha * x0 + sigma * noise
    seen = (x, t) if family != "gaussian" else (torch.zeros_like(x), torch.ones_like(t))
    output = model._network(seen[0], model._time(seen[1]), condition)
    error = output - target(head, x0, noise, alpha, sigma)
    torch.testing.assert_close(loss, error.square().flatten(1).mean(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("family", "head"), TOYS)
def test_a_toys_head_is_saved_with_it(family: Any, head: Any, tmp_path: Path) -> None:
    model = Toy(family=family, prediction_type=head)
    condition = model.encode(Context(["a", "b", "c", "d"]))
    model.save(tmp_path)
    again = Toy(str(tmp_path), family=family)
    assert again.parametrisation == head
    acted = ode(model, condition)
    assert torch.equal(ode(again, condition), acted)
    save_file(load_file(tmp_path / toy.WEIGHTS), tmp_path / toy.WEIGHTS)  # without its metadata
    stripped = Toy(str(tmp_path), family=family)
    assert stripped.parametrisation == OF_FAMILY[family][0]
    assert torch.equal(ode(stripped, condition), acted) == (head == stripped.parametrisation)


@pytest.mark.parametrize(("family", "head"), TOYS)
def test_a_toys_base_draws_from_its_density_whatever_its_head(family: Any, head: Any) -> None:
    """E[x0 | x] = alpha x / (alpha^2 + sigma^2) where the network says nothing."""
    model = Toy(family=family, prediction_type=head)
    for parameter in model.trainable().values():
        parameter.data.zero_()
    x, t = torch.randn(ROWS, *model.event_shape), torch.full((ROWS,), 0.4, dtype=torch.float64)
    said = model.denoise(x, t, model.encode(Context([""] * ROWS))).x0
    alpha, sigma = (float(f(t)[0]) for f in (model.schedule.alpha, model.schedule.sigma))
    torch.testing.assert_close(said, alpha / (alpha**2 + sigma**2) * x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"family": "vp", "prediction_type": "velocity"}, "epsilon, sample, v_prediction"),
        ({"family": "flow", "prediction_type": "epsilon"}, "velocity, sample"),
        ({"family": "flow", "prediction_type": "v_prediction"}, "velocity, sample"),
    ],
)
def test_a_head_that_a_family_can_not_have_is_refused(settings: Any, sentence: str) -> None:
    for kind in (mlp.MLP, Toy):
        with pytest.raises(ValueError, match=rf"is '\w+'; valid for an? \w+ .*: {sentence}$"):
            kind(**settings)
    with pytest.raises(ValueError, match="is 'epsilon'; valid for an mlp of family gaussian: samp"):
        mlp.MLP(family="gaussian", prediction_type="epsilon")


# LeRobot


def test_lerobots_own_sampler_reads_a_diffusion_students_head(tmp_path: Path) -> None:
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    names = (lerobot_tiny.STATE, lerobot_tiny.WORLD)
    teacher = lerobot_tiny.saved(lerobot_tiny.diffusion(*names), tmp_path / "teacher")
    settings = {"spacing": "lerobot", "device": "cpu"}
    student = LeRobotDiffusion(str(teacher), prediction_type="sample", **settings)
    folder = lerobot_tiny.saved(student, tmp_path / "student")
    assert json.loads((folder / "config.json").read_text())["prediction_type"] == "sample"
    again = LeRobotDiffusion(str(folder), **settings)
    assert again.parametrisation == "sample"
    context, _, _ = lerobot_tiny.Recorded(*names).rows(torch.arange(ROWS), 2, student.horizon)
    condition = student.encode(context)
    acted = ode(student, condition)
    assert torch.equal(ode(again, again.encode(context)), acted)
    noise = Noise.rows(0, 0, torch.arange(ROWS), 1)(PRIOR, student.event_shape)
    for policy in (student.policy, DiffusionPolicy.from_pretrained(folder)):
        policy.diffusion.num_inference_steps = 3
        with torch.no_grad():
            theirs = policy.diffusion.conditional_sample(
                ROWS, global_cond=condition, noise=noise.clone()
            )
        assert (theirs - acted).abs().max() <= 2e-6
    epsilon = LeRobotDiffusion(str(folder), prediction_type="epsilon", **settings)
    assert (ode(epsilon, condition) - acted).abs().max() > 1e-3


def test_a_fresh_diffusion_policy_gets_the_head_that_is_asked_for() -> None:
    model = LeRobotDiffusion(config=lerobot_tiny.SMALL, prediction_type="sample", device="cpu")
    model.initialise(lerobot_tiny.Recorded(lerobot_tiny.STATE, lerobot_tiny.WORLD))
    assert (model.parametrisation, model.policy.config.prediction_type) == ("sample", "sample")
    with pytest.raises(ValueError, match=r"'velocity'; valid for LeRobot's .*: epsilon, sample$"):
        LeRobotDiffusion(config=lerobot_tiny.SMALL, prediction_type="velocity", device="cpu")


def test_a_flow_students_head_is_carried_by_its_policy_section(tmp_path: Path) -> None:
    section = {"name": "lerobot_flow", "device": "cpu", "prediction_type": "sample"}
    source = lerobot_tiny_vla.saved("smolvla")
    student = make("models", {**section, "pretrained": str(source)}, PERSON)
    student.save(tmp_path)
    again = make("models", {**section, "pretrained": str(tmp_path)}, PERSON)
    context = Context(
        [*lerobot_tiny_vla.PROMPTS] * 2,
        lerobot_tiny_vla.observation(ROWS),
    )
    condition = student.encode(context)
    acted = ode(student, condition)
    assert torch.equal(ode(again, again.encode(context)), acted)
    x, t = torch.randn(ROWS, *student.event_shape), torch.ones(ROWS, dtype=torch.float64)
    with torch.no_grad():
        said = student.denoise(x, t, condition)
        assert torch.equal(
            student.scored(said.x0), student.scored(student._networks.velocity(x, t, condition))
        )
        assert torch.equal(said.eps[..., student.action_dim :], x[..., student.action_dim :])
    stripped = LeRobotFlow(str(tmp_path), device="cpu")
    assert (ode(stripped, stripped.encode(context)) - acted).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"'epsilon'; valid for lerobot_flow: velocity, sample$"):
        LeRobotFlow(str(source), device="cpu", prediction_type="epsilon")


# diffusers


@pytest.mark.parametrize(
    ("family", "head"),
    [("sd15", "sample"), ("sd15", "v_prediction"), ("sdxl", "sample"), ("cogvideox", "sample")],
)
def test_plain_diffusers_reads_a_students_head(family: str, head: Any, tmp_path: Path) -> None:
    student = pipelines.load(family, train="full", prediction_type=head)
    assert student.parametrisation == head
    student.save(tmp_path)
    condition = student.encode(Context(pipelines.PROMPTS))
    policy = pipelines.zero_noise(student, 1.0, student.native_grid(pipelines.K))
    acted = policy.sample(condition, pipelines.noises(pipelines.PROMPTS)).x0
    own = pipelines.native(pipelines.plain(tmp_path), family, student, guidance_scale=1.0)
    pipelines.assert_same_latents(acted, own)
    again = pipelines.load(family, tmp_path, train="full")
    assert (again.parametrisation, again.clip) == (head, student.clip)
    replayed = pipelines.zero_noise(again, 1.0, again.native_grid(pipelines.K)).sample(
        again.encode(Context(pipelines.PROMPTS)), pipelines.noises(pipelines.PROMPTS)
    )
    assert torch.equal(replayed.x0, acted)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "prediction_type": "epsilon"}))
    stripped = pipelines.native(pipelines.plain(tmp_path), family, student, guidance_scale=1.0)
    assert not torch.allclose(stripped, own, atol=1e-2)  # alpha 0 makes it NaN in CogVideoX


def test_a_scheduler_that_can_not_read_the_head_is_replaced_where_it_is_saved(
    tmp_path: Path,
) -> None:
    pndm = diffusers.PNDMScheduler.from_config(tiny.ddim().config)
    folder = pipelines.replaced("sd15", pndm, tmp_path / "teacher")
    student = pipelines.load("sd15", folder, train="full", prediction_type="sample")
    student.save(tmp_path / "student")
    saved = pipelines.plain(tmp_path / "student").scheduler
    assert (type(saved).__name__, saved.config.prediction_type) == ("DDIMScheduler", "sample")
    same = pipelines.load("sd15", folder, train="full", prediction_type="epsilon")
    same.save(tmp_path / "same")
    assert type(pipelines.plain(tmp_path / "same").scheduler).__name__ == "PNDMScheduler"


def test_heads_that_a_pipeline_can_not_have_are_refused() -> None:
    def refused(family: str, sentence: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=sentence) as caught:
            pipelines.load(family, **settings)
        assert "\n" not in str(caught.value)

    refused(
        "sd3", "'sample'; valid for StableDiffusion3Pipeline: velocity$", prediction_type="sample"
    )
    refused(
        "sd15",
        "is 'sample', but a LoRA keeps its pipeline's, 'epsilon'; set policy.train to full",
        prediction_type="sample",
    )
    refused(
        "cogvideox",
        "'epsilon'; valid for CogVideoXPipeline: sample, v_prediction$",
        train="full",
        prediction_type="epsilon",
    )
    kept = pipelines.load("sd15", prediction_type="epsilon")
    assert isinstance(kept, DiffusersPipeline)
    assert kept.parametrisation == "epsilon"
