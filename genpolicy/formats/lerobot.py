"""A LeRobot policy as LeRobot's own tools load it, and run it with its own sampler."""

from pathlib import Path
from typing import Any

import torch

from genpolicy.chain import DDIM
from genpolicy.config.errors import ConfigError, shown
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import ControlTask
from genpolicy.formats._folder import fresh, require_free
from genpolicy.formats._plain import require_network_alone, takes_steps_of
from genpolicy.policy.files import Saved
from genpolicy.policy.policy import ChainPolicy

SAMPLERS = {"DDIM": DDIM(0.0), "DDPM": DDIM(1.0)}
"""The steps of LeRobot's DiffusionPolicy, by its setting noise_scheduler_type."""
ODE = "--sampler kernel.name=ddim kernel.eta=0"
"""The words that ask for the ODE, which LeRobot has."""


def lerobot(
    found: Saved,
    out: Path,
    *,
    data: Dataset | None,
    task: ControlTask | None,
    instruction: str | None,
) -> str:
    """Writes the folder ``out``, whose configuration asks LeRobot for the deployed sampler.

    Raises `ConfigError` for a policy that is none of LeRobot's classes, one with parts beside its
    network, and one whose sampler is none of LeRobot's.
    """
    settings_of = {"lerobot_diffusion": _diffusion, "lerobot_flow": _flow}.get(
        str(found.policy.get("name"))
    )
    if settings_of is None:
        raise ConfigError(
            f"LeRobot has no class for a policy {shown(found.policy.get('name'))}: export a policy"
            " that acts with --format lerobot_plugin, or onnx"
        )
    if instruction is not None:
        raise ConfigError("--instruction does not apply: LeRobot gives its policies their task")
    require_free(out, lambda folder: False)
    policy = found.load()
    require_network_alone(policy, "a LeRobot policy")
    if policy.warm is not None:
        raise ConfigError(
            "chain.warm begins a decision from the plan before it, and LeRobot begins each from"
            " noise: export with --sampler warm=null, or with --format lerobot_plugin"
        )
    settings: dict[str, Any] = {
        **settings_of(policy),
        "n_action_steps": policy.execute or policy.model.executed,  # type: ignore[attr-defined]
    }
    config = policy.model.policy.config  # type: ignore[attr-defined]  # it is one of LeRobot's
    for name, value in settings.items():
        setattr(config, name, value)
    # nothing in a LeRobot folder says whose it is
    with fresh(out, ours=lambda folder: False) as folder:
        policy.model.save(folder)
    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{out}: a LeRobot policy of type {config.type} with {said}"


def _diffusion(policy: ChainPolicy) -> dict[str, Any]:
    """The sampler of a DiffusionPolicy as its settings; `ConfigError` where it has none such."""
    chain, model = policy.chain, policy.model
    native = model.native_grid(chain.K)
    if not torch.equal(chain.grid, native):
        raise ConfigError(
            f"LeRobot takes {chain.K} steps from noise time {float(native[0]):g} on, and the"
            f" policy's sampler is on other times, from {float(chain.grid[0]):g} on: train and"
            " deploy it with chain.grid native, or export it with --format lerobot_plugin"
        )
    config = model.policy.config  # type: ignore[attr-defined]  # it is LeRobot's
    own = config.noise_scheduler_type
    fitting = [name for name, kernel in SAMPLERS.items() if takes_steps_of(chain, kernel)]
    if not fitting:
        raise ConfigError(
            f"chain.kernel {shown(chain.kernel)} is neither LeRobot's DDIM nor its DDPM in every"
            f" step: export the ODE with {ODE}, after evaluating it, or use --format"
            " lerobot_plugin"
        )
    # one step is both
    kind = own if own in fitting else fitting[0]
    if kind != own and model.clip is not None:
        raise ConfigError(
            f"the sampler takes the steps of LeRobot's {kind} and clips x0 as its {own} does: with"
            " clip_sample, which the policy's config sets, LeRobot has no such sampler"
        )
    return {"noise_scheduler_type": kind, "num_inference_steps": chain.K}


def _flow(policy: ChainPolicy) -> dict[str, Any]:
    """The sampler of a SmolVLA, pi0 or pi0.5 as its settings; `ConfigError` where it is not its
    own Euler steps.
    """
    chain, model = policy.chain, policy.model
    if model.parametrisation != "velocity":
        raise ConfigError(
            f"policy.prediction_type is {model.parametrisation}, and LeRobot's flow policies say a"
            " velocity: use --format lerobot_plugin"
        )
    if not torch.equal(chain.grid, model.native_grid(chain.K)):
        raise ConfigError(
            f"LeRobot takes {chain.K} even steps from noise time 1, and the policy's sampler starts"
            f" at {float(chain.grid[0]):g}: leave chain.start out, or use --format lerobot_plugin"
        )
    if not takes_steps_of(chain, SAMPLERS["DDIM"]):
        raise ConfigError(
            f"chain.kernel {shown(chain.kernel)} does not take LeRobot's Euler steps (several steps"
            " of a consistency chain put noise back): export the ODE with"
            f" {ODE}, after evaluating it, take one step, or use --format lerobot_plugin"
        )
    padded = model.event_shape[-1] - model.action_dim  # type: ignore[attr-defined]  # it acts
    if chain.K > 1 and padded and model.padding == "zero":  # type: ignore[attr-defined]
        raise ConfigError(
            f"policy.padding zero takes the {padded} dims that no action uses to 0, and LeRobot"
            " takes them where the network says, which the second step sees: train and deploy it"
            " with policy.padding network, take one step, or use --format lerobot_plugin"
        )
    config = model.policy.config  # type: ignore[attr-defined]  # it is LeRobot's
    return {"num_steps" if config.type == "smolvla" else "num_inference_steps": chain.K}
