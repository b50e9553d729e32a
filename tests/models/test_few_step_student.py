"""Few-step students of diffusers pipelines: plain diffusers draws from what is saved, with the card's
own call, the very picture that our sampler draws; and a teacher that has no network of its own.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import (
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_lcm,
    scheduling_lcm,
)
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.chain.noise import PRIOR
from genpolicy.config import parse
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Context
from genpolicy.methods.parts.distillation import jump
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.policy.files import load, save_policy, saved
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import make_policy
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from tests import tiny

torch.set_num_threads(1)

PROMPTS = ["a red circle", "a blue square above a circle"]
NOISE = Noise.rows(3, 0, torch.arange(len(PROMPTS)), 1)
BOUNDARY = {"name": "consistency", "scaling": 10.0}
SAMPLERS = {
    "flow": {"kernel": {"name": "consistency"}},
    "lcm": {"kernel": BOUNDARY, "start": 1.0},
}
CASES = [
    ("sd3", "full", {}, "flow"),
    ("sd3", "lora", {}, "flow"),
    ("flux", "full", {}, "flow"),
    ("ltx", "full", {}, "flow"),
    ("sd15", "lora", {}, "lcm"),
    ("sd15", "full", {}, "lcm"),
    ("sd15", "full", {"prediction_type": "v_prediction"}, "lcm"),
    ("sdxl", "lora", {}, "lcm"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The tiny pipelines of the cases, saved once."""
    found = {}
    for family in {case[0] for case in CASES}:
        found[family] = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        tiny.BUILD[family]().save_pretrained(found[family])
    return found


