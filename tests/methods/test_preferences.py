"""SePPO and Diffusion-DPO in a run: which reference, which pairs, and that they learn what they are
told to prefer.
"""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.dataset import Pairs
from genpolicy.contracts.task import Context
from genpolicy.methods.diffusion_dpo import DiffusionDPO
from genpolicy.methods.parts.contrast import contrasted
from genpolicy.methods.parts.imitation import Imitation, recorded
from genpolicy.methods.parts.preferences import Preference
from genpolicy.methods.seppo import SePPO
from genpolicy.models.toy import Toy
from genpolicy.rollout.examples import examples
from genpolicy.training.deployment import Deployment
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from genpolicy.training.run import Run
from tests import one_step, rl100_toy, toy, toy_control
from tests.methods.test_laws import Shown
from tests.methods.test_seams import largest_difference
from tests.peers import peers, together

SMALL = {"samples": 16, "updates": 2}
WORLDS = {"prompts": toy.experiment, "robots": toy_control.experiment}
DATA = {
    "prompts": {"name": "tests.methods.test_preferences:Sides"},
    "robots": {"name": "tests.rl100_toy:Outcomes", "skill": 0.1, "limit": 12},
}


class Sides(Shown):
    """Pairs of pictures in memory: white is preferred where it is bright, else black."""

    def pairs(self, index: Tensor) -> tuple[Context, Tensor, Tensor]:
        captions, preferred = self.pictures(index)
        return captions, preferred, 1 - preferred


class Turned(Sides):
    """The same pairs with their sides exchanged."""

    def pairs(self, index: Tensor) -> tuple[Context, Tensor, Tensor]:
        captions, preferred, other = super().pairs(index)
        return captions, other, preferred


def read_by(method: dict[str, Any], world: str) -> dict[str, Any]:
    """The data section of a world, where the method reads it or a new policy has its shapes there."""
    own = method["name"] == "diffusion_dpo" and method.get("pairs", "own") == "own"
    return {} if own and world == "prompts" else {"data": DATA[world]}


def prepared(folder: Path, method: dict[str, Any], world: str = "prompts", **sections: Any):
    """A run before its first iteration, and its method."""
    folder.mkdir(exist_ok=True)
    raw = WORLDS[world](
        folder,
        method=method,
        optimizer={"lr": 3e-3, "weight_decay": 0.0},
        **{**read_by(method, world), **sections},
    )
    return prepare(parse.parse(raw), folder / "run", Processes(peers(1)[0]))


def trained(run, method, iterations: int) -> list[dict[str, float]]:
    """Makes so many iterations, without what a run does around them: the means of every update."""
    found, honest = [], run.descend

    def descend(*arguments, **options):
        found.append(honest(*arguments, **options))
        return found[-1]

    def counted():
        for iteration in range(1, iterations + 1):
            run.begin(iteration)
            yield iteration

    run.descend, run.iterations = descend, counted
    method.train(run)
    return found


DPO = {"name": "diffusion_dpo", "pairs": "recorded", "pairs_per_update": 16, "updates": 2}
OWN = {"name": "diffusion_dpo", "groups": 4, "group": 4, "updates": 2}
SEPPO = {"name": "seppo", **SMALL}
EVERY = {"seppo": SEPPO, "recorded": DPO, "own": OWN}


# -- the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", EVERY)
def test_the_first_logit_is_0_and_the_second_is_not(tmp_path, method, world):
    run, made = prepared(tmp_path, EVERY[method], world)
    first, second = trained(run, made, 1)[:2]
    assert first["logit"] == 0, "to the bit: both sides of the difference are one computation"
    assert second["logit"] != 0


@pytest.mark.parametrize(("pool", "zeros"), [("latest", 3), ("initial", 1)])
def test_the_reference_is_the_last_policy_or_the_first(tmp_path, pool, zeros):
    """Three iterations of two updates: only against itself is a policy's logit 0."""
    run, made = prepared(tmp_path, {**SEPPO, "pool": pool})
    logits = [update["logit"] for update in trained(run, made, 3)]
    assert [logit == 0 for logit in logits[::2]] == [True, *[pool == "latest"] * 2]
    assert sum(logit == 0 for logit in logits) == zeros


