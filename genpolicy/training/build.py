"""Builds live objects from an experiment; saves a policy to its folder and loads it back."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from genpolicy.config.errors import ConfigError, shown
from genpolicy.config.leaves import make, settings
from genpolicy.config.origin import Origin
from genpolicy.config.schema import Experiment
from genpolicy.contracts.dataset import Dataset, Merged, Pictures
from genpolicy.contracts.model import ControlModel, require_fit
from genpolicy.contracts.reward import WeightedRewards, require_arguments
from genpolicy.contracts.task import ControlTask, read_prompts
from genpolicy.policy.teacher import TEACHER, student


def make_rewards(
    raw: Mapping[str, Any], origin: Origin, patience: float | None = Experiment.patience
) -> WeightedRewards:
    """The reward section, name -> weight or {weight, settings...}, as `WeightedRewards`; patience:
    see `Experiment`.
    """
    rewards: dict[str, tuple[Any, float]] = {}
    for name, value in raw.items():
        section = dict(value) if isinstance(value, dict) else {"weight": value}
        weight = section.pop("weight", 1.0)
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not math.isfinite(weight)
        ):
            raise ConfigError(
                f"reward {name}: its weight must be a finite number, got {shown(weight)}"
            )
        short = name.rpartition(":")[2]
        if short in rewards:
            raise ConfigError(f"two rewards are called {short}: rename one of them")
        reward = make("rewards", {**section, "name": name}, origin)
        require_arguments(name, reward)
        rewards[short] = (reward, float(weight))
    if not rewards:
        raise ConfigError("the reward section names no reward")
    return WeightedRewards(rewards, patience)


def load_rewards(rewards: WeightedRewards) -> None:
    """Load the weights of those that have some now, so that what is missing is said before any work
    starts.
    """
    for reward, _ in rewards.rewards.values():
        try:
            getattr(reward, "load", lambda: None)()
        except ImportError as error:
            raise ConfigError(str(error)) from None


def make_data(
    raw: Mapping[str, Any] | Sequence[Any] | None, origin: Origin
) -> Dataset | Pictures | None:
    """The data section: a data set, or a list of several that are learned from as one; a text in it
    is a LeRobotDataset's folder.
    """
    if raw is None:
        return None
    if isinstance(raw, Mapping):
        return make("datasets", raw, origin)
    sections = [
        {"name": "lerobot_dataset", "root": one} if isinstance(one, str) else one for one in raw
    ]
    for section in sections:
        if not isinstance(section, Mapping):
            raise ConfigError(
                f"data: {shown(section)} is neither a folder nor a data set's section"
            )
    if not sections:
        raise ConfigError("the data section is an empty list: name a folder, or leave it out")
    made = [make("datasets", section, origin) for section in sections]
    if any(isinstance(one, Pictures) for one in made):
        raise ConfigError(
            "data: several folders are learned from as one only where they hold episodes"
        )
    try:
        return Merged(made, [called(section) for section in sections])
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None


def called(section: Mapping[str, Any]) -> str:
    """The name of a data set in words to the person: its folder, its hub id, or its leaf."""
    return str(section.get("root") or section.get("repo_id") or section["name"])


def make_model(section: Mapping[str, Any], origin: Origin) -> Any:
    """The model of a policy section; a student's begins where its teacher stands."""
    own = student(section)
    return make("models", {key: own[key] for key in own if key != TEACHER}, origin)


def control_model(
    section: Mapping[str, Any], task: ControlTask, data: Dataset | Pictures | None, origin: Origin
) -> ControlModel:
    """A model for a task of many decisions, given its shapes and statistics by the data set where
    it is new. Raises `ConfigError` where model and task do not fit.
    """
    model = make_model(section, origin)
    if not model.acts:
        raise ConfigError(
            f"model {section['name']} has no actions: it can't act in a task of environments"
        )
    if model.pretrained is None:
        if data is None or isinstance(data, Pictures):
            raise ConfigError(
                "policy.pretrained names no policy that has learned from data: a new one needs the"
                " data section, which gives it shapes"
            )
        model.initialise(data)
    require_fit(model, task)
    return model


def prompt_lines(path: str, where: str = "") -> tuple[str, ...]:
    """The prompts of a file, which may be a shipped one (assets/...); ``where`` begins the sentence
    that says what is wrong with it.
    """
    try:
        return read_prompts(settings({"prompts": path})["prompts"])
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}{error}") from None
