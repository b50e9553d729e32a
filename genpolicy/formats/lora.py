"""The LoRA of a policy that draws, alone, as diffusers' load_lora_weights reads it."""

from pathlib import Path

from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import ControlTask
from genpolicy.formats._folder import fresh
from genpolicy.models._diffusers_lora import WEIGHTS
from genpolicy.policy.files import Saved, adapts


def lora(
    found: Saved,
    out: Path,
    *,
    data: Dataset | None,
    task: ControlTask | None,
    instruction: str | None,
) -> str:
    """Writes the folder ``out`` with the LoRA's file alone.

    Raises `ConfigError` for a policy without a LoRA, and for one with parts beside its network.
    """
    if instruction is not None:
        raise ConfigError("--instruction does not apply: a LoRA is given its prompts when it draws")
    if found.policy.get("name") != "diffusers_pipeline" or not adapts(found.policy):
        raise ConfigError(
            f"{found.where} has no LoRA: what learned is a whole network; --format diffusers is"
            " for one that draws, and --format onnx for policies that act"
        )
    policy = found.load()
    if policy.parts:
        raise ConfigError(f"a LoRA can't carry the policy's part {next(iter(policy.parts))!r}")
    # a LoRA says of itself nothing by which another person's could be told from it
    with fresh(out, ours=lambda folder: False) as folder:
        policy.model.save(folder)
    return f"{out / WEIGHTS}"
