"""Any policy that acts, with its whole sampler, as a LeRobot policy of our type genpolicy."""

import json
from pathlib import Path
from typing import Any

from genpolicy.config.documents import json_file
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.model import ControlModel
from genpolicy.contracts.task import ControlTask
from genpolicy.formats._folder import fresh, require_free
from genpolicy.models import _lerobot as theirs
from genpolicy.policy.files import Saved, save_policy

TYPE = "genpolicy"
"""The type of policy that robots/lerobot_policy_genpolicy registers."""
POLICY = "policy"
"""The folder inside, which genpolicy itself loads."""


def lerobot_plugin(
    found: Saved,
    out: Path,
    *,
    data: Dataset | None,
    task: ControlTask | None,
    instruction: str | None,
) -> str:
    """Writes the folder ``out``: the policy as genpolicy saves it, and beside it the configuration
    and the processors by which LeRobot finds our plugin's class and hands it what is seen.

    Raises `ConfigError` for a policy that draws.
    """
    if not found.acts:
        raise ConfigError(f"{found.where} draws, and LeRobot runs policies that act")
    if instruction is not None:
        raise ConfigError("--instruction does not apply: LeRobot gives its policies their task")
    require_free(out, is_plugin)
    policy = found.load()
    model: ControlModel = policy.model  # type: ignore[assignment]  # it acts
    section = {key: value for key, value in found.policy.items() if key != "pretrained"}
    with fresh(out, is_plugin) as folder:
        save_policy(policy, section, found.sampler, folder / POLICY)
        config = {
            "type": TYPE,
            "n_obs_steps": model.history,
            "device": model.device.type,
            **_features(model),
        }
        text = json.dumps(config, indent=1) + "\n"
        (folder / theirs.CONFIG).write_text(text, encoding="utf-8")
        _write_processors(folder, model.device.type)
    return f"{out}: a LeRobot policy of type {TYPE}, for LeRobot with lerobot_policy_genpolicy"


def is_plugin(folder: Path) -> bool:
    """True for the folder of such an export."""
    file = folder / theirs.CONFIG
    document = json_file(file) if file.is_file() else None
    return isinstance(document, dict) and document.get("type") == TYPE


def _features(model: ControlModel) -> dict[str, Any]:
    """LeRobot's description of what the policy sees and does, as its config.json has it."""
    shapes = {**model.shapes, "action": (model.action_dim,)}
    with theirs.lerobot():
        every = theirs.features(shapes, shapes)
    said = {
        name: {"type": feature.type.value, "shape": list(feature.shape)}
        for name, feature in every.items()
    }
    return {"output_features": {"action": said.pop("action")}, "input_features": said}


def _write_processors(folder: Path, device: str) -> None:
    """Writes processors that change no value: the policy normalises by itself."""
    with theirs.lerobot():
        from lerobot.processor import (
            AddBatchDimensionProcessorStep,
            DeviceProcessorStep,
            PolicyProcessorPipeline,
            RenameObservationsProcessorStep,
        )

        before = [
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            DeviceProcessorStep(device=device),
        ]
        after = [DeviceProcessorStep(device="cpu")]
        for steps, file in ((before, theirs.PREPROCESSOR), (after, theirs.POSTPROCESSOR)):
            PolicyProcessorPipeline(steps=steps, name=Path(file).stem).save_pretrained(folder)