def test_a_random_reference_is_one_of_all_earlier_policies(tmp_path):
    """...of which one may be as it is now; the next one's choice does not follow from it."""
    run, made = prepared(tmp_path, {**SEPPO, "updates": 1, "copies": 8})
    asked: list[int] = []
    honest = run.pool

    def pool(size):
        found = honest(size)
        read = type(found).__getitem__

        class Watched(type(found)):
            def __getitem__(self, place):
                asked.append((place, len(self)))
                return read(self, place)

        found.__class__ = Watched
        return found

    run.pool = pool
    trained(run, made, 12)
    assert [size for _, size in asked] == [1, 2, 3, 4, 5, 6, 7, *[8] * 5]
    assert len({place for place, _ in asked}) > 3
    assert [place for place, size in asked] != [size - 1 for _, size in asked], "control: latest"


def test_the_other_side_is_what_the_reference_samples(tmp_path):
    """...and not what the policy does, which has moved away from it."""
    run, made = prepared(tmp_path, {**SEPPO, "pool": "initial"}, "robots")
    run.spent.iteration = 1
    reference, place = run.weights(), torch.arange(16)
    example = made.example(run, place)

    def sampled():
        return made.sampled(run, example.context, place, reference)

    before = sampled()
    with torch.no_grad():
        for parameter in run.trainable:
            parameter += 0.1 * torch.randn_like(parameter)
    assert torch.equal(sampled(), before)
    reference.renew()
    assert not torch.allclose(sampled(), before, atol=1e-2), "control"


# -- special cases ---------------------------------------------------------------------------------


def gradient(run) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in run.trainable]


@dataclass
class OnePair(Sides):
    """One pair, so that every row that is drawn is the same."""

    def __len__(self) -> int:
        return 1


def test_without_a_flip_and_with_given_losers_seppo_is_dpo(tmp_path):
    """The same pairs, the first reference: two updates bring the same weights."""
    data = {"name": "tests.methods.test_preferences:OnePair"}
    own = {"name": "seppo", "samples": 8, "updates": 1}
    found = {}
    for pool in ("initial", "latest"):
        method = {**own, "pool": pool, "flip": "none"}
        run, made = prepared(tmp_path / pool, method, data=data)
        other = run.policy.model.event(Sides().pairs(torch.zeros(8, dtype=torch.long))[2])
        given = lambda run, context, place, reference, other=other: other  # noqa: E731
        made.sampled = given
        trained(run, made, 3)
        found[pool] = run.weights().values
    recorded = {"name": "diffusion_dpo", "pairs": "recorded", "pairs_per_update": 8, "updates": 1}
    run, made = prepared(tmp_path / "dpo", recorded, data=data)
    trained(run, made, 3)
    assert largest_difference(found["initial"], run.weights().values) < 1e-6
    assert largest_difference(found["latest"], run.weights().values) > 1e-5, "control"


def test_equal_sides_with_one_noise_teach_nothing(tmp_path):
    """...and with two noises they do."""
    moved = {}
    for shared in (True, False):
        preference = {"shared_noise": shared}
        run, made = prepared(tmp_path / str(shared), {**SEPPO, "preference": preference})
        known = torch.zeros(16, dtype=torch.long)
        same = made.example(run, known).event
        run.rows = lambda count, size, purpose, known=known: known
        made.sampled = lambda run, context, place, reference, same=same: same
        before = run.weights()
        trained(run, made, 1)
        moved[shared] = largest_difference(before.values, run.weights().values)
    assert moved[True] < 1e-6
    assert moved[False] > 1e-4


# -- pairs of a policy's own groups ----------------------------------------------------------------


def rollout_of(rewards: list[list[float]], decisions: list[int], local: list[int]) -> Any:
    """A rollout of groups with these rewards, whose episodes [m N] have so many decisions."""
    episode = torch.arange(len(decisions)).repeat_interleave(torch.tensor(decisions))
    place = 100 + torch.arange(len(episode))
    return SimpleNamespace(
        rewards=torch.tensor(rewards, dtype=torch.float64),
        local=torch.tensor(local),
        decisions=SimpleNamespace(episode=episode, place=place),
    )


