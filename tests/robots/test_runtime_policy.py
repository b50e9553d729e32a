"""An exported policy acts: chunks, history, noise by seed, the plan before, two graphs."""

import shutil

import numpy as np
import pytest
from genpolicy_runtime import ObservationError, Policy
from genpolicy_runtime.noise import noise

from tests.tiny_export import (
    LANGUAGE,
    STATE,
    STATEFUL,
    TOP,
    vision_language,
    with_state,
    written,
)


def seen(number: float) -> dict[str, np.ndarray]:
    return {STATE: np.array([number, -number], np.float32)}


def by_hand(oldest: float, newest: float, seed: int, decision: int) -> np.ndarray:
    """The chunk [3,2] of `tests.tiny_export.policy`."""
    sign = np.array([1, -1], np.float32)
    ramp = np.arange(3, dtype=np.float32)[:, None] / 10
    return (newest + 10 * oldest) * sign + ramp + noise(seed, decision, (1, 3, 2))[0]


def test_a_chunk_is_acted_out_before_the_next_plan(tmp_path):
    policy = Policy.load(written(tmp_path))
    policy.reset(seed=5)
    acted = np.stack([policy.act(seen(tick)) for tick in range(7)])
    # decisions at ticks 0, 3 and 6; each sees its own tick and the one before, the first one twice
    expected = np.concatenate([by_hand(0, 0, 5, 0), by_hand(2, 3, 5, 1), by_hand(5, 6, 5, 2)[:1]])
    assert acted.dtype == np.float32
    np.testing.assert_allclose(acted, expected, atol=1e-6)
    # the control: a policy that forgot the ticks between its decisions would have seen tick 0
    assert np.abs(acted[3:6] - by_hand(0, 3, 5, 1)).max() > 1


def test_plan_gives_the_whole_chunk_and_leaves_the_queue_alone(tmp_path):
    policy = Policy.load(written(tmp_path))
    np.testing.assert_allclose(policy.plan(seen(1)), by_hand(1, 1, 0, 0), atol=1e-6)
    np.testing.assert_allclose(policy.plan(seen(2)), by_hand(1, 2, 0, 1), atol=1e-6)
    np.testing.assert_allclose(policy.act(seen(3)), by_hand(2, 3, 0, 2)[0], atol=1e-6)


def test_a_copied_folder_acts_the_same_and_another_seed_differently(tmp_path):
    folder = written(tmp_path / "here")
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")

    def acted(where, seed):
        policy = Policy.load(where)
        policy.reset(seed)
        return np.stack([policy.act(seen(tick)) for tick in range(8)])

    assert np.array_equal(acted(folder, 3), acted(copy, 3))
    assert not np.array_equal(acted(folder, 3), acted(copy, 4))


def test_reset_forgets_the_episode(tmp_path):
    policy = Policy.load(written(tmp_path))
    first = [policy.act(seen(tick)) for tick in range(5)]
    unlike = policy.act(seen(0))
    policy.reset()
    again = [policy.act(seen(tick)) for tick in range(5)]
    assert np.array_equal(first, again)
    assert not np.array_equal(unlike, again[0])  # the control: without a reset it goes on


def test_noise_is_a_function_of_seed_and_decision_and_stays_what_it_was():
    # numpy may change its normal numbers between versions: exported policies would act otherwise
    expected = np.array([-0.0047899256, -0.1786718071, -0.6984406114, -1.0820808411], np.float32)
    assert np.array_equal(noise(7, 2, (4,)), expected)
    assert not np.array_equal(noise(2, 7, (4,)), expected)
    many = np.stack([noise(seed, 0, (50,)) for seed in range(200)])
    assert abs(many.mean()) < 0.03
    assert abs(many.std() - 1) < 0.03


LIMITS = {"dim": 2, "planned": 3, "executed": 3, "units": "u"}


