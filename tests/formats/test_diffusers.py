"""Plain diffusers draws our picture from an exported pipeline, and from a LoRA of kohya's names."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete, scheduling_lcm
from safetensors.torch import load_file, save_file
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.chain.noise import PRIOR
from genpolicy.cli.main import main
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.task import Context
from genpolicy.formats.diffusers import diffusers
from genpolicy.formats.kohya import FILE, kohya
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.policy.files import load, save_policy, saved
from genpolicy.policy.sampler import make_policy
from tests import tiny

torch.set_num_threads(1)

PROMPTS = ["a red circle", "a blue square above a circle"]
NOISE = Noise.rows(3, 0, torch.arange(len(PROMPTS)), 1)
ODE, CONSISTENCY = {"name": "ddim", "eta": 0.0}, {"name": "consistency"}
LCM = {"kernel": {"name": "consistency", "scaling": 10.0}, "start": 1.0}
NOTHING: dict[str, Any] = {"data": None, "task": None, "instruction": None}


def policy(
    folder: Path, family: str, sampler: dict[str, Any], lora: bool = False, **more: Any
) -> Path:
    """A saved policy on a tiny pipeline, whose weights have moved as if it had learned."""
    tiny.build(family).save_pretrained(folder / "base")
    section = {"pretrained": str(folder / "base"), "device": "cpu", "call": tiny.CALL[family]}
    section |= {"train": "lora", "lora": {"rank": 2, "alpha": 6}} if lora else {"train": "full"}
    section |= more
    model = DiffusersPipeline(**section)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable().values():
            moved = 0.1 if lora else 0.02
            parameter += moved * torch.randn(parameter.shape, generator=generator)
    chain = ChainConfig(**sampler)
    section = {"name": "diffusers_pipeline", **section}
    save_policy(make_policy(model, chain), section, chain, folder / "policy")
    return folder / "policy"


def drawn(folder: Path) -> tuple[Tensor, Tensor]:
    """Our picture, and the noise that it began from."""
    ours = load(folder)
    picture = ours.sample(ours.model.encode(Context(PROMPTS)), NOISE, keep=(0, 0)).x0
    return picture, NOISE(PRIOR, ours.model.event_shape)


def told(said: str, latents: Tensor) -> Tensor:
    """The latents that the code of a card, or of what was printed, draws."""
    lines = re.search(r"```python\n(.*)\n```", said, re.DOTALL)[1]
    lines = lines.replace(
        'pipe("..."', "found = pipe(prompts, latents=latents, output_type='latent'"
    )
    names: dict[str, Any] = {"prompts": PROMPTS, "latents": latents}
    exec(lines, names)
    return names["found"]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def handed(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Has a scheduler put back the noise of our chain, step by step."""
    steps = iter(range(1000))
    monkeypatch.setattr(
        module, "randn_tensor", lambda shape, **_: NOISE(next(steps), tuple(shape[1:]))
    )


CASES = [
    ("sd15", True, {"steps": 4, "kernel": ODE, "guidance": 3.0}),
    ("sd15", False, {"steps": 4, "kernel": ODE, "guidance": 3.0, "start": 1.0}),
    ("sd15", True, {"steps": 2, **LCM}),
    ("sdxl", True, {"steps": 4, "kernel": ODE, "guidance": 3.0}),
    ("sd3", True, {"steps": 3, "kernel": ODE, "guidance": 3.0}),
    ("sd3", False, {"steps": 3, "kernel": ODE, "grid": "native"}),
    ("sd3", True, {"steps": 2, "kernel": CONSISTENCY}),
    ("flux", True, {"steps": 3, "kernel": ODE}),
    ("wan", False, {"steps": 3, "kernel": ODE, "grid": "native", "guidance": 4.0}),
    ("ltx", True, {"steps": 3, "kernel": ODE, "guidance": 3.0}),
    ("cogvideox", False, {"steps": 4, "kernel": ODE, "guidance": 6.0}),
]


@pytest.mark.parametrize(("family", "lora", "sampler"), CASES, ids=str)
def test_plain_diffusers_draws_our_picture_from_the_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    lora: bool,
    sampler: dict[str, Any],
) -> None:
    folder = policy(tmp_path, family, sampler, lora)
    said = diffusers(saved(folder), tmp_path / "out", **NOTHING)
    handed(monkeypatch, scheduling_flow_match_euler_discrete)
    handed(monkeypatch, scheduling_lcm)
    ours, start = drawn(folder)
    assert apart(told(said, start), ours) < 2e-5
    card = (tmp_path / "out/README.md").read_text().replace("FOLDER", str(tmp_path / "out"))
    handed(monkeypatch, scheduling_flow_match_euler_discrete)
    handed(monkeypatch, scheduling_lcm)
    assert apart(told(card, start), ours) < 2e-5
    # control: the weights that it began with
    name = "unet" if hasattr(DiffusionPipeline.from_pretrained(tmp_path / "out"), "unet") else ""
    name = name or "transformer"
    base = DiffusionPipeline.from_pretrained(tmp_path / "base")
    getattr(base, name).save_pretrained(tmp_path / "out" / name)
    assert apart(told(said, start), ours) > 1e-2