def moved(model: DiffusersPipeline, by: float = 0.02) -> DiffusersPipeline:
    """The model after its trainable parameters have moved, as if it had learned."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


def student(folder: Path, family: str, train: str, more: dict, **sampler: Any) -> tuple:
    """A student, its policy section and its sampler."""
    section = {"pretrained": str(folder), "train": train, "call": tiny.CALL[family], **more}
    if train == "lora":
        section["lora"] = {"rank": 4, "alpha": 8}
    model = moved(DiffusersPipeline(**section))
    chain = ChainConfig(**sampler)
    policy = make_policy(model, chain)
    return policy, {"name": "diffusers_pipeline", **section}, chain


def drawn(policy: ChainPolicy) -> Tensor:
    condition = policy.model.encode(Context(PROMPTS))
    return policy.sample(condition, NOISE, keep=(0, 0)).x0


def handed(monkeypatch: pytest.MonkeyPatch, module: ModuleType, noise: Noise = NOISE) -> None:
    """Have a scheduler put back the noise of our chain, step by step."""
    steps = iter(range(1000))
    monkeypatch.setattr(
        module, "randn_tensor", lambda shape, **_: noise(next(steps), tuple(shape[1:]))
    )


def told(card: str, folder: Path, latents: Tensor) -> Any:
    """What the code of a card draws, from latents that are given to its call."""
    code = re.search(r"```python\n(.*)\n```", card, re.DOTALL)[1].replace("FOLDER", str(folder))
    code = code.replace('pipe("..."', "found = pipe(prompts, latents=latents, output_type='latent'")
    names = {"prompts": PROMPTS, "latents": latents}
    exec(code, names)
    return names["found"], names["pipe"]


# -- plain diffusers -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 2, 1])
@pytest.mark.parametrize(("family", "train", "more", "sampler"), CASES, ids=str)
def test_the_call_of_the_card_draws_our_picture_in_plain_diffusers(
    folders, tmp_path, monkeypatch, family, train, more, sampler, steps
):
    made, section, chain = student(
        folders[family], family, train, more, steps=steps, **SAMPLERS[sampler]
    )
    ours = drawn(made)
    save_policy(made, section, chain, tmp_path / "policy")
    card = (tmp_path / "policy/README.md").read_text()
    if (family, steps) == ("ltx", 1):  # diffusers divides by 0 where LTX takes one step
        assert "can't be asked for these noise times" in card
        return
    handed(monkeypatch, scheduling_flow_match_euler_discrete)
    handed(monkeypatch, scheduling_lcm)
    start = NOISE(PRIOR, made.model.event_shape)
    theirs, pipe = told(card, tmp_path / "policy", start)
    expected = "FlowMatchEulerDiscreteScheduler" if sampler == "flow" else "LCMScheduler"
    assert type(pipe.scheduler).__name__ == expected
    assert relative(theirs, ours) < 1e-5
    # the policy comes back from the folder, and its sampler is the same
    assert torch.equal(drawn(load(tmp_path / "policy")), ours)
    if steps > 1:
        # control: the scheduler that the pipeline came with draws something else
        pipe.scheduler = diffusers.DiffusionPipeline.from_pretrained(folders[family]).scheduler
        plain = pipe(
            PROMPTS,
            latents=start,
            output_type="latent",
            **{"guidance_scale": 1.0, **tiny.CALL[family]},
            num_inference_steps=steps,
        )[0]
        assert relative(plain, ours) > 1e-2


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_the_consistency_scheduler_of_flows_draws_it_too(folders, tmp_path, monkeypatch):
    made, section, chain = student(folders["sd3"], "sd3", "full", {}, steps=4, **SAMPLERS["flow"])
    save_policy(made, section, chain, tmp_path / "policy")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "policy")
    pipe.scheduler = diffusers.FlowMatchLCMScheduler.from_config(pipe.scheduler.config)
    handed(monkeypatch, scheduling_flow_match_lcm)
    theirs = pipe(
        PROMPTS,
        latents=NOISE(PRIOR, made.model.event_shape),
        output_type="latent",
        sigmas=[1.0, 0.75, 0.5, 0.25],
        guidance_scale=1.0,
        **tiny.CALL["sd3"],
    )[0]
    assert relative(theirs, drawn(made)) < 1e-5


def test_a_card_lists_the_levels_where_lcms_own_are_others(folders, tmp_path, monkeypatch):
    made, section, chain = student(folders["sd15"], "sd15", "lora", {}, steps=3, **SAMPLERS["lcm"])
    save_policy(made, section, chain, tmp_path / "policy")
    card = (tmp_path / "policy/README.md").read_text()
    assert "timesteps=[999, 666, 332]" in card
    handed(monkeypatch, scheduling_lcm)
    theirs, _ = told(card, tmp_path / "policy", NOISE(PRIOR, made.model.event_shape))
    assert relative(theirs, drawn(made)) < 1e-5


@pytest.mark.parametrize(
    ("family", "said"),
    [("wan", "can't be asked for these noise times"), ("cogvideox", "No scheduler of diffusers")],
)
def test_what_plain_diffusers_cant_draw_is_said(tmp_path, family, said):
    tiny.BUILD[family]().save_pretrained(tmp_path / "from")
    made, section, chain = student(tmp_path / "from", family, "full", {}, steps=2)
    chain = replace(chain, kernel={"name": "consistency"})
    save_policy(made, section, chain, tmp_path / "policy")
    assert said in (tmp_path / "policy/README.md").read_text()


def test_a_card_may_be_edited_and_a_sampler_without_noise_writes_none(folders, tmp_path):
    made, section, chain = student(folders["sd3"], "sd3", "full", {}, steps=2, **SAMPLERS["flow"])
    save_policy(made, section, chain, tmp_path / "policy")
    (tmp_path / "policy/README.md").write_text("mine")
    again = load(tmp_path / "policy")
    assert again.model.pipeline.scheduler.config.stochastic_sampling
    # a policy that goes on from it with the ODE is drawn with the ODE
    ode = ChainConfig(steps=2, kernel={"name": "ddim", "eta": 0.0})
    save_policy(make_policy(again.model, ode), section, ode, tmp_path / "ode")
    assert not (tmp_path / "ode/README.md").exists()
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ode")
    assert not pipe.scheduler.config.stochastic_sampling


# -- the boundary ----------------------------------------------------------------------------------


def test_a_consistency_chain_ends_at_its_jump_whatever_the_family_calls_its_data(folders):
    """Stable Diffusion's table ends at alpha_bar[0] < 1; LCMScheduler ends at x0."""
    made, _, _ = student(folders["sd15"], "sd15", "lora", {}, steps=2, **SAMPLERS["lcm"])
    condition = made.model.encode(Context(PROMPTS))
    assert float(made.model.schedule.alpha(torch.zeros(1))) < 0.9999
    for window in (None, (0, 2)):
        policy = made.with_window(window)
        path = policy.sample(condition, NOISE, keep=(0, 2))
        t = policy.chain.grid[1].expand(len(PROMPTS))
        with torch.no_grad():
            last = jump(policy, path.before(1), t, condition)
        assert torch.allclose(path.x0, last, atol=1e-6)
    with pytest.raises(ValueError, match="is a point"):
        made.transition(path, 1)


def test_a_students_jump_has_the_boundary_of_its_kernel(folders):
    """At level 0 LCM's boundary is x itself, and without a boundary the jump is x0."""
    made, _, _ = student(folders["sd15"], "sd15", "lora", {}, steps=2, **SAMPLERS["lcm"])
    condition = made.model.encode(Context(PROMPTS))
    x = NOISE(PRIOR, made.model.event_shape)
    t = torch.full((len(PROMPTS),), 1 / 1000, dtype=torch.float64)
    scheduler = diffusers.LCMScheduler()
    with torch.no_grad():
        assert torch.equal(jump(made, x, t, condition), x)
        plain = replace(made, chain=replace(made.chain, kernel=type(made.chain.kernel)()))
        x0 = made.model.denoise(x, t, condition).x0
        assert torch.equal(jump(plain, x, t, condition), x0)
    for level in (0, 1, 7, 499, 999):
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(level)
        mine = made.chain.kernel.boundary(torch.tensor([(level + 1) / 1000], dtype=torch.float64))
        assert [float(c) for c in mine] == pytest.approx([float(c) for c in theirs])