def test_actions_are_clipped_to_the_limits_that_the_manifest_names(tmp_path):
    free = Policy.load(written(tmp_path / "free")).plan(seen(1))
    action = {**LIMITS, "low": [-1, None], "high": [1, None]}
    policy = Policy.load(written(tmp_path / "clipped", action=action))
    planned = policy.plan(seen(1))
    assert planned.dtype == np.float32
    assert np.array_equal(planned[:, 0], free[:, 0].clip(-1, 1))
    assert np.array_equal(planned[:, 1], free[:, 1])  # null: this number has no limit
    # the control: there was something to clip
    assert np.abs(free).min() > 1
    policy.reset()
    assert np.array_equal(policy.act(seen(1)), planned[0])


def test_one_end_alone_is_clipped(tmp_path):
    free = Policy.load(written(tmp_path / "free")).plan(seen(1))
    action = {**LIMITS, "low": None, "high": [3, 3]}
    planned = Policy.load(written(tmp_path / "clipped", action=action)).plan(seen(1))
    assert np.array_equal(planned, free.clip(None, 3))


def test_a_plan_goes_on_from_the_one_before_as_it_was_drawn(tmp_path):
    """Clipping is the door's: what the next decision begins from is not clipped."""
    action = {**LIMITS, "low": [-1, -1], "high": [1, 1]}
    policy = Policy.load(written(tmp_path, with_state(), state=STATEFUL, action=action))
    policy.plan(seen(0.1))
    before = policy._previous
    policy.plan(seen(0.1))
    assert np.abs(before).max() > 1
    assert np.array_equal(policy._previous, before + 1)


def test_two_policies_share_graphs_and_nothing_else(tmp_path):
    one = Policy.load(written(tmp_path, with_state(), state=STATEFUL))
    other = Policy(one.manifest, one.graphs)
    first = one.plan(seen(1))
    assert np.array_equal(one.plan(seen(1)), first + 1)
    assert np.array_equal(other.plan(seen(1)), first)


def test_a_plan_begins_from_the_one_before_until_reset(tmp_path):
    policy = Policy.load(written(tmp_path, with_state(), state=STATEFUL))
    first = policy.plan(seen(2))
    np.testing.assert_allclose(first, by_hand(2, 2, 0, 0), atol=1e-6)
    assert np.array_equal(policy.plan(seen(9)), first + 1)
    assert np.array_equal(policy.plan(seen(9)), first + 1 + 1)
    policy.reset()
    assert np.array_equal(policy.plan(seen(2)), first)


def test_a_prefix_feeds_its_expert_and_pictures_come_in_both_forms(tmp_path):
    policy = Policy.load(written(tmp_path, vision_language(), **LANGUAGE))
    picture = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (2, 4, 3), np.uint8)
    floats = picture.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    planned = policy.plan({TOP: picture})
    np.testing.assert_allclose(planned, noise(0, 0, (1, 3, 2))[0] + floats.mean() + 7, atol=1e-5)
    policy.reset()
    assert np.array_equal(policy.plan({TOP: floats}), planned)


def test_other_tokens_are_another_instruction_until_others_come(tmp_path):
    """The tiny prefix adds up the tokens: 7 of those of the export."""
    policy = Policy.load(written(tmp_path, vision_language(), **LANGUAGE))
    other = Policy(policy.manifest, policy.graphs)
    picture = {TOP: np.zeros((2, 4, 3), np.uint8)}
    first = policy.plan(picture)
    policy.reset()
    policy.instruct({"tokens": np.array([[3, 14]])})
    np.testing.assert_allclose(policy.plan(picture), first + 10, atol=1e-5)
    policy.reset()
    np.testing.assert_allclose(policy.plan(picture), first + 10, atol=1e-5)
    # the control: another policy on the same graphs was told nothing
    assert np.array_equal(other.plan(picture), first)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ({}, r"tokens tokens is missing; the policy takes tokens as int64 \[1, 2\]"),
        ({"tokens": np.array([[1, 2, 3]])}, r"tokens tokens is int64 \[1, 3\]; the policy takes"),
        ({"tokens": np.ones((1, 2))}, r"tokens tokens is float64 \[1, 2\]; the policy takes"),
        ({"tokens": np.array([[1, 2]]), "mask": np.ones(2)}, "tokens mask is float64"),
    ],
)
def test_wrong_tokens_are_refused_in_one_sentence_and_change_nothing(tmp_path, tokens, sentence):
    policy = Policy.load(written(tmp_path, vision_language(), **LANGUAGE))
    picture = {TOP: np.zeros((2, 4, 3), np.uint8)}
    first = policy.plan(picture)
    with pytest.raises(ValueError, match=sentence):
        policy.instruct(tokens)
    policy.reset()
    assert np.array_equal(policy.plan(picture), first)