def test_every_decision_of_the_best_meets_one_of_the_worst_of_its_group():
    """Groups 0, 2 and 3 are here; group 2 has no difference."""
    rewards = [[0.0, 1.0, 1.0], [5.0, 0.0, 0.0], [1.0, 1.0, 1.0], [3.0, 2.0, 2.0]]
    rows = [2, 3, 1, 1, 1, 1, 2, 4, 1]  # of the nine episodes here; 16 decisions
    rollout = rollout_of(rewards, rows, [0, 2, 3])
    low, high = (contrasted(rollout, torch.full((200,), u)) for u in (0.0, 0.999))
    assert low.better.tolist() == [2, 3, 4, 9, 10]
    assert low.group.tolist() == [0, 0, 0, 3, 3]
    assert low.worse.tolist() == [0, 0, 0, 11, 11]
    assert high.worse.tolist() == [1, 1, 1, 14, 14]
    assert low.margin == 0.75


def test_which_decision_it_meets_is_drawn_by_place_and_not_by_process():
    rewards = [[0.0, 1.0], [0.0, 1.0]]
    uniform = torch.linspace(0, 0.99, 300)
    whole = contrasted(rollout_of(rewards, [4, 1, 4, 1], [0, 1]), uniform)
    second = rollout_of(rewards, [4, 1], [1])
    second.decisions.place = second.decisions.place + 5
    assert contrasted(second, uniform).worse.tolist() == [int(whole.worse[1]) - 5]


def shade(outputs: Tensor, context: Context) -> Tensor:
    """A cosine by the prompt: .5 of a "bright" picture, -.5 of any other."""
    return torch.tensor([0.5 if "bright" in prompt else -0.5 for prompt in context.prompts])


def tripled(outputs: Tensor, context: Context) -> Tensor:
    """No cosine."""
    return 3 * shade(outputs, context)


def weighed(folder: Path, reward: str, alpha: float) -> tuple[Any, list[dict[str, float]]]:
    """A run whose pairs are weighed by a reward that judges nothing, and its first update."""
    method = {**OWN, "updates": 1, "semantic_alpha": alpha}
    if alpha:
        method["semantic_reward"] = reward
    section = {"tests.toy:brightness": 1.0, f"{__name__}:{reward}": 0.0}
    run, made = prepared(folder, method, reward=section)
    return run, trained(run, made, 1)


def test_a_pair_weighs_by_its_prompt_and_preferred_picture(tmp_path):
    """At the reference each loss is log 2 times its weight; half of the prompts are bright."""
    _, (plain,) = weighed(tmp_path / "plain", "shade", 0.0)
    _, (found,) = weighed(tmp_path / "weighed", "shade", 2.0)
    assert plain["loss"] == pytest.approx(math.log(2))
    mean = (math.exp(-2 * 0.5) + math.exp(-2 * 1.5)) / 2
    assert found["loss"] == pytest.approx(math.log(2) * mean)


def test_pairs_can_only_be_weighed_by_a_cosine_of_the_reward_section(tmp_path):
    with pytest.raises(ConfigError, match=r"tripled is 1\.5 somewhere, and a cosine is in"):
        weighed(tmp_path / "tripled", "tripled", 2.0)
    run, made = prepared(tmp_path / "none", {**OWN, "semantic_alpha": 2.0})
    with pytest.raises(ConfigError, match="clip_score, and the reward section does not name it"):
        trained(run, made, 1)


def test_no_difference_anywhere_is_no_pair_and_no_error(tmp_path):
    run, made = prepared(tmp_path, OWN, reward={"tests.toy:constant": 1.0}, eval={"every": 0})
    logged: dict[str, float] = {}
    run.log = lambda name, value: logged.setdefault(name, value)
    before = run.weights()
    trained(run, made, 1)
    assert logged["dpo/margin"] == 0
    assert largest_difference(before.values, run.weights().values) == 0


# -- learning --------------------------------------------------------------------------------------


def brightness(run) -> float:
    """The mean of `toy.brightness` over samples of every prompt."""
    context = Context([*toy.PROMPTS] * 64)
    noise = Noise.rows(5, 5, torch.arange(len(context)), 1)
    with torch.no_grad():
        x0 = run.policy.sample(run.policy.model.encode(context), noise, keep=(0, 0)).x0
        return float(toy.brightness(run.policy.model.decode(x0), context).mean())