# -- the teacher -----------------------------------------------------------------------------------


def distillation(folder: Path, policy: dict, steps: int = 2, **sections: Any) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return {
        "policy": {"name": "diffusers_pipeline", **policy},
        "chain": {"steps": steps, "kernel": {"name": "consistency"}},
        "task": {"name": "prompts", "prompts": str(folder / "prompts.txt")},
        "reward": "jpeg_compressibility",
        "method": {"name": "consistency", "batch": 8, "updates": 4, "minibatch": 8},
        "optimizer": {"lr": 1e-3},
        "budget": {"iterations": 2},
        "eval": {"every": 0, "samples": 2},
        "output": str(folder / "run"),
        **sections,
    }


def taught(folder: Path, policy: dict, **sections: Any) -> Any:
    experiment = parse.parse(distillation(folder, policy, **sections))
    from accelerate import Accelerator

    return prepare(experiment, folder / "run", Processes(Accelerator(cpu=True)))[0]


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_teacher_on_the_students_network_says_what_its_own_would(
    folders, tmp_path, monkeypatch, train
):
    """Before and after the student has moved; the control: the moved student says something else."""
    made, section, _ = student(folders["sd3"], "sd3", train, {}, steps=3)
    ode = ChainConfig(steps=3, kernel={"name": "ddim", "eta": 0.0}, guidance=2.0)
    save_policy(make_policy(made.model, ode), section, ode, tmp_path / "teacher")
    policy = {"teacher": str(tmp_path / "teacher"), "train": train, "call": tiny.CALL["sd3"]}
    run = taught(tmp_path, policy)
    assert run.teacher.model is run.policy.model
    own = load(tmp_path / "teacher")
    assert torch.equal(drawn(run.teacher), drawn(own))
    moved(run.policy.model, 0.05)
    assert torch.equal(drawn(run.teacher), drawn(own))
    at_once = replace(own, model=run.policy.model)
    assert relative(drawn(at_once), drawn(own)) > 1e-3
    # what would make it another network has one of its own
    other = taught(tmp_path, {**policy, "precision": "bf16"})
    assert other.teacher.model is not other.policy.model


def test_somebody_elses_pipeline_teaches_called_as_its_student_is(folders, tmp_path):
    """A guided teacher that says nothing of its size, and an unguided student."""
    asked = {"path": str(folders["sd3"]), "guidance": 3.0, "steps": 4}
    run = taught(tmp_path, {"teacher": asked, "train": "full", "call": tiny.CALL["sd3"]})
    assert run.teacher.model is run.policy.model
    assert (run.teacher.guidance, run.policy.guidance) == (3.0, 1.0)
    assert run.teacher.chain.K == 4
    own = DiffusersPipeline(str(folders["sd3"]), train="full", call=tiny.CALL["sd3"])
    chain = ChainConfig(steps=4, kernel={"name": "ddim", "eta": 0.0}, guidance=3.0)
    moved(run.policy.model)
    assert torch.equal(drawn(run.teacher), drawn(make_policy(own, chain, origin=PERSON)))


@pytest.mark.parametrize(
    ("family", "train_", "chain"),
    [
        ("sd3", "full", {"kernel": {"name": "consistency"}}),
        ("sd3", "lora", {"kernel": {"name": "consistency"}}),
        ("sd15", "lora", {"kernel": BOUNDARY, "start": 1.0}),
    ],
)
def test_a_student_comes_nearer_to_its_teacher_in_one_step(
    folders, tmp_path, family, train_, chain
):
    """Weights, LoRA of a flow, and an LCM LoRA, whose head stays epsilon: the distance to where
    the teacher ends from the same noise falls, on noise that it has not seen.
    """
    asked = {"path": str(folders[family]), "steps": 4, "guidance": 3.0}
    asked |= {"start": 1.0} if family == "sd15" else {}
    raw = distillation(
        tmp_path,
        {"teacher": asked, "train": train_, "call": tiny.CALL[family]},
        chain={"steps": 1, **chain},
        method={"name": "consistency", "batch": 8, "updates": 15, "minibatch": 8},
        optimizer={"lr": 3e-3, "final": 0.0},
    )
    result = train(parse.parse(raw))
    found = load(result.folder)
    run = taught(tmp_path / "again", raw["policy"], chain=raw["chain"])
    target = drawn(run.teacher)
    before = float((drawn(run.policy) - target).square().mean())
    after = float((drawn(found) - target).square().mean())
    assert after < 0.8 * before
    description = json.loads((result.folder / "policy/genpolicy.json").read_text())
    assert description["chain"]["kernel"] == chain["kernel"]
    if train_ == "lora":
        assert saved(result.folder).policy["lora"]["start"] == str(result.folder / "policy")
        assert found.model.parametrisation == ("epsilon" if family == "sd15" else "velocity")
