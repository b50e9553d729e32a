"""The memory of an experiment on a published pipeline, computed from its configuration alone."""

from typing import Any

from huggingface_hub import try_to_load_from_cache

from genpolicy.config import leaves
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import Experiment
from genpolicy.models._diffusers_load import INDEX
from genpolicy.models._diffusers_lora import Lora
from genpolicy.models._diffusers_memory import FULL, GB, Memory, computed
from genpolicy.models._diffusers_published import PUBLISHED
from genpolicy.models.diffusers_pipeline import PRECISIONS

CARDS = (24, 48, 80)
"""Gigabytes of the cards that are spoken of."""


def is_published(experiment: Experiment) -> bool:
    """True where the policy is a pipeline whose memory can be computed."""
    named = experiment.policy.get("pretrained")
    pipeline = experiment.policy.get("name") == "diffusers_pipeline"
    return pipeline and isinstance(named, str) and named in PUBLISHED


def is_here(experiment: Experiment) -> bool:
    """True where the pipeline's files have been fetched to this machine."""
    policy = experiment.policy
    found = try_to_load_from_cache(policy["pretrained"], INDEX, revision=policy.get("revision"))
    return isinstance(found, str)


def lines(experiment: Experiment) -> list[str]:
    """The text about the memory of a published pipeline, by lines."""
    policy, chain = experiment.policy, experiment.chain
    full = policy.get("train", "lora") == "full"
    lora = Lora(**(policy.get("lora") or {}))
    guided = chain.guidance != 1.0 and chain.negative_gradient
    memory = computed(
        PUBLISHED[policy["pretrained"]],
        policy.get("call") or {},
        dtype=PRECISIONS[policy.get("precision", "fp32")],
        lora=None if full else lora,
        checkpointing=bool(policy.get("gradient_checkpointing")),
        offload=bool(policy.get("offload")),
        averaged=bool(experiment.optimizer.ema),
        branches=2 if guided else 1,
    )
    samples = _samples(experiment)
    kept = samples * memory.event * FULL * (2 * _window(experiment) + 3)
    where = "visit the device one after the other" if memory.visiting else "stay on the device"
    said = [
        "memory, computed from the configuration; nothing was loaded or run. Neither the working"
        " memory of single operations, decoding among them, nor the rewards' networks are in it:",
        f"{memory.denoiser / GB:9.2f} GB  the denoiser",
        f"{memory.learned / GB:9.2f} GB  beside it for what learns: gradients, Adam, averages",
        f"{(memory.text + memory.vae) / GB:9.2f} GB  text encoders and VAE, which {where}",
        f"{kept / GB:9.2f} GB  the {samples} chains of an iteration, on one device",
        f"{memory.kept / GB:9.2f} GB  of each row that is learned from, for its backward",
    ]
    return said + [_verdict(memory, kept, card) for card in CARDS]


def _verdict(memory: Memory, kept: float, card: int) -> str:
    rows = memory.rows(card * GB, kept)
    what = f"{rows} rows at a time" if rows else "does not fit"
    return f"a card of {card} GB, a tenth left free: {what}"


def _samples(experiment: Experiment) -> int:
    """The samples of an iteration on one device; 0 for a method that counts them otherwise."""
    method: Any = leaves.make("methods", experiment.method, PERSON)
    return getattr(method, "groups", 0) * getattr(method, "group", 0)


def _window(experiment: Experiment) -> int:
    """The steps of a chain that are kept."""
    chain = experiment.chain
    low, high = chain.window or (0, chain.steps - 1)
    return chain.window_size or high - low