@pytest.mark.parametrize(
    ("method", "data", "sign"),
    [
        ({**DPO, "updates": 20}, "Sides", 1),
        ({**DPO, "updates": 20}, "Turned", -1),
        ({**OWN, "updates": 10, "groups": 16}, None, 1),
        ({**SEPPO, "updates": 16, "samples": 64}, "Sides", 1),
    ],
)
def test_pictures_become_what_is_preferred(tmp_path, method, data, sign):
    """Control: turned pairs bring the opposite."""
    section = {"data": {"name": f"tests.methods.test_preferences:{data}"}} if data else {}
    run, made = prepared(tmp_path, method, **section)
    before = brightness(run)
    trained(run, made, 8)
    assert sign * (brightness(run) - before) > 0.05


def better_mode(run) -> float:
    """The share of samples in the mode that is rewarded."""
    rows = torch.arange(400)
    context, _, _ = examples(run.data, run.policy.model, rows)
    with torch.no_grad():
        condition = run.policy.model.encode(context)
        x0 = run.policy.sample(condition, Noise.rows(9, 9, rows, 1), keep=(0, 0)).x0
    return float((x0 > 0).double().mean())


@pytest.mark.parametrize("method", EVERY)
def test_a_clone_of_two_modes_moves_to_the_better_one(tmp_path, method):
    """Half of the data failed, and half of the clone's samples do."""
    sizes = {
        "seppo": {"samples": 256, "updates": 16},
        "recorded": {"pairs_per_update": 64, "updates": 16},
        "own": {"groups": 64, "group": 4, "updates": 8},
    }[method]
    run, made = one_step.prepared(
        tmp_path,
        "diffusion",
        method={**EVERY[method], **sizes},
        optimizer={"lr": 1e-3, "weight_decay": 0.0},
    )
    run.say = lambda text: None
    Imitation(run, recorded(run.data, run.policy.model), len(run.data), 128)(400)
    before = better_mode(run)
    trained(run, made, 8)
    assert 0.35 < before < 0.65
    assert better_mode(run) > 0.9


# -- processes, and what is refused ----------------------------------------------------------------


def learned(folder, count, method, world, seed=0):
    """The weights of each of so many processes after two iterations."""
    accelerators, works = peers(count), []
    for index, accelerator in enumerate(accelerators):
        place = folder / f"{count}-{index}"
        place.mkdir(parents=True)
        raw = WORLDS[world](
            place,
            method=method,
            optimizer={"lr": 1e-3, "eps": 1e-4},
            budget={"iterations": 2},
            seed=seed,
            **read_by(method, world),
        )
        run, made = prepare(parse.parse(raw), place / "run", Processes(accelerator))
        works.append(partial(weights_after, run, made))
    return together(works, accelerators)


