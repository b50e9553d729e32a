"""The LoRA of a UNet under kohya's names, as sd-scripts, ComfyUI and diffusers read it."""

from pathlib import Path

from safetensors.torch import save_file

from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import ControlTask
from genpolicy.formats._folder import fresh, require_free
from genpolicy.formats._plain import require_network_alone
from genpolicy.models._diffusers_lora import kohya as named
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.policy.files import Saved, adapts

FILE = "kohya_lora.safetensors"
"""The file that is written."""


def kohya(
    found: Saved,
    out: Path,
    *,
    data: Dataset | None,
    task: ControlTask | None,
    instruction: str | None,
) -> str:
    """Writes the folder ``out`` with the LoRA's file alone.

    Raises `ConfigError` for a policy without a LoRA, for a LoRA of a transformer, and for a policy
    with parts beside its network.
    """
    if instruction is not None:
        raise ConfigError("--instruction does not apply: a LoRA is given its prompts when it draws")
    if found.policy.get("name") != "diffusers_pipeline" or not adapts(found.policy):
        raise ConfigError(f"{found.where} has no LoRA: what learned is a whole network")
    require_free(out, lambda folder: False)
    policy = found.load()
    require_network_alone(policy, "a LoRA")
    model = policy.model
    assert isinstance(model, DiffusersPipeline)
    if getattr(model.pipeline, "unet", None) is not model.denoiser:
        raise ConfigError(
            f"kohya's names are those of a UNet (SD 1.5, SDXL), and {found.where} changes a"
            f" {type(model.denoiser).__name__}: use --format lora"
        )
    with fresh(out, ours=lambda folder: False) as folder:
        save_file(named(model.denoiser), folder / FILE, {"format": "pt"})
    return f"{out / FILE}"
