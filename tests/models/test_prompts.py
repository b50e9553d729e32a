"""New prompts are encoded together, and the embedding of one does not depend on the others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.contracts.task import Context
from genpolicy.models import _diffusers_prompts as prompts_of
from genpolicy.models.diffusers_pipeline import DiffusersPipeline
from tests.models import test_diffusers_pipeline as pipelines
from tests.models.test_events import SHAPES

MANY = [
    f"a {colour} {shape} above a {other} square"
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "triangle")
    for other in ("red", "yellow")
]
"""Sixteen, two batches."""


def load(family: str, precision: Any = "fp32") -> DiffusersPipeline:
    if family == "shapes":
        return DiffusersPipeline(str(SHAPES), device="cpu", precision=precision)
    return pipelines.load(family, precision=precision)


def embedded(model: DiffusersPipeline, prompt: str) -> list[Tensor]:
    return [value for value in model._embeddings.entry(prompt) if value is not None]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", [*pipelines.FAMILIES, "shapes"])
def test_an_embedding_does_not_depend_on_its_company(family: str, precision: str) -> None:
    """Bit for bit: all at once, in another order, one by one; and to rounding what it is alone."""
    once, turned, single = (load(family, precision) for _ in range(3))
    assert once._embeddings._have_rows is not None
    once.encode(Context(MANY))
    turned.encode(Context(MANY[5:] + MANY[:5]))
    for prompt in MANY:
        single.encode(Context([prompt]))
        alone = [value for value in single._text._encode([prompt]) if value is not None]
        for value, other, one, by_itself in zip(
            *(embedded(model, prompt) for model in (once, turned, single)), alone, strict=True
        ):
            assert torch.equal(value, other)
            assert torch.equal(value, one)
            assert (value.float() - by_itself.float()).abs().max() <= 1e-6
    assert not torch.equal(embedded(once, MANY[0])[0], embedded(once, MANY[1])[0])


@pytest.mark.parametrize("how", ["place", "company", "longest"])
def test_where_company_matters_prompts_are_encoded_alone(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("sd3")
    own, sizes = model._embeddings._positive, []

    def told(asked: list[str]) -> prompts_of.Entry:
        sizes.append(len(asked))
        first, *others = own(asked)
        if how == "place":
            first = first + 1e-6 * torch.arange(len(first))[:, None, None]
        elif how == "company":
            first = first + first.mean(0)
        else:
            first = first[:, : max(len(prompt) for prompt in asked)]
        return (first, *others)

    monkeypatch.setattr(model._embeddings, "_positive", told)
    del model._embeddings._have_rows
    assert model._embeddings._have_rows is None
    sizes.clear()
    model.encode(Context(MANY))
    assert sizes == [1] * len(MANY)


def test_prompts_are_encoded_in_batches_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("sd3")
    own, sizes = model._embeddings._positive, []
    monkeypatch.setattr(
        model._embeddings, "_positive", lambda asked: (sizes.append(len(asked)), own(asked))[1]
    )
    model.encode(Context([*MANY[:11], *MANY[:3]]))
    model.encode(Context(MANY[:12]))
    assert sizes == [prompts_of.TOGETHER] * 3


def test_a_new_prompt_costs_the_same_however_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """...and the oldest of them are dropped at the limit of bytes all the same."""
    weighed: list[int] = []
    honest = prompts_of._bytes
    monkeypatch.setattr(prompts_of, "_bytes", lambda entry: weighed.append(1) or honest(entry))
    made = prompts_of.Embeddings(
        lambda prompts: (torch.zeros(len(prompts), 10),),
        lambda: (torch.zeros(1, 10),),
        torch.device("cpu"),
        torch.device("cpu"),
    )
    made.encode([f"{number}" for number in range(400)])
    assert len(weighed) <= 2 * 400, "the sum of all of them each time would be 80,000"
    monkeypatch.setattr(prompts_of, "CACHED_BYTES", 5 * 40)
    made.encode(["another", "and another"])
    assert list(made._entries) == ["397", "398", "399", "another", "and another"]