def test_a_policy_without_words_can_not_be_told(tmp_path):
    with pytest.raises(ValueError, match="the policy reads no instruction"):
        Policy.load(written(tmp_path)).instruct({"tokens": np.array([[3, 14]])})


VECTOR = r"it must be a numpy array float32 \[2\] of finite numbers"
PICTURE = r"it must be a numpy array float32 \[3, 2, 4\] in \[0,1\] or uint8 \[2, 4, 3\]"


@pytest.mark.parametrize(
    ("observation", "sentence"),
    [
        ({}, "lacks observation.state; the policy needs observation.state"),
        ([1.0, 2.0], r"the observation is \[1.0, 2.0\]; it must be a dict of observation.state"),
        ({**seen(1), "other": 1}, "has 'other', which the policy does not know; it needs"),
        ({STATE: [1.0, 2.0]}, f"observation.state is a list; {VECTOR}"),
        ({STATE: np.ones(2)}, rf"observation.state is float64 \[2\]; {VECTOR}"),
        ({STATE: np.ones((1, 2), np.float32)}, rf"is float32 \[1, 2\]; {VECTOR}"),
        ({STATE: np.array([1, np.nan], np.float32)}, f"observation.state has nan in it; {VECTOR}"),
        ({STATE: np.array([-np.inf, 0], np.float32)}, f"has -inf in it; {VECTOR}"),
    ],
)
def test_a_wrong_observation_is_refused_in_one_sentence_and_changes_nothing(
    tmp_path, observation, sentence
):
    policy = Policy.load(written(tmp_path))
    for tick in range(2):
        policy.act(seen(tick))
    with pytest.raises(ObservationError, match=sentence):
        policy.act(observation)
    rest = [policy.act(seen(tick)) for tick in range(2, 5)]
    policy.reset()
    assert np.array_equal([policy.act(seen(tick)) for tick in range(5)][2:], rest)


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        (np.zeros((3, 2, 4), np.uint8), rf"is uint8 \[3, 2, 4\]; {PICTURE}"),
        (np.zeros((2, 4, 3), np.float32), rf"is float32 \[2, 4, 3\]; {PICTURE}"),
        (np.full((3, 2, 4), 255, np.float32), f"has values from 255 to 255; {PICTURE}"),
        (np.full((3, 2, 4), np.nan, np.float32), f"has nan in it; {PICTURE}"),
    ],
)
def test_a_wrong_picture_is_refused_in_one_sentence(tmp_path, picture, sentence):
    policy = Policy.load(written(tmp_path, vision_language(), **LANGUAGE))
    with pytest.raises(ObservationError, match=sentence):
        policy.act({TOP: picture})


def test_an_action_that_is_not_finite_never_reaches_the_robot(tmp_path):
    policy = Policy.load(written(tmp_path))
    with pytest.raises(FloatingPointError, match="decision 0 of seed 0 is not finite"):
        policy.act({STATE: np.array([3e38, 0], np.float32)})


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, None])
def test_a_wrong_seed_is_refused_in_one_sentence(tmp_path, seed):
    policy = Policy.load(written(tmp_path))
    with pytest.raises(ValueError, match=r"it must be a whole number from 0 to 2\^64 - 1"):
        policy.reset(seed)
    policy.reset(np.int64(3))
