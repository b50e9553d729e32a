"""The diffusers adapter on seven families of real classes, tiny:
golden, replay, LoRA files, settings.
"""

import functools
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.chain import CPS, DDIM, SDE, Chain, ClipX0, Guidance, Noise
from genpolicy.chain.kernel import Kernel
from genpolicy.chain.noise import PRIOR
from genpolicy.config.errors import ConfigError
from genpolicy.config.leaves import make
from genpolicy.config.origin import PERSON
from genpolicy.contracts.task import Context
from genpolicy.models._diffusers_lora import ADAPTER, WEIGHTS
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.weights import swapped
from tests import tiny

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

FAMILIES = list(tiny.BUILD)
FLOWS = ("sd3", "flux", "wan", "ltx")
PROMPTS = ["a red circle", "a blue square"]
GROUPED = ["a red circle"] * 2 + ["a blue square"] * 2
K = 4
LORA = {"rank": 4, "alpha": 8.0}
DEAD = {"sd3": ("transformer_blocks.1.attn.add_q_proj",)}
"""Without influence: SD3 drops the text stream after its last block,
and with it the text queries there.
"""


@functools.cache
def saved(family: str) -> Path:
    """The family's tiny pipeline on disk."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    tiny.build(family).save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    """The pipeline as a user of diffusers has it: loaded from its folder, nothing of ours."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(family: str, folder: Path | None = None, **settings: Any) -> DiffusersPipeline:
    settings = {"device": "cpu", "call": tiny.CALL[family], "lora": LORA, **settings}
    return DiffusersPipeline(str(folder or saved(family)), **settings)


def stir(model: DiffusersPipeline) -> DiffusersPipeline:
    """Make a fresh LoRA (whose B is 0) say something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.trainable().items():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@functools.cache
def learner(family: str, precision: str = "fp32") -> DiffusersPipeline:
    """A model with a LoRA that says something, shared by the tests that do not change it."""
    return stir(load(family, precision=precision))


def noises(prompts: Sequence[str], members: int = 1) -> Noise:
    return Noise.rows(0, 0, torch.arange(len(prompts) // members), members)


def zero_noise(model: DiffusersPipeline, guidance: float, grid: Tensor) -> ChainPolicy:
    return ChainPolicy(model, Chain(model.schedule, grid, DDIM(0.0)), guidance)


def native_policy(model: DiffusersPipeline, family: str) -> Tensor:
    """The latents of the ODE from our noise, guided as the family is, at the pipeline's times."""
    policy = zero_noise(model, tiny.GUIDANCE[family], model.native_grid(K))
    return policy.sample(model.encode(Context(PROMPTS)), noises(PROMPTS)).x0


def written_as_before(model: DiffusersPipeline, folder: Path) -> None:
    """Write a LoRA as genpolicy 0.1 did: B as it learns, and alpha in diffusers' metadata alone."""
    weights = get_peft_model_state_dict(model.denoiser, adapter_name=ADAPTER)
    name = model._name
    if name == "unet":
        weights = diffusers.utils.convert_state_dict_to_diffusers(weights)
    metadata = model.denoiser.peft_config[ADAPTER].to_dict()
    layers = {f"{name}_lora_layers": weights, f"{name}_lora_adapter_metadata": metadata}
    type(model.pipeline).save_lora_weights(folder, **layers)


def native(
    pipeline: Any, family: str, model: DiffusersPipeline, output_type: str = "latent", **more: Any
) -> Any:
    """The pipeline's own sampler from our initial noise, guided as the family is."""
    guidance = {} if family == "flux" else {"guidance_scale": tiny.GUIDANCE[family]}
    latents = noises(PROMPTS)(PRIOR, model.event_shape)
    call = {
        **tiny.CALL[family],
        **guidance,
        "num_inference_steps": K,
        "output_type": output_type,
        **more,
    }
    return pipeline(PROMPTS, latents=latents, **call)[0]