def weights_after(run, made):
    trained(run, made, 2)
    return run.weights().values


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", EVERY)
def test_two_processes_learn_what_one_learns(tmp_path, method, world):
    (one,) = learned(tmp_path, 1, EVERY[method], world)
    (other,) = learned(tmp_path / "other", 1, EVERY[method], world, seed=1)
    for values in learned(tmp_path, 2, EVERY[method], world):
        assert largest_difference(values, one) < 1e-5
    assert largest_difference(one, other) > 1e-4, "control: another seed is another run"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: SePPO(pool="first"), "pool is 'first'"),  # type: ignore[arg-type]
        (lambda: SePPO(samples=4, updates=8), "updates is 8; it must be at most 4"),
        (lambda: SePPO(flip="none", sign_draws=3), "sign_draws is 3, and with flip none"),
        (lambda: SePPO(pool="latest", copies=3), "copies is 3, and with pool latest"),
        (lambda: DiffusionDPO(pairs_per_update=3), "pairs_per_update is 3, and with own pairs"),
        (lambda: DiffusionDPO(pairs="recorded", group=3), "group is 3, and with recorded pairs"),
        (lambda: DiffusionDPO(pairs="recorded", semantic_alpha=1.0), "semantic_alpha is 1.0, and"),
        (
            lambda: DiffusionDPO(semantic_reward="x"),
            "semantic_reward is 'x', and with semantic_alpha",
        ),
        (lambda: DiffusionDPO(groups=4, updates=8), "updates is 8; it must be at most 4"),
        (lambda: Preference(wrong=0.5), "wrong is 0.5; it must be below 0.5"),
        (lambda: Preference(beta=1.0, beta_mean=1.0), "beta is 1.0, and beside beta_mean"),
        (lambda: Preference(safeguard=2.0), "safeguard is 2.0"),
        (lambda: Preference(loss="square"), "loss is 'square'"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_are_none_are_one_sentence(made, said):
    with pytest.raises(ConfigError, match=said) as raised:
        made()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("method", "world", "data", "said"),
    [
        (DPO, "prompts", {"name": "tests.methods.test_laws:Shown"}, "no pairs of them"),
        (DPO, "prompts", None, "learns from recorded examples: name them in the data section"),
        (
            OWN,
            "prompts",
            DATA["prompts"],
            "the data section is named, and own pairs do not read it",
        ),
        (DPO, "robots", {"name": "tests.toy_control:Recorded"}, "no recorded episode failed"),
    ],
)
def test_data_without_pairs_is_one_sentence(tmp_path, method, world, data, said):
    with pytest.raises(ConfigError, match=said) as raised:
        trained(*prepared(tmp_path, method, world, data=data), 1)
    assert "\n" not in str(raised.value)


def test_pairs_in_memory_are_pairs():
    assert isinstance(Sides(), Pairs)
    assert not isinstance(Shown(), Pairs)


def test_recorded_pairs_are_held_against_no_setting_of_own_ones():
    """48 groups, which nothing reads, and five processes."""
    assert DiffusionDPO(pairs="recorded").needs.split == ()
    assert DiffusionDPO().needs.split == ("groups",)


@dataclass
class Lost(rl100_toy.Outcomes):
    """Episodes none of which got there in time."""

    skill: float = 0.1
    limit: int = 2


@pytest.mark.parametrize(
    ("method", "kind", "said"),
    [
        (DPO, "tests.toy_control:Recorded", "no recorded episode failed: pairs need both kinds"),
        (DPO, f"{__name__}:Lost", "no recorded episode succeeded: pairs need both kinds"),
        (SEPPO, f"{__name__}:Lost", "no recorded episode succeeded: there is no example"),
    ],
)
def test_episodes_of_one_kind_are_refused_before_any_work(
    tmp_path, monkeypatch, method, kind, said
):
    """No episode is played, and of the run's folder nothing is left."""
    asked: list[str] = []
    monkeypatch.setattr(Deployment, "evaluate", lambda *_: asked.append("evaluate"))
    monkeypatch.setattr(Run, "descend", lambda *_, **__: asked.append("descend"))
    raw = toy_control.experiment(tmp_path, method=method, data={"name": kind})
    with pytest.raises(ConfigError, match=said):
        train(parse.parse(raw))
    assert asked == []
    assert not (tmp_path / "run").exists()


def test_the_first_policy_stays_the_reference_where_a_run_goes_on_from_another_place(tmp_path):
    """The policy section may say another folder when a run is resumed; the reference may not."""
    homes = []
    for seed in (1, 2):
        home = tmp_path / f"home-{seed}"
        home.mkdir()
        Toy(seed=seed).save(home)
        homes.append(str(home))
    losses = {}
    for name, later in (("same", homes[0]), ("other", homes[1])):
        (tmp_path / name).mkdir()
        raw = toy.experiment(
            tmp_path / name,
            policy={"name": "toy", "pretrained": homes[0]},
            method=DPO,
            data=DATA["prompts"],
            budget={"iterations": 1},
            eval={"every": 0, "samples": 4, "select": None},
        )
        folder = train(parse.parse(raw)).folder
        train(folder / "config.yaml", ["--budget.iterations=2", f"--policy.pretrained={later}"])
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses[name] = [line["dpo/loss"] for line in lines if "dpo/loss" in line]
    assert len(losses["same"]) == 2
    assert losses["other"] == losses["same"]
