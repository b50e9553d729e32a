"""The members that callers read of every model, without probing for them."""

import pytest

from genpolicy.config.leaves import leaf, names
from genpolicy.config.origin import PERSON

ACTS = {
    "diffusers_pipeline": False,
    "lerobot_diffusion": True,
    "lerobot_flow": True,
    "mlp": True,
    "token_vla": True,
    "tokens": True,
    "toy": False,
}
OF_EVERY_MODEL = (
    *("grid", "native_grid", "times", "encode", "negative", "supervised", "draws", "denoise"),
    *("scored", "features", "event", "event_mask", "decode", "trainable", "save"),
)
OF_THOSE_THAT_ACT = ("initialise", "observations")


def test_every_model_is_listed_here() -> None:
    assert set(names("models")) == set(ACTS)


@pytest.mark.parametrize("name", ACTS)
def test_our_own_networks_learn_at_all_times(name: str) -> None:
    if name != "diffusers_pipeline":  # says it once it is loaded
        assert leaf("models", name, PERSON).learns_from == 0.0


@pytest.mark.parametrize("name", ACTS)
def test_a_class_says_whether_its_samples_are_actions(name: str) -> None:
    kind = leaf("models", name, PERSON)
    assert kind.acts is ACTS[name]
    wanted = OF_EVERY_MODEL + (OF_THOSE_THAT_ACT if kind.acts else ())
    assert [member for member in wanted if not hasattr(kind, member)] == []
    assert [member for member in OF_THOSE_THAT_ACT if hasattr(kind, member)] == [
        member for member in OF_THOSE_THAT_ACT if kind.acts
    ]