def assert_same_latents(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` on latents of unit scale."""
    assert theirs.isfinite().all()
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.std()))


def deviation(policy: ChainPolicy, trajectory: Any) -> float:
    """max over kept steps and rows of |log-prob scored again - log-prob
    that acted|, mean- reduced.
    """
    worst = 0.0
    for k in trajectory.steps:
        after = trajectory.after(k)
        again = policy.transition(trajectory, k).log_prob(after, reduce="mean").detach()
        acted = trajectory.acted(k).log_prob(after, reduce="mean")
        worst = max(worst, float((again - acted).abs().max()))
    return worst


def split_deviation(policy: ChainPolicy, trajectory: Any, size: int) -> float:
    rows = range(0, len(trajectory), size)
    return max(deviation(policy, trajectory[start : start + size]) for start in rows)


def kernels(family: str) -> list[Kernel]:
    return [DDIM(1.0), CPS(0.8), *([SDE(0.7)] if family in FLOWS else [])]


# Golden: the pipeline's own sampler


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_noise_is_the_pipelines_own_sampler(family):
    model, pipeline = load(family, train="full"), plain(saved(family))
    policy = zero_noise(model, tiny.GUIDANCE[family], model.native_grid(K))
    x0 = policy.sample(model.encode(Context(PROMPTS)), noises(PROMPTS)).x0
    assert_same_latents(x0, native(pipeline, family, model))


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_is_the_pipelines_own_tail(family):
    model, pipeline = learner(family), plain(saved(family))
    latents, theirs = native(pipeline, family, model), native(pipeline, family, model, "pt")
    counted = model.evaluations
    ours = model.decode(latents)
    assert model.evaluations == counted
    assert ours.dtype == torch.float32
    assert ours.shape[1:] == (
        (3, 32, 32) if ours.ndim == 4 else (ours.shape[1], 3, *ours.shape[3:])
    )
    assert float(ours.min()) >= 0
    assert float(ours.max()) <= 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        model.decode(latents[1:]), ours[1:], rtol=0, atol=1e-5
    )  # another batch is rounded otherwise


def test_decode_in_chunks(monkeypatch):
    model = learner("sd3")
    latents = torch.randn(5, *model.event_shape)
    whole = model.decode(latents)
    monkeypatch.setattr("genpolicy.models._diffusers_vae.DECODED_ELEMENTS", 2 * latents[0].numel())
    torch.testing.assert_close(model.decode(latents), whole, rtol=0, atol=5e-6)


def test_decoding_noise_does_not_depend_on_the_split(tmp_path):
    pipeline = tiny.ltx()
    pipeline.vae = type(pipeline.vae).from_config(
        pipeline.vae.config, timestep_conditioning=True, decoder_inject_noise=(False,) * 5
    )
    pipeline.save_pretrained(tmp_path)
    model = load("ltx", tmp_path, call={**tiny.CALL["ltx"], "decode_timestep": 0.1})
    latents = torch.randn(1, *model.event_shape).repeat(2, 1, 1)
    both = model.decode(latents)
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_grid_is_real_steps(family):
    model = learner(family)
    grid, own = model.grid(K), model.native_grid(K)
    assert grid.dtype == torch.float64
    assert len(grid) == len(own) == K + 1
    assert float(grid[-1]) == 0
    assert bool((grid.diff() < 0).all())
    if family not in FLOWS:
        assert torch.equal(grid, own)
        return
    assert float(grid[0]) == 1
    if family in (
        "flux",
        "ltx",
    ):  # these pipelines pass K real sigmas and a shift for their resolution
        torch.testing.assert_close(grid, own, rtol=0, atol=1e-6)
        assert model.schedule.shift != 1
    else:  # diffusers' own last step there moves by next to nothing
        assert float(own[-2]) < 0.05
        assert float(grid[-2]) > 0.2


def test_clipping_is_ddims_own(tmp_path):
    pipeline = tiny.build("sdxl")
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=True, clip_sample_range=0.5
    )
    pipeline.save_pretrained(tmp_path)
    model = load("sdxl", tmp_path)
    x0 = (
        zero_noise(model, 1.0, model.native_grid(K))
        .sample(model.encode(Context(PROMPTS)), noises(PROMPTS))
        .x0
    )
    assert_same_latents(x0, native(plain(tmp_path), "sdxl", model, guidance_scale=1.0))
    unclipped = load("sdxl")
    other = (
        zero_noise(unclipped, 1.0, model.native_grid(K))
        .sample(unclipped.encode(Context(PROMPTS)), noises(PROMPTS))
        .x0
    )
    assert (other - x0).abs().max() > 0.1


def test_clipping_is_ddims_own_under_guidance(tmp_path):
    """What is guided is clipped: clipping each branch before the guidance is another sampler."""
    pipeline = tiny.build("sdxl")
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=True, clip_sample_range=0.5
    )
    pipeline.save_pretrained(tmp_path)
    model = load("sdxl", tmp_path)
    grid, condition = model.native_grid(K), model.encode(Context(PROMPTS))
    policy = zero_noise(model, 4.0, grid)
    theirs = native(plain(tmp_path), "sdxl", model, guidance_scale=4.0)
    assert_same_latents(policy.sample(condition, noises(PROMPTS)).x0, theirs, 1e-4)
    # control
    clipped = ClipX0(model.denoise, model.schedule, *model.clip)
    wrong = Guidance(clipped, model.negative, 4.0)
    other = policy.chain.sample(wrong, condition, noises(PROMPTS), model.event_shape)
    assert (other.x0 - theirs).abs().max() > 0.1


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_a_guided_step_is_the_clipping_schedulers_own(name, tmp_path):
    """The clipped x0, and the mean of the step with its noise, of diffusers' own step function on
    the guided output of the network.
    """
    pipeline = tiny.build("sdxl")
    kind = getattr(diffusers, name)
    pipeline.scheduler = kind.from_config(
        pipeline.scheduler.config, clip_sample=True, clip_sample_range=0.5
    )
    pipeline.save_pretrained(tmp_path)
    model = load("sdxl", tmp_path)
    condition = model.encode(Context(PROMPTS))
    policy = ChainPolicy(model, Chain(model.schedule, model.native_grid(K), DDIM(1.0)), 4.0)
    x, k = noises(PROMPTS)(PRIOR, model.event_shape), 1
    t = policy.chain.grid[k].expand(2)
    with torch.no_grad():
        ours = policy.denoiser(x, t, condition)
        positive, negative = (
            model.denoise(x, t, c).eps for c in (condition, model.negative(condition))
        )
        # unclipped ahead of the scheduler: their epsilon is ours
        scheduler = model.pipeline.scheduler
        scheduler.set_timesteps(K)
        level = scheduler.timesteps[k]
        guided = negative + 4.0 * (positive - negative)
        extra = {"eta": 1.0} if name == "DDIMScheduler" else {}
        theirs = scheduler.step(
            guided, level, x, generator=torch.Generator().manual_seed(0), **extra
        )
        # the noise that it has drawn
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        gaussian = policy.chain.coefficients(k).gaussian(x, ours)
    assert (theirs.pred_original_sample.abs() == 0.5).any()
    torch.testing.assert_close(ours.x0, theirs.pred_original_sample, rtol=0, atol=1e-5)
    torch.testing.assert_close(gaussian.sample(drawn), theirs.prev_sample, rtol=0, atol=1e-4)


# Replay


@pytest.mark.parametrize(
    ("family", "i"), [(f, i) for f in FAMILIES for i in range(len(kernels(f)))]
)
def test_replay_is_exact(family, i):
    model, kernel = learner(family), kernels(family)[i]
    guidance = tiny.GUIDANCE[family] if family != "flux" else 2.0
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(K), kernel), guidance)
    condition = model.encode(Context(GROUPED))
    trajectory = policy.sample(condition, noises(GROUPED, 2), branch_at=0, members=2)
    assert trajectory.shared == 2
    assert list(trajectory.steps) == [0, 1, 2]
    with torch.no_grad():
        assert deviation(policy, trajectory) <= 1e-6
        assert split_deviation(policy, trajectory, 2) <= 1e-5
    with torch.enable_grad():
        assert deviation(policy, trajectory) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_is_exact_in_a_window_unguided_and_row_by_row(family):
    model = learner(family)
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(K), DDIM(1.0), window=(1, 3)))
    trajectory = policy.sample(model.encode(Context(GROUPED)), noises(GROUPED, 2))
    assert list(trajectory.steps) == [1, 2]
    assert deviation(policy, trajectory) <= 1e-6
    assert split_deviation(policy, trajectory, 1) <= 1e-5


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_replay_is_exact_from_rounded_storage(family, storage):
    model = learner(family)
    policy = ChainPolicy(
        model, Chain(model.schedule, model.grid(K), DDIM(1.0)), tiny.GUIDANCE[family]
    )
    trajectory = policy.sample(model.encode(Context(PROMPTS)), noises(PROMPTS), storage=storage)
    assert torch.equal(trajectory.x, trajectory.x.to(storage).float())
    assert deviation(policy, trajectory) <= 1e-6
    exact = policy.sample(model.encode(Context(PROMPTS)), noises(PROMPTS))
    rounded_after_scoring = replace(exact, x=exact.x.to(storage).float())
    worst = max(  # what acted scored what it drew; what is stored is something else
        float(
            (
                policy.transition(rounded_after_scoring, k).log_prob(
                    rounded_after_scoring.after(k), reduce="mean"
                )
                - exact.acted(k).log_prob(exact.after(k), reduce="mean")
            )
            .abs()
            .max()
        )
        for k in exact.steps
    )
    assert worst > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_is_exact_with_a_bf16_network(family):
    model = learner(family, "bf16")
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    frozen = [p for p in model.denoiser.parameters() if not p.requires_grad]
    assert torch.bfloat16 in {p.dtype for p in frozen}
    policy = ChainPolicy(
        model, Chain(model.schedule, model.grid(K), DDIM(1.0)), tiny.GUIDANCE[family]
    )
    trajectory = policy.sample(model.encode(Context(PROMPTS)), noises(PROMPTS))
    assert trajectory.x.dtype == trajectory.mean.dtype == torch.float32
    assert trajectory.x0.isfinite().all()
    assert deviation(policy, trajectory) <= 1e-6
    fp32 = ChainPolicy(learner(family), policy.chain, tiny.GUIDANCE[family])
    close = fp32.sample(fp32.model.encode(Context(PROMPTS)), noises(PROMPTS)).x0
    assert (trajectory.x0 - close).abs().mean() < 0.1 * close.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_parameter_at_every_step(family):
    model = learner(family)
    policy = ChainPolicy(
        model, Chain(model.schedule, model.grid(K), DDIM(1.0)), tiny.GUIDANCE[family]
    )
    trajectory = policy.sample(model.encode(Context(PROMPTS)), noises(PROMPTS))
    parameters = model.trainable()
    dead = {name for name in parameters if name.startswith(DEAD.get(family, ("-",)))}
    for k in trajectory.steps:
        loss = policy.transition(trajectory, k).log_prob(trajectory.after(k), reduce="mean").sum()
        gradients = dict(
            zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
        )
        assert {name for name, g in gradients.items() if not bool((g != 0).any())} == dead
        assert all(bool(g.isfinite().all()) for g in gradients.values())


SCENES = (  # guidance, window, branch_at, storage
    (1.0, None, None, torch.float32),
    (3.0, None, 0, torch.bfloat16),
    (3.0, (1, 3), 1, torch.float32),
    (1.0, (1, 3), 0, torch.float16),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "precision"), [("lora", "fp32"), ("lora", "fp16"), ("full", "fp32"), ("full", "bf16")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_grid(family, train, precision):
    model = load(family, train=train, precision=precision)
    if train == "lora":
        stir(model)
    condition, noise = model.encode(Context(GROUPED)), noises(GROUPED, 2)
    for kernel in kernels(family):
        for guidance, window, branch_at, storage in SCENES:
            policy = ChainPolicy(
                model, Chain(model.schedule, model.grid(K), kernel, window), guidance
            )
            trajectory = policy.sample(
                condition, noise, branch_at=branch_at, members=2, storage=storage
            )
            case = (kernel, guidance, window, branch_at, storage)
            assert deviation(policy, trajectory) <= 1e-6, case
            if precision == "fp32":
                assert split_deviation(policy, trajectory, 2) <= 1e-5, case


# A time per row


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_times_are_one_call(family):
    model = learner(family)
    times = model.grid(K)[[1, 3, 2]]
    x, condition = torch.randn(3, *model.event_shape), model.encode(Context([*PROMPTS, PROMPTS[0]]))
    with torch.no_grad():
        model.denoise(x, times, condition)  # the first such call tries it out, uncounted
        forwards = []
        handle = model.denoiser.register_forward_hook(lambda *_: forwards.append(1))
        before = model.evaluations
        together = model.denoise(x, times, condition)
        handle.remove()
        assert (model.evaluations - before, len(forwards)) == (3, 1)
        alone = [
            model.denoise(x[i : i + 1], times[i : i + 1], condition[i : i + 1]) for i in range(3)
        ]
    for name in ("x0", "eps"):
        expected = torch.cat([getattr(p, name) for p in alone])
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-5, atol=1e-5)
    same = model.denoise(x, times[:1].expand(3), condition)
    assert not torch.allclose(same.x0[1], together.x0[1])  # the times were read


@pytest.mark.parametrize("option", ["boundary_ratio", "expand_timesteps"])
def test_families_that_read_one_time_are_grouped(option, tmp_path):
    two = {"boundary_ratio": 0.5, "transformer_2": tiny.wan_transformer()}
    tiny.wan(**(two if option == "boundary_ratio" else {"expand_timesteps": True})).save_pretrained(
        tmp_path
    )
    model = load("wan", tmp_path)
    times = torch.tensor([0.9, 0.2, 0.9, 0.3], dtype=torch.float64)
    x, condition = torch.randn(4, *model.event_shape), model.encode(Context(GROUPED))
    forwards = []
    with torch.no_grad():
        model.denoise(x, times, condition)
        for part in (model.pipeline.transformer, model.pipeline.transformer_2):
            if part is not None:
                part.register_forward_hook(lambda *_: forwards.append(1))
        before = model.evaluations
        together = model.denoise(x, times, condition)
        assert (model.evaluations - before, len(forwards)) == (4, 3)
        alone = [
            model.denoise(x[i : i + 1], times[i : i + 1], condition[i : i + 1]).x0 for i in range(4)
        ]
    torch.testing.assert_close(together.x0, torch.cat(alone), rtol=1e-5, atol=1e-5)


# LoRA and full files


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_lora_is_the_same_policy_in_plain_diffusers(family, tmp_path):
    model = learner(family)
    policy = zero_noise(model, tiny.GUIDANCE[family], model.native_grid(K))
    x0 = policy.sample(model.encode(Context(PROMPTS)), noises(PROMPTS)).x0
    model.save(tmp_path)
    fresh = plain(saved(family))
    base = native(fresh, family, model)
    fresh.load_lora_weights(tmp_path, weight_name=WEIGHTS)
    assert_same_latents(x0, native(fresh, family, model))
    assert (x0 - base).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_loras_tensors_alone_are_the_same_policy(family, tmp_path):
    """Its dict says no alpha, and who reads it (ComfyUI too) takes alpha/rank for 1."""
    model = learner(family)
    x0 = native_policy(model, family)
    model.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    fresh = plain(saved(family))
    fresh.load_lora_weights(dict(tensors))
    assert_same_latents(x0, native(fresh, family, model))
    # control: as B was written before, without alpha/rank
    up = ("lora_B.weight", "lora.up.weight")
    weaker = {n: v / 2 if n.endswith(up) else v for n, v in tensors.items()}
    other = plain(saved(family))
    other.load_lora_weights(weaker)
    assert (x0 - native(other, family, model)).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("alpha", [8.0, 3.0])
def test_a_saved_lora_goes_on_as_it_was(family, alpha, tmp_path):
    """The policy, and what a step of its parameters changes, whatever alpha/rank it has."""
    model = stir(load(family, lora={"rank": 4, "alpha": alpha}))
    model.save(tmp_path)
    again = load(family, lora={"start": str(tmp_path)})
    for (name, one), other in zip(
        model.trainable().items(), again.trainable().values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0, msg=name)
    if alpha == 8.0:  # a power of two of the rank: to the bit
        pairs = zip(model.trainable().values(), again.trainable().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    x0, other = native_policy(model, family), native_policy(again, family)
    torch.testing.assert_close(x0, other, rtol=1e-4, atol=1e-5)
    again.save(tmp_path / "twice")
    first, second = (load_file(f / WEIGHTS) for f in (tmp_path, tmp_path / "twice"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[n], second[n], rtol=1e-6, atol=0) for n in first)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_lora_saved_before_alpha_was_folded_still_loads(family, tmp_path):
    model = learner(family)
    written_as_before(model, tmp_path)
    again = load(family, lora={"start": str(tmp_path)})
    assert torch.equal(native_policy(again, family), native_policy(model, family))


def test_a_lora_starts_in_fp32_whatever_the_network_runs_in(tmp_path):
    model = learner("sd3")
    model.save(tmp_path)
    again = load("sd3", precision="bf16", lora={"start": str(tmp_path)})
    for name, parameter in again.trainable().items():
        assert torch.equal(parameter, model.trainable()[name]), name
    rounded = [p.bfloat16().float() for p in model.trainable().values()]
    assert any(not torch.equal(*p) for p in zip(rounded, again.trainable().values(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_starts_from_the_users_lora(family, tmp_path):
    first = learner(family)
    first.save(tmp_path)
    for start in (tmp_path, tmp_path / WEIGHTS):
        model = load(
            family, lora={"rank": 2, "alpha": 1.0, "start": str(start)}
        )  # rank, alpha are the file's
        assert list(model.trainable()) == list(first.trainable())
        for name, parameter in model.trainable().items():
            assert torch.equal(parameter, first.trainable()[name]), name
    x, t = torch.randn(2, *model.event_shape), model.grid(K)[1].expand(2)
    with torch.no_grad():
        started = model.denoise(x, t, model.encode(Context(PROMPTS)))
        expected = first.denoise(x, t, first.encode(Context(PROMPTS)))
        assert torch.equal(started.x0, expected.x0)
        model.denoiser.disable_adapters()
        assert not torch.allclose(
            model.denoise(x, t, model.encode(Context(PROMPTS))).x0, started.x0
        )


def test_a_fresh_lora_starts_the_same_whatever_was_drawn_before():
    starts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        starts.append(load("sd3").trainable())
        assert torch.initial_seed() == seed
    assert all(torch.equal(p, starts[1][name]) for name, p in starts[0].items())
    assert any(bool((p != 0).any()) for p in starts[0].values())


def test_a_reference_is_other_values_in_the_same_parameters():
    model = learner("sd3")
    parameters = list(model.trainable().values())
    x, t, condition = (
        torch.randn(2, *model.event_shape),
        model.grid(K)[1].expand(2),
        model.encode(Context(PROMPTS)),
    )
    with torch.no_grad():
        policy = model.denoise(x, t, condition).x0
        with swapped(parameters, [torch.zeros_like(p) for p in parameters]):
            base = model.denoise(x, t, condition).x0
        model.denoiser.disable_adapters()
        torch.testing.assert_close(base, model.denoise(x, t, condition).x0)
        model.denoiser.enable_adapters()
        assert torch.equal(policy, model.denoise(x, t, condition).x0)
        assert not torch.allclose(policy, base)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_saves_a_whole_pipeline(family, tmp_path):
    model = load(family, train="full")
    assert set(model.trainable()) == {name for name, _ in model.denoiser.named_parameters()}
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.mul_(1.01)
    x0 = (
        zero_noise(model, 1.0, model.native_grid(K))
        .sample(model.encode(Context(PROMPTS)), noises(PROMPTS))
        .x0
    )
    model.save(tmp_path)
    again = plain(tmp_path)
    assert type(again) is type(plain(saved(family)))
    assert again.scheduler.config == plain(saved(family)).scheduler.config
    more = {} if family == "flux" else {"guidance_scale": 1.0}
    assert_same_latents(x0, native(again, family, model, **more))


def test_full_keeps_master_weights_in_fp32():
    model = load("sd3", train="full", precision="bf16")
    exact = load("sd3", train="full")
    assert {p.dtype for p in model.pipeline.text_encoder.parameters()} == {torch.bfloat16}
    for name, parameter in model.trainable().items():
        assert torch.equal(parameter, exact.trainable()[name])


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = stir(load("sd3", gradient_checkpointing=checkpointing))
        assert not any(module.training for module in model.denoiser.modules())
        x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0))
        loss = (
            model.denoise(x, model.grid(K)[1].expand(2), model.encode(Context(PROMPTS)))
            .x0.square()
            .mean()
        )
        gradients.append(torch.autograd.grad(loss, list(model.trainable().values())))
        assert model.evaluations == 4
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# Schedulers


def replaced(family: str, scheduler: Any, folder: Path) -> Path:
    pipeline = tiny.build(family)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(folder)
    return folder


def test_history_bearing_flow_schedulers_are_replaced(tmp_path, caplog):
    unipc = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    folder = replaced("wan", unipc, tmp_path / "from")
    with caplog.at_level(logging.WARNING):
        model = load("wan", folder, train="full")
    assert [r.getMessage() for r in caplog.records] == [
        "the steps of scheduler UniPCMultistepScheduler can't be scored;"
        " FlowMatchEulerDiscreteScheduler takes its place"
    ]
    same = load("wan")  # the same network with FlowMatchEuler of shift 5 in its folder
    assert torch.equal(model.grid(K), same.grid(K))
    assert model.schedule == same.schedule
    model.save(tmp_path / "to")
    assert type(plain(tmp_path / "to").scheduler).__name__ == "UniPCMultistepScheduler"


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_history_bearing_diffusion_schedulers_become_ddim(name, tmp_path, caplog):
    scheduler = getattr(diffusers, name).from_config(tiny.ddim().config)
    with caplog.at_level(logging.WARNING):
        model = load("sd15", replaced("sd15", scheduler, tmp_path))
    assert (
        f"the steps of scheduler {name} can't be scored; DDIMScheduler takes its place"
        in caplog.text
    )
    same = learner("sd15")
    t = same.grid(K)
    assert torch.equal(model.schedule.alpha(t), same.schedule.alpha(t))


def test_a_markov_scheduler_is_kept_in_silence(caplog):
    with caplog.at_level(logging.WARNING):
        load("cogvideox")
    assert caplog.text == ""


def test_zero_snr_and_snr_shift_come_from_the_schedulers_table():
    schedule = learner("cogvideox").schedule
    assert float(schedule.alpha(torch.ones(1))[0]) == 0
    assert float(schedule.sigma(torch.zeros(1))[0]) == 0
    assert learner("cogvideox").parametrisation == "v_prediction"


# Embeddings and evaluations


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_encoded_once(family, monkeypatch):
    model = load(family)
    calls, own = [], type(model.pipeline).encode_prompt

    @functools.wraps(
        own
    )  # its signature says whether the family has a branch of its own for guidance
    def counted(*args, **kwargs):
        calls.append(args)
        return own(*args, **kwargs)

    monkeypatch.setattr(type(model.pipeline), "encode_prompt", counted)
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(K), DDIM(1.0)), guidance=2.0)
    condition = model.encode(Context([*GROUPED, "a green triangle"]))
    assert len(calls) == 1  # three new prompts at once
    trajectory = policy.sample(condition, noises(condition.prompts))
    policy.transition(trajectory, 1)
    model.decode(trajectory.x0)
    assert model.encode(Context(PROMPTS)).prompts == tuple(PROMPTS)
    assert len(calls) == (1 if family == "flux" else 2)  # and the negative, once for all


def test_dropped_embeddings_are_encoded_again(monkeypatch):
    monkeypatch.setattr("genpolicy.models._diffusers_prompts.CACHED_BYTES", 1)
    few, model = load("sd3"), learner("sd3")
    x, t = torch.randn(2, *model.event_shape), model.grid(K)[1].expand(2)
    with (
        torch.no_grad(),
        swapped([*few.trainable().values()], [p.data for p in model.trainable().values()]),
    ):
        ours = few.denoise(x, t, few.encode(Context(PROMPTS))).x0
        assert torch.equal(ours, model.denoise(x, t, model.encode(Context(PROMPTS))).x0)


@pytest.mark.parametrize(
    "rows", [slice(1, 3), torch.tensor([3, 0]), torch.tensor([True, False, False, True])]
)
def test_conditions_are_picked_by_rows(rows):
    condition = learner("sd3").encode(Context(["a", "b", "c", "d"]))
    picked = condition[rows]
    assert len(picked) == 2
    assert learner("sd3").negative(condition)[rows].negative
    expected = [list(condition.prompts)[i] for i in torch.arange(4)[rows].tolist()]
    assert list(picked.prompts) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluations_are_counted(family):
    model = learner(family)
    policy = ChainPolicy(model, Chain(model.schedule, model.grid(K), DDIM(1.0)), guidance=2.0)
    model.evaluations = 0.0
    trajectory = policy.sample(
        model.encode(Context(GROUPED)), noises(GROUPED, 2), branch_at=0, members=2
    )
    assert model.evaluations == 2 * (2 + 3 * 4)  # the shared first step once a group; two branches
    model.evaluations = 0.0
    policy.transition(trajectory, 1)
    assert model.evaluations == 4 * 2 + 4  # differentiated, and the negatives that are not
    model.evaluations = 0.0
    with torch.no_grad():
        policy.transition(trajectory, 0)
    assert model.evaluations == 2 * 2


def test_negative_prompts_and_embedded_guidance_are_read():
    x, t = torch.randn(2, 4, 16, 16), torch.full((2,), 0.502, dtype=torch.float64)
    said = []
    with torch.no_grad():
        for negative in (None, "a green triangle"):
            model = load("sdxl", negative_prompt=negative)
            said.append(model.denoise(x, t, model.negative(model.encode(Context(PROMPTS)))).eps)
        positive = model.denoise(x, t, model.encode(Context(["a green triangle"] * 2))).eps
        torch.testing.assert_close(
            said[1], positive
        )  # the negative prompt is a prompt like any other
        assert not torch.allclose(said[0], said[1])
        assert not torch.allclose(
            said[0], model.denoise(x, t, model.encode(Context([""] * 2))).eps
        )  # SDXL's none is zeros
        flux = [load("flux", call={**tiny.CALL["flux"], "guidance_scale": g}) for g in (1.0, 5.0)]
        z = torch.randn(2, *flux[0].event_shape)
        one, other = (m.denoise(z, t, m.encode(Context(PROMPTS))).x0 for m in flux)
        assert not torch.allclose(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_prompt_is_the_familys_own(family):
    """A text is a prompt like any other, and none is what the pipeline itself takes for none."""
    plain_one, guided = plain(saved(family)), {}
    for negative in (None, "a green triangle"):
        model = load(family, train="full", negative_prompt=negative)
        condition = model.encode(Context(PROMPTS))
        policy = zero_noise(model, tiny.GUIDANCE[family], model.native_grid(K))
        guided[negative] = policy.sample(condition, noises(PROMPTS)).x0
        told = {} if negative is None else {"negative_prompt": [negative] * 2}
        theirs = native(plain_one, family, model, **told)
        assert_same_latents(guided[negative], theirs)
        if negative is not None:
            x, t = torch.randn(2, *model.event_shape), model.grid(K)[1].expand(2)
            with torch.no_grad():
                said = model.denoise(x, t, model.negative(condition)).eps
                positive = model.denoise(x, t, model.encode(Context([negative] * 2))).eps
            torch.testing.assert_close(said, positive, rtol=0, atol=1e-5)
    changed = float((guided[None] - guided["a green triangle"]).abs().max())
    assert (changed == 0) == (family == "flux"), "control: the text is read"


@pytest.mark.parametrize("negative", [["a"], ["a", "b"], 3])
def test_a_negative_prompt_that_is_no_text_is_one_sentence(negative):
    with pytest.raises(ValueError, match=r"policy.negative_prompt is .*; it must be one text"):
        load("sd15", negative_prompt=negative)


@pytest.mark.parametrize("negative", [["a"], {"a": "b"}])
def test_a_list_in_a_yaml_is_no_negative_prompt(negative):
    """It was read as the text that Python writes for it."""
    raw = {"name": "diffusers_pipeline", "pretrained": "x", "negative_prompt": negative}
    with pytest.raises(ConfigError, match=r"negative_prompt is .*; it must be text or null"):
        make("models", raw, PERSON)


def test_offload_changes_nothing_but_the_place():
    model, other = stir(load("sd3", offload=True)), learner("sd3")
    policies = [
        ChainPolicy(m, Chain(m.schedule, m.grid(K), DDIM(1.0)), 2.0) for m in (model, other)
    ]
    one, two = (p.sample(p.model.encode(Context(PROMPTS)), noises(PROMPTS)).x0 for p in policies)
    assert torch.equal(one, two)
    assert torch.equal(model.decode(one), other.decode(two))


def test_everything_is_in_eval_mode(tmp_path):
    pipeline = tiny.sd3()
    assert (
        pipeline.text_encoder_3.training
    )  # what diffusers does with models from config, dropout and all
    model = load("sd3", train="full")
    assert not any(m.training for part in model._parts.modules().values() for m in part.modules())


# Errors


def call_of(family: str, **more: Any) -> dict[str, Any]:
    return {"call": {**tiny.CALL[family], **more}}


@pytest.mark.parametrize(
    ("settings", "kind", "sentence"),
    [
        (
            call_of("sd3", heigth=32),
            ValueError,
            "heigth: StableDiffusion3Pipeline has no such argument; the nearest are height",
        ),
        (
            call_of("sd3", num_inference_steps=3),
            ValueError,
            "num_inference_steps can't be set there: it is decided by chain.steps",
        ),
        (
            call_of("sd3", height=31),
            ValueError,
            "does not fit StableDiffusion3Pipeline: `height` and `width`",
        ),
        (call_of("sd3", guidance_scale=4.5), ValueError, "set chain.guidance, not guidance_scale"),
        (
            {"lora": {"targets": ["to_x"]}},
            ValueError,
            "lora.targets .* match no layer of SD3Transformer2DModel",
        ),
        (
            {"lora": {"start": "nowhere"}},
            FileNotFoundError,
            "lora.start nowhere is neither a .safetensors file nor",
        ),
        ({"precision": "fp8"}, ValueError, "policy.precision is 'fp8'; valid are fp32, bf16, fp16"),
        ({"train": "some"}, ValueError, "policy.train is 'some'; valid are 'full', 'lora'"),
    ],
)
def test_wrong_settings_get_one_sentence(settings, kind, sentence):
    with pytest.raises(kind, match=sentence) as caught:
        load("sd3", **settings)
    assert "\n" not in str(caught.value)


def test_what_is_no_pipeline_is_told(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"is no diffusers pipeline: it has no model_index.json"
    ):
        load("sd3", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder, and no hub id"):
        load("sd3", tmp_path / "missing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        OSError, match=r"an-owner/a-name: .* log in with a token .* or give a local folder"
    ):
        DiffusersPipeline("an-owner/a-name")
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "NoSuchPipeline", "_diffusers_version": "0.39.0"}'
    )
    with pytest.raises(ValueError, match=r"names the pipeline 'NoSuchPipeline'"):
        load("sd3", tmp_path)


def test_a_pipeline_that_can_not_be_undecorated_is_refused(monkeypatch):
    decorated = diffusers.StableDiffusion3Pipeline.__call__
    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "__call__", decorated.__wrapped__)
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline can't be run step by step"):
        load("sd3")


def test_a_lora_of_another_family_is_refused(tmp_path):
    learner("sd15").save(tmp_path)
    with pytest.raises(ValueError, match=r"lora.start .* SD3Transformer2DModel"):
        load("sd3", lora={"start": str(tmp_path)})


@pytest.mark.parametrize("family", ["sd15", "sd3", "wan"])
def test_a_lora_of_which_a_part_fits_nothing_is_refused(family, tmp_path):
    learner(family).save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    names = [n.replace("attn", "nowhere") if i % 4 == 0 else n for i, n in enumerate(tensors)]
    save_file(dict(zip(names, tensors.values(), strict=True)), tmp_path / WEIGHTS)
    said = rf"lora.start .* {-(-len(names) // 4)} of its {len(names)} tensors fit no layer.*nowhere"
    with pytest.raises(ValueError, match=said) as caught:
        load(family, lora={"start": str(tmp_path)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("of", "into", "said"),
    [
        ("flux", "sd3", r"tensors fit no layer, the first is single_transformer_blocks"),
        ("ltx", "cogvideox", r"tensors fit no layer, the first is .*attn2"),
        ("cogvideox", "ltx", r"4 of the layers that it says it changes are not in it.*attn2"),
        ("sdxl", "sd15", r"tensors fit no layer, the first is .*\[4, 64\]"),
    ],
)
def test_a_lora_of_a_family_with_some_of_the_names_is_refused(of, into, said, tmp_path):
    learner(of).save(tmp_path)
    with pytest.raises(ValueError, match=said):
        load(into, lora={"start": str(tmp_path)})


def test_a_full_fine_tune_that_names_a_lora_is_refused(tmp_path):
    learner("sd3").save(tmp_path)
    with pytest.raises(ValueError, match=r"lora.start .* policy.train is full, which starts from"):
        load("sd3", train="full", lora={"start": str(tmp_path)})


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"thresholding": True}, "dynamic thresholding"),
        ({"variance": 1}, "networks that also predict a variance"),
    ],
)
def test_what_can_not_be_scored_is_refused(option, sentence, tmp_path):
    pipeline = tiny.build("sd15")
    if "thresholding" in option:
        pipeline.scheduler = tiny.ddim(**option)
    else:
        pipeline.unet = tiny.unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            out_channels=8,
        )
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):  # noqa: PT012
        model = load("sd15", tmp_path)
        model.denoise(
            torch.randn(1, 4, 16, 16),
            torch.full((1,), 0.5, dtype=torch.float64),
            model.encode(Context(["a"])),
        )
