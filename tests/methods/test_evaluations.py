"""Network evaluations per sample (F, a backward priced as a forward), as published and as ours.

Ours: no backward through the negative branch, a window of steps, a prefix that a group shares.
"""

import json

import pytest

from genpolicy.config import parse
from genpolicy.training.experiment import train
from tests.toy import experiment

GROUP = 24
SD3 = {"steps": 10, "kernel": {"name": "sde", "a": 0.7}}
GUIDED = {**SD3, "guidance": 4.5}


def measured(folder, chain, **method):
    raw = experiment(
        folder,
        chain=chain,
        method={
            "name": "flow_grpo",
            "groups": 2,
            "group": GROUP,
            "updates": 2,
            "reduce": "sum",
            "clip": 0.2,
            **method,
        },
        budget={"iterations": 2},
        eval={"every": 0, "samples": 4},
    )
    result = train(parse.parse(raw))
    lines = [
        json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()
    ]
    counted = {line["nfe_per_sample"] for line in lines if "nfe_per_sample" in line}
    assert len(counted) == 1
    return counted.pop()


def test_flow_grpo_as_published_with_guidance_and_kl(tmp_path):
    """2*10 rollout + 9 steps * 2 branches * (forward + backward) + 9 * 2 reference = 74."""
    assert measured(tmp_path, {**GUIDED, "negative_gradient": True}, beta=0.04) == 74


def test_unconditional_branch_outside_the_graph(tmp_path):
    """20 + 9 * (2 + 1) + 18 = 65: the negative branch has no backward."""
    assert measured(tmp_path, GUIDED, beta=0.04) == 65


def test_without_a_kl_there_is_no_reference_pass(tmp_path):
    assert measured(tmp_path, GUIDED) == 47


def test_the_whole_chain_unguided_and_without_kl(tmp_path):
    """10 + 9 * 2 = 28."""
    assert measured(tmp_path, SD3) == 28


def test_guidance_free_window_of_two(tmp_path):
    """10 + 2 * 2 = 14."""
    assert measured(tmp_path, {**SD3, "window": [0, 5], "window_size": 2}) == 14


@pytest.mark.parametrize("start", [0, 3, 5])
def test_shared_prefix(tmp_path, start):
    """Steps up to the window's first are evaluated once per group, in the rollout and (that first
    one) in the update: (s + 1)/N + (T - s - 1) + (1 + 1/N) * 2; about 9 on average over s = 0..5 of
    T = 10.
    """
    counted = measured(tmp_path, {**SD3, "window": [start, start + 2]}, shared_prefix=True)
    expected = (start + 1) / GROUP + (10 - start - 1) + 2 * (1 + 1 / GROUP)
    assert counted == pytest.approx(expected)


def test_shared_prefix_is_about_nine(tmp_path):
    mean = sum((s + 1) / GROUP + (9 - s) + 2 * (1 + 1 / GROUP) for s in range(5)) / 5
    assert mean == pytest.approx(9.2, abs=0.05)
