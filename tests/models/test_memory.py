"""The memory that is computed without weights: counts of parameters, what autograd keeps, cards."""

import contextlib

import diffusers
import pytest
import torch

from genpolicy.cli import main
from genpolicy.models import _diffusers_memory as memory
from genpolicy.models._diffusers_lora import Lora
from genpolicy.models._diffusers_memory import GB, Memory, kept
from genpolicy.models._diffusers_published import PUBLISHED

PARAMETERS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
}
"""As published."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_give_the_published_number_of_parameters(name):
    published = PUBLISHED[name]
    with torch.device("meta"):
        denoiser = getattr(diffusers, published.denoiser)(**published.settings)
    assert sum(p.numel() for p in denoiser.parameters()) == PARAMETERS[name]


def tiny(device: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A Flux transformer of two blocks, and what it is shown."""
    with torch.device(device):
        denoiser = diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=8,
            axes_dims_rope=(8, 12, 12),
        )
        inputs = {
            "hidden_states": torch.randn(1, 64, 16),
            "timestep": torch.rand(1),
            "encoder_hidden_states": torch.randn(1, 9, 24),
            "pooled_projections": torch.randn(1, 8),
            "img_ids": torch.zeros(64, 3),
            "txt_ids": torch.zeros(9, 3),
        }
    return denoiser, inputs


@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_is_counted_without_numbers_is_what_autograd_keeps(monkeypatch, checkpointing):
    """...of the same network on the CPU, whose attention is torch's own flash kernel."""
    counted = kept(*tiny("meta"), torch.float32, checkpointing)
    monkeypatch.setattr(memory, "_FlashAttention", contextlib.nullcontext)
    real = kept(*tiny("cpu"), torch.float32, checkpointing)
    assert counted == pytest.approx(real, rel=1e-3)
    whole = kept(*tiny("meta"), torch.float32, checkpointing)
    assert whole > 1.05 * real, "control: without a flash kernel the matrix of weights is kept"


def test_a_second_row_keeps_twice_as_much_and_checkpoints_keep_less():
    denoiser, inputs = tiny("meta")
    one = kept(denoiser, inputs, torch.float32, False)
    two = {n: v.repeat(2, *[1] * (v.ndim - 1)) if "ids" not in n else v for n, v in inputs.items()}
    assert kept(denoiser, two, torch.float32, False) == pytest.approx(2 * one, rel=0.05)
    assert kept(denoiser, inputs, torch.float32, True) < 0.8 * one


def test_rows_on_a_card_by_hand():
    whole = Memory(4 * GB, 1 * GB, 10 * GB, 0.5 * GB, 2 * GB, event=1, visiting=False)
    assert whole.rows(24 * GB, 0.1 * GB) == 3, ".9 * 24 - 15.5 - .1 = 6"
    visiting = Memory(4 * GB, 1 * GB, 10 * GB, 0.5 * GB, 2 * GB, event=1, visiting=True)
    assert visiting.rows(24 * GB, 0.6 * GB) == 8
    assert visiting.rows(16 * GB, 0.0) == 0, "no room for the text encoders"
    assert whole.rows(12 * GB, 0.0) == 0


def test_a_lora_and_a_whole_network_learn_with_their_own_copies():
    published = PUBLISHED["stabilityai/stable-diffusion-3.5-medium"]
    common = {"dtype": torch.bfloat16, "checkpointing": True, "offload": True, "branches": 1}
    small = {"height": 64, "width": 64, "max_sequence_length": 16}
    lora = memory.computed(published, small, lora=Lora(rank=32), averaged=True, **common)
    full = memory.computed(published, small, lora=None, averaged=False, **common)
    assert lora.denoiser == 2 * PARAMETERS["stabilityai/stable-diffusion-3.5-medium"]
    assert full.denoiser == 2 * lora.denoiser, "what learns is kept in fp32"
    assert full.learned == 12 * PARAMETERS["stabilityai/stable-diffusion-3.5-medium"]
    assert lora.learned % 20 == 0, "fp32, gradient, two moments, average"
    assert lora.event == 16 * 8 * 8


def test_a_plan_without_weights_computes_the_memory(capsys):
    assert main.main(["train", "flow_grpo_sd35m", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "computed from the configuration" in said
    assert "4.49 GB  the denoiser" in said
    assert "a card of 24 GB" in said
    assert "is not on this machine, so that no iteration was rehearsed" in said