def test_a_whole_pipeline_has_no_trace_of_the_lora(tmp_path: Path) -> None:
    folder = policy(tmp_path, "sd15", {"steps": 4, "kernel": ODE}, lora=True, precision="bf16")
    diffusers(saved(folder), tmp_path / "out", **NOTHING)
    files = (
        tmp_path / name / "unet/diffusion_pytorch_model.safetensors" for name in ("out", "base")
    )
    whole, base = (load_file(file) for file in files)
    assert whole.keys() == base.keys()
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert sorted(name for name in whole if not torch.equal(whole[name], base[name]))


@pytest.mark.parametrize(
    ("family", "lora", "sampler", "said"),
    [
        ("sd15", True, {"kernel": {**ODE, "eta": 1.0}}, "neither the ODE nor a consistency"),
        ("sd15", True, {"kernel": {"name": "heun"}}, "neither the ODE nor a consistency"),
        ("sd15", True, {"kernel": ODE, "start": 1.0, "steps": 3}, "can't be asked for 3 steps"),
        ("sd15", True, {"kernel": ODE, "guidance": 0.5}, "no argument for it that guides so"),
        ("flux", True, {"kernel": ODE, "guidance": 2.0}, "no argument for it that guides so"),
        (
            "sd15",
            True,
            {"kernel": ODE, "guidance": 3.0, "guidance_interval": (0.1, 0.9)},
            "guide all of them",
        ),
        ("sd3", True, {"kernel": ODE, "start": 0.5}, "starts with standard normal noise"),
        ("wan", False, {"kernel": ODE}, "can't be asked for 4 steps"),
    ],
    ids=str,
)
def test_a_sampler_that_diffusers_has_not_is_refused(
    tmp_path: Path, family: str, lora: bool, sampler: dict[str, Any], said: str
) -> None:
    folder = policy(tmp_path, family, {"steps": 4, **sampler}, lora)
    with pytest.raises(ConfigError, match=said):
        diffusers(saved(folder), tmp_path / "out", **NOTHING)
    assert not (tmp_path / "out").exists()


def test_a_step_of_ddim_goes_down_by_whole_levels_and_is_no_other(tmp_path: Path) -> None:
    """The refusal of three steps from the top is right: told so all the same, diffusers draws
    another picture.
    """
    folder = policy(tmp_path, "sd15", {"steps": 3, "kernel": ODE, "start": 1.0})
    ours, start = drawn(folder)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    found = pipe(
        PROMPTS,
        latents=start,
        output_type="latent",
        num_inference_steps=3,
        guidance_scale=1.0,
        **tiny.CALL["sd15"],
    )[0]
    assert apart(found, ours) > 1e-4


# -- kohya -----------------------------------------------------------------------------------------


def kohya_picture(folder: Path, family: str, base: Path, latents: Tensor) -> Tensor:
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(folder, weight_name=FILE)
    return pipe(
        PROMPTS,
        latents=latents,
        output_type="latent",
        num_inference_steps=4,
        guidance_scale=1.0,
        **tiny.CALL[family],
    )[0]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_draws_our_picture_with_kohyas_file(tmp_path: Path, family: str) -> None:
    folder = policy(tmp_path, family, {"steps": 4, "kernel": ODE}, lora=True)
    said = kohya(saved(folder), tmp_path / "out", **NOTHING)
    assert said == str(tmp_path / "out" / FILE)
    written = load_file(tmp_path / "out" / FILE)
    alphas = {name for name in written if name.endswith(".alpha")}
    assert all(name.startswith("lora_unet_") for name in written)
    assert {float(written[name]) for name in alphas} == {6.0}  # as it learned, at rank 2
    assert len(written) == 3 * len(alphas)
    ours, latents = drawn(folder)
    assert apart(kohya_picture(tmp_path / "out", family, tmp_path / "base", latents), ours) < 2e-5
    # control: with alpha taken for the rank it is a third of the change
    wrong = {name: torch.tensor(2.0) if name in alphas else v for name, v in written.items()}
    save_file(wrong, tmp_path / "out" / FILE)
    assert apart(kohya_picture(tmp_path / "out", family, tmp_path / "base", latents), ours) > 1e-2


def test_a_lora_of_a_transformer_has_no_names_of_kohyas(tmp_path: Path) -> None:
    folder = policy(tmp_path, "sd3", {"steps": 2, "kernel": ODE}, lora=True)
    with pytest.raises(ConfigError, match="changes a SD3Transformer2DModel: use --format lora"):
        kohya(saved(folder), tmp_path / "out", **NOTHING)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["diffusers", "kohya"])
def test_a_policy_that_acts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = ["export", "assets/assembly-clone", "--format", name, "--out", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert ("is no pipeline of diffusers" if name == "diffusers" else "has no LoRA") in said
    assert list(tmp_path.iterdir()) == []
