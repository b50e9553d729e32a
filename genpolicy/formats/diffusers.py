"""A policy that draws as a whole pipeline, which plain diffusers loads and draws the same with."""

from dataclasses import replace
from pathlib import Path

from genpolicy.chain import DDIM, Consistency
from genpolicy.config.errors import ConfigError, shown
from genpolicy.config.schema import ChainConfig
from genpolicy.contracts.dataset import Dataset
from genpolicy.contracts.task import ControlTask
from genpolicy.formats._folder import fresh, require_free
from genpolicy.formats._plain import require_network_alone, takes_steps_of
from genpolicy.models._diffusers_lora import WEIGHTS
from genpolicy.models._diffusers_stock import CARD, LCM_SCALING, Stock, code
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from genpolicy.policy.files import Saved
from genpolicy.policy.policy import ChainPolicy

BOUNDARY = 1e-3
"""The largest difference between a step of a consistency chain and one of LCMScheduler, whose
boundary is x0 itself but at the lowest levels.
"""


def diffusers(
    found: Saved,
    out: Path,
    *,
    data: Dataset | None,
    task: ControlTask | None,
    instruction: str | None,
) -> str:
    """Writes the folder ``out``: the pipeline with the policy's weights, of a LoRA with it added to
    them, the stock scheduler of the deployed sampler, and a card with the call that draws so.

    Raises `ConfigError` for a policy that acts, one with parts beside its network, and one whose
    sampler no scheduler of diffusers has.
    """
    if found.policy.get("name") != "diffusers_pipeline":
        raise ConfigError(
            f"{found.where} is no pipeline of diffusers: --format onnx is for policies that act"
        )
    if instruction is not None:
        raise ConfigError("--instruction does not apply: a pipeline is given its prompts")
    require_free(out, lambda folder: False)
    # as exact as its files are: what is written is not rounded to what it ran in
    exact = {**found.policy, "precision": "fp32", "device": "cpu", "offload": False}
    policy = replace(found, policy=exact).load()
    require_network_alone(policy, "a pipeline of diffusers")
    model = policy.model
    assert isinstance(model, DiffusersPipeline)
    _require_guidance(found.sampler, model)
    stock = _stock(policy, found.sampler, model)
    kind = type(model.pipeline).__name__
    recipe = code(stock, None, model.arguments(found.sampler), WEIGHTS)
    noise = ", ".join(f"{t:.4g}" for t in policy.chain.grid[:-1].tolist())
    text = f"# A {kind} made with genpolicy\n\nIt draws at noise times {noise}.\n\n{recipe}"
    with fresh(out, ours=lambda folder: False) as folder:
        model.whole(stock).save_pretrained(folder)
        (folder / CARD).write_text(text, encoding="utf-8")
    return f"{out}: a {kind} of diffusers\n{recipe.replace('FOLDER', str(out))}".rstrip()


def _require_guidance(sampler: ChainConfig, model: DiffusersPipeline) -> None:
    """Raises `ConfigError` where the pipeline's call has no such guidance."""
    if sampler.guidance == 1.0:
        return
    if sampler.guidance_interval is not None:
        raise ConfigError(
            "chain.guidance_interval guides a part of the steps, and pipelines of diffusers guide"
            " all of them: leave it out, with --sampler guidance_interval=null"
        )
    own = model.arguments(sampler).get("guidance_scale")
    if own != sampler.guidance or sampler.guidance < 1.0:
        raise ConfigError(
            f"chain.guidance is {sampler.guidance:g}, and {type(model.pipeline).__name__} has no"
            " argument for it that guides so (guidance_scale is above 1, and no input of the"
            " network): export with --guidance 1"
        )


def _stock(policy: ChainPolicy, sampler: ChainConfig, model: DiffusersPipeline) -> Stock:
    """The stock scheduler of the deployed sampler; `ConfigError` where there is none."""
    chain, kind = policy.chain, type(model.pipeline).__name__
    if abs(chain.scale - 1.0) > BOUNDARY:
        raise ConfigError(
            f"the sampler starts at noise time {float(chain.grid[0]):g} with a std of"
            f" {chain.scale:.3g}, and {kind} starts with standard normal noise: leave chain.start"
            " out"
        )
    scaling = None if model.parametrisation == "velocity" else LCM_SCALING
    jump = Consistency(sampler.kernel.get("scaling") or scaling)
    if takes_steps_of(chain, DDIM(0.0)):
        stock = model.stock(sampler, chain.grid, consistency=False)
    elif takes_steps_of(chain, jump, within=BOUNDARY):
        stock = model.stock(sampler, chain.grid, consistency=True)
    else:
        raise ConfigError(
            f"chain.kernel {shown(chain.kernel)} is in some step neither the ODE nor a consistency"
            " jump, and no scheduler of diffusers draws so: export the ODE with --sampler"
            " kernel.name=ddim kernel.eta=0, after evaluating it"
        )
    if stock.scheduler is None:
        raise ConfigError(
            f"no scheduler of diffusers draws as this sampler of a {kind} does: its table of noise,"
            " or the way in which it clips x0, is not theirs"
        )
    if not stock.times:
        raise ConfigError(
            f"{kind} and its scheduler can't be asked for {chain.K} steps at the sampler's noise"
            " times: export with --sampler grid=native, or with another number of steps"
        )
    return stock
