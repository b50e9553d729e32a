"""Policies that others have saved: which leaf they are, and the sampler that they come with."""

from pathlib import Path
from typing import Any

from genpolicy.config.documents import json_file
from genpolicy.config.errors import ConfigError

LEAVES = {
    "diffusion": "lerobot_diffusion",
    "smolvla": "lerobot_flow",
    "pi0": "lerobot_flow",
    "pi05": "lerobot_flow",
}
"""The leaf of a LeRobot policy, by the type in its config.json."""
PIPELINE, POLICY = "model_index.json", "config.json"
"""The file of a diffusers pipeline, and that of a LeRobot policy."""


def foreign(where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The policy section and the sampler (keys of `ChainConfig`) of a folder or hub id that is not
    ours.

    A LeRobot policy comes with LeRobot's own sampler; anything else is taken for a diffusers
    pipeline and gets the ODE.
    """
    settings = _settings(where)
    if settings is None:
        return {"name": "diffusers_pipeline", "pretrained": where}, {
            "kernel": {"name": "ddim", "eta": 0.0}
        }
    section = {"name": LEAVES[settings["type"]], "pretrained": where}
    if settings["type"] == "diffusion":
        section["spacing"] = "lerobot"
    return section, _sampler(settings)


def native_sampler(where: str) -> dict[str, Any] | None:
    """LeRobot's own sampler of a saved policy, keys of `ChainConfig`; None where the policy is not
    LeRobot's.
    """
    settings = _settings(where)
    return None if settings is None else _sampler(settings)


def _settings(where: str) -> dict[str, Any] | None:
    """A LeRobot policy's config.json; None where there is none. Raises `ConfigError` for a policy
    that does not denoise.
    """
    folder = Path(where)
    if (folder / PIPELINE).is_file():
        return None
    file = folder / POLICY if folder.is_dir() else _downloaded(where)
    settings = json_file(file) if file is not None and file.is_file() else {}
    if not isinstance(settings, dict) or "type" not in settings:
        return None
    if str(settings["type"]) not in LEAVES:
        raise ConfigError(
            f"{where} is a LeRobot policy of type {settings['type']}; those that denoise,"
            " and can be loaded, are"
            f" {', '.join(LEAVES)}"
        )
    return settings


def _downloaded(where: str) -> Path | None:
    """The config.json of a hub id; what can't be had is left to the leaf to complain about."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(where, POLICY))
    except (
        OSError,
        ValueError,
    ):  # the hub's own errors are OSErrors, those of a missing cache ValueErrors
        return None


def _sampler(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the chain section of a LeRobot policy's own sampler: DDIM with eta 1 for its DDPM,
    the ODE for everything else. DiffusionPolicy takes all its levels unless told otherwise.
    """
    if settings["type"] != "diffusion":
        steps, eta = settings.get("num_steps") or settings.get("num_inference_steps") or 10, 0.0
    else:
        steps = settings.get("num_inference_steps") or settings.get("num_train_timesteps", 100)
        eta = 1.0 if settings.get("noise_scheduler_type", "DDPM") == "DDPM" else 0.0
    return {"steps": steps, "kernel": {"name": "ddim", "eta": eta}}
