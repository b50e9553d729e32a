"""Best of N: of the samples that are drawn for a decision,
a critic picks the one that is carried out.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.chain.noise import PRIOR
from genpolicy.cli.main import main
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.origin import PERSON
from genpolicy.config.schema import ChainConfig
from genpolicy.config.seal import unsealed
from genpolicy.evaluation.samplers import PRESETS, variants
from genpolicy.learning.critic import Critic, Support, pessimistic
from genpolicy.models.mlp import MLP
from genpolicy.policy.files import load, save_policy, saved
from genpolicy.policy.parts.best_of import BestOf
from genpolicy.policy.parts_files import load_parts
from genpolicy.policy.policy import ChainPolicy
from genpolicy.policy.sampler import deployed_sampler, make_policy, require_trainable
from tests.cli.test_bad_inputs import complaint
from tests.toy_control import GOAL, SPEED, STATE, Recorded, cloned, experiment

torch.set_num_threads(1)
ROWS, STEPS = 6, 4
SAMPLER = ChainConfig(steps=STEPS, kernel={"name": "ddim", "eta": 1.0})
FEW = ["--episodes", "10", "--gifs", "0"]


def near_one(features: Tensor, event: Tensor) -> Tensor:
    """Q = -|a - 1|, summed over the chunk."""
    return -(event - 1).abs().flatten(1).sum(1)


@pytest.fixture(scope="module")
def model() -> MLP:
    torch.manual_seed(0)
    made = MLP(hidden=16, blocks=1, chunk=2)
    made.initialise(Recorded(episodes=8))
    return made


@pytest.fixture(scope="module")
def seen() -> Tensor:
    """Conditions of six rows."""
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))


def names(rows: int = ROWS) -> Noise:
    return Noise(
        7, 3, torch.arange(rows), torch.zeros(rows, dtype=torch.long), torch.arange(rows) + 2
    )


def best(model: MLP, n: int, judge: Any = near_one) -> ChainPolicy:
    return replace(make_policy(model, SAMPLER), judge=judge, best_of=n)


def candidates(policy: ChainPolicy, seen: Tensor, n: int) -> Tensor:
    """Each row's N samples one by one:
    the noise of candidate c is named by member + c 2^32. [B,N,*E].
    """
    noise = names()
    each = [replace(noise, member=noise.member + (c << 32)) for c in range(n)]
    return torch.stack(
        [policy.chain.sample(policy.denoiser, seen, rows, (2, 2)).x0 for rows in each], 1
    )


# -- which sample is carried out -------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 16])
def test_it_is_the_best_of_exactly_these(model: MLP, seen: Tensor, n: int):
    policy = best(model, n)
    drawn = candidates(policy, seen, n)
    worth = torch.stack([near_one(seen, drawn[:, c]) for c in range(n)], 1)
    picked = worth.argmax(1)
    assert len(picked.unique()) > 1, "not one and the same candidate for all"
    chain = policy.sample(seen, names())
    assert torch.allclose(chain.x0, drawn[torch.arange(ROWS), picked], atol=1e-5)
    assert torch.equal(chain.condition, seen)
    assert chain.x.shape == (ROWS, STEPS, 2, 2)
    assert not torch.allclose(chain.x0, drawn[torch.arange(ROWS), worth.argmin(1)], atol=1e-2), (
        "the negative control"
    )


def test_the_best_of_one_is_what_it_was(model: MLP, seen: Tensor):
    before = make_policy(model, SAMPLER).sample(seen, names())
    after = best(model, 1).sample(seen, names())
    for name in ("x", "mean", "std", "x0"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert not torch.equal(best(model, 2).sample(seen, names()).x0, before.x0)


def test_the_first_candidate_is_the_rows_own():
    noise = names()
    for k in (PRIOR, 0, 2):
        own, fan = noise(k, (2, 2)), noise.fan(16)(k, (2, 2)).view(ROWS, 16, 2, 2)
        assert torch.equal(fan[:, 0], own)
        assert torch.equal(noise.fan(4)(k, (2, 2)).view(ROWS, 4, 2, 2), fan[:, :4]), (
            "few are the first of many"
        )
        assert len(fan.flatten(0, 1).flatten(1).unique(dim=0)) == ROWS * 16, "no two are alike"


def test_more_candidates_are_never_worse(model: MLP, seen: Tensor):
    worth = [near_one(seen, best(model, n).sample(seen, names()).x0) for n in (1, 2, 4, 16, 32)]
    for few, many in pairwise(worth):
        assert bool((many >= few - 1e-4).all())
    assert bool((worth[-1] > worth[0] + 0.1).any())


def test_a_judge_turned_around_is_worse(model: MLP, seen: Tensor):
    """The negative control: it is the judge that makes the difference,
    not the number of samples.
    """
    one, right, wrong = (
        near_one(seen, best(model, n, judge).sample(seen, names()).x0)
        for n, judge in ((1, near_one), (16, near_one), (16, lambda f, e: -near_one(f, e)))
    )
    assert bool((wrong <= one + 1e-4).all())
    assert bool((one <= right + 1e-4).all())
    assert bool((wrong < right - 0.1).all())


def test_it_is_the_same_in_any_company(model: MLP, seen: Tensor):
    policy = best(model, 8)
    together = policy.sample(seen, names()).x0
    alone = torch.cat([policy.sample(seen[i : i + 1], names()[i : i + 1]).x0 for i in range(ROWS)])
    assert torch.allclose(together, alone, atol=1e-5)
    order = torch.tensor([4, 0, 5, 2])
    assert torch.allclose(policy.sample(seen[order], names()[order]).x0, together[order], atol=1e-5)
    assert not torch.allclose(
        policy.sample(seen[order], names(4)).x0, together[order], atol=1e-2
    ), "other names"


def test_every_candidate_is_counted(model: MLP, seen: Tensor):
    for n in (1, 5):
        before = model.evaluations
        best(model, n).sample(seen, names(), keep=(0, 0))
        assert model.evaluations - before == n * ROWS * STEPS


def test_the_judge_sees_features_and_scored_events(model: MLP, seen: Tensor):
    """...of every candidate, the N of a row together."""
    asked: list[tuple[Tensor, Tensor]] = []

    def judge(features: Tensor, event: Tensor) -> Tensor:
        asked.append((features, event))
        return near_one(features, event)

    policy = best(model, 4, judge)
    policy.sample(seen, names())
    ((features, event),) = asked
    assert torch.equal(features, seen.repeat_interleave(4, 0))
    assert torch.allclose(event.view(ROWS, 4, 2, 2), candidates(policy, seen, 4), atol=1e-5)


# -- what a config may say -------------------------------------------------------------------------


def test_several_samples_need_a_judge(model: MLP):
    with pytest.raises(
        ConfigError, match=r"best_of is 16, but the policy has no critic .* method rl100 learns one"
    ):
        make_policy(model, replace(SAMPLER, best_of=16))
    with pytest.raises(ConfigError, match="best_of is 0; it must be at least 1"):
        replace(SAMPLER, best_of=0)


def test_what_is_deployed_by_default():
    """The best of several of the kernel's samples, its last step without noise;
    a single one is the kernel's mean.
    """
    assert deployed_sampler(SAMPLER, {}, control=True).kernel["name"] == "mean"
    several = deployed_sampler(SAMPLER, {"best_of": 16}, control=True)
    assert several == replace(SAMPLER, best_of=16, window=(0, STEPS - 1))
    assert deployed_sampler(SAMPLER, {"best_of": 16, "steps": 2}, control=True).window == (0, 1)
    whole = replace(SAMPLER, window=(1, STEPS))
    assert deployed_sampler(whole, {"best_of": 16}, control=True).window == (1, STEPS - 1)
    for asked in (
        {"best_of": 16, "window": (1, 4)},
        {"best_of": 16, "kernel": {"name": "ddim", "eta": 0.0}},
    ):
        assert deployed_sampler(SAMPLER, asked, control=True) == replace(SAMPLER, **asked)


def test_they_are_not_trained():
    require_trainable(SAMPLER, PERSON)
    with pytest.raises(
        ConfigError,
        match=r"no likelihood to train on: leave it at 1 \(eval\.sampler\.best_of is for a policy that has",
    ):
        require_trainable(replace(SAMPLER, best_of=2), PERSON)


@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_a_training_run_that_asks_for_it_is_refused(tmp_path: Path, capsys, plan: list[str]):
    """...whether to be trained or, by a method that learns no critic, only to be deployed."""
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment(tmp_path)))
    arguments = ["train", str(tmp_path / "experiment.yaml"), *plan]
    assert "best_of is 2" in complaint(capsys, tmp_path / "run", *arguments, "--chain.best_of=2")
    assert "best_of is 2, but" in complaint(
        capsys, tmp_path / "run", *arguments, "--eval.sampler.best_of=2"
    )


# -- a critic as the judge -------------------------------------------------------------------------


def judge(seed: int = 0, **options: Any) -> BestOf:
    torch.manual_seed(seed)
    critic = Critic(4, 4, **{"members": 3, "hidden": 8, **options})
    critic.scale.fit(2 + 3 * torch.randn(20, 4))
    return BestOf(critic, 0.5)


CRITICS = {
    "squares": {},
    "histograms": {"support": Support(-2.0, 1.0)},
    "one layer": {"layers": 1, "members": 1},
}


@pytest.mark.parametrize("options", CRITICS.values(), ids=CRITICS)
def test_a_judge_comes_back_as_it_was(model: MLP, tmp_path: Path, options: dict[str, Any]):
    made = judge(**options)
    made.save(tmp_path)
    drawn = torch.get_rng_state()
    again = BestOf.load(tmp_path, model)
    assert torch.equal(torch.get_rng_state(), drawn), "loading draws no numbers"
    features, event = torch.randn(9, 4), torch.randn(9, 2, 2)
    assert torch.equal(made(features, event), again(features, event))
    assert torch.equal(again(features, event), pessimistic(made.critic(features, event), 0.5))
    assert not again(features, event).requires_grad
    assert again.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(a, made.state_dict()[n]) for n, a in again.state_dict().items())
    assert not torch.equal(judge(1, **options)(features, event), again(features, event)), (
        "the negative control"
    )


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("judge.json", None, r"is incomplete: .*judge\.json"),
        ("judge.safetensors", None, r"is incomplete: .*judge\.safetensors"),
        ("", None, "is incomplete"),
        ("judge.json", b'{"inputs": 8', "is damaged"),
        (
            "judge.json",
            b'{"inputs": 9, "members": 3, "hidden": 8, "layers": 2, "support": null,'
            b' "pessimism": 1}',
            "is damaged",
        ),
        ("judge.json", b"[]", "is damaged"),
        ("judge.json", b'{"inputs": 8, "pessimism": 1.0}', "is damaged"),
        ("judge.safetensors", b"nothing", "is damaged"),
    ],
)
def test_a_damaged_judge_is_one_sentence(
    model: MLP, tmp_path: Path, file: str, content: bytes | None, said: str
):
    """The last of the settings are those of a judge of another shape."""
    policy = make_policy(model, SAMPLER, {"best_of": judge()})
    save_policy(policy, {"name": "mlp"}, SAMPLER, tmp_path / "policy")
    section = {"name": "mlp", "pretrained": str(tmp_path / "policy")}
    assert load_parts(section, model).keys() == {"best_of"}, "control: a whole one is loaded"
    damaged = tmp_path / "policy/parts/best_of" / file
    if content is not None:
        damaged.write_bytes(content)
    elif file:
        damaged.unlink()
    else:
        damaged.rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=f"^the policy's part 'best_of' in .* {said}") as raised:
        load_parts(section, model)
    assert "\n" not in str(raised.value)


def judged(model: MLP, folder: Path, **entry: Any) -> dict[str, Any]:
    """The policy section of a saved policy with a judge; ``entry`` is changed in genpolicy.json."""
    save_policy(make_policy(model, SAMPLER, {"best_of": judge()}), {"name": "mlp"}, SAMPLER, folder)
    file = folder / "genpolicy.json"
    description = unsealed(file.read_text())
    assert description["parts"] == {"best_of": {"kind": "best_of", "version": 1}}
    description["parts"]["best_of"] |= entry
    file.write_text(json.dumps(description))
    return {"name": "mlp", "pretrained": str(folder)}


def test_a_part_from_a_later_version_is_refused(model: MLP, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'best_of' \(best_of\) has version 2; .* up to 1"):
        load_parts(judged(model, tmp_path / "later", version=2), model)
    with pytest.raises(
        ConfigError, match=r"of kind 'oracle', which .* does not know; it knows base"
    ):
        load_parts(judged(model, tmp_path / "unknown", kind="oracle"), model)
    assert load_parts(judged(model, tmp_path / "same", version=1), model)


# -- a policy with its judge, on disk and through the door -----------------------------------------


def progress() -> BestOf:
    """A critic that has learned how near to its goal the point of the toy
    is after a chunk of two actions.
    """
    data, generator = Recorded(skill=0.15), torch.Generator().manual_seed(0)
    mean, std = (
        torch.cat([data.stats[name][s] for name in (STATE, GOAL)]) for s in ("mean", "std")
    )
    low, high = data.stats["action"]["min"], data.stats["action"]["max"]
    torch.manual_seed(0)
    critic = Critic(4, 4, members=2, hidden=32)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in range(400):
        features = 1.5 * torch.randn(256, 4, generator=generator)
        event = 2.4 * torch.rand(256, 2, 2, generator=generator) - 1.2
        state, goal = (features * std + mean).split(2, 1)
        walked = SPEED * ((event + 1) / 2 * (high - low) + low).clamp(-1, 1).sum(1)
        loss = critic.loss(features, event, -(goal - state - walked).norm(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return BestOf(critic, 1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder whose policy has a judge; it is deployed with the mean of its kernel."""
    folder = tmp_path_factory.mktemp("best_of")
    home = Path(cloned(folder)).parent
    found = saved(home)
    policy = found.load().attach("best_of", progress())
    section = parse.load(home / "config.yaml").policy
    save_policy(policy, section, found.sampler, home / "policy")
    return home


def acted(policy: ChainPolicy) -> Tensor:
    condition = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2))
    return policy.model.decode(policy.sample(condition, names(), keep=(0, 0)).x0)


def test_a_policy_comes_back_with_its_judge(run: Path, tmp_path: Path):
    found = saved(run)
    assert found.load().parts.keys() == {"best_of"}
    assert isinstance(found.load().judge, BestOf)
    assert (found.sampler.best_of, found.load().best_of) == (1, 1), "what is deployed is as it was"
    several = load(run, best_of=8, kernel={"name": "ddim", "eta": 1.0})
    assert several.best_of == 8
    assert (acted(several) - acted(replace(several, best_of=1))).abs().max() > 0.01
    sampler = replace(saved(run).sampler, kernel={"name": "ddim", "eta": 1.0})
    section = parse.load(run / "config.yaml").policy
    save_policy(several, section, sampler, tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.best_of == 8, "the sampler that is saved is the policy's"
    assert torch.equal(acted(again), acted(several))
    plain = make_policy(several.model, sampler)
    save_policy(plain, section, replace(sampler, best_of=8), tmp_path / "again")
    assert (load(tmp_path / "again").judge, load(tmp_path / "again").best_of) == (None, 1)
    assert not (tmp_path / "again/parts").exists(), "what was there before is gone"
    with pytest.raises(ConfigError, match="best_of is 8, but the policy has no critic"):
        load(tmp_path / "again", best_of=8)


def test_what_best_of_n_is(run: Path):
    asked = ["last_mean", "best_of_4", "best_of_16", "best_of=4", "best_of_1"]
    made = {v.name: v for v in variants(asked, saved(run))}
    last, four = made["last_mean"].sampler, made["best_of_4"].sampler
    assert four == replace(last, best_of=4)
    assert four.window == (0, 3)
    assert four.kernel == parse.load(run / "config.yaml").chain.kernel
    assert made["best_of_16"].sampler == replace(last, best_of=16)
    assert made["best_of_1"].sampler == last
    assert made["best_of=4"].sampler == replace(made["deployed"].sampler, best_of=4)
    policy = saved(run).load()
    assert [(v.of(policy).best_of, v.of(policy).judge) for v in made.values()] == [
        (v.sampler.best_of, policy.judge) for v in made.values()
    ]


def test_there_is_something_to_pick_from(run: Path):
    """...but for a kernel's mean, the negative control:
    in a policy that has learned it is nearly one for all noise.
    """
    policy, condition = (
        saved(run).load(),
        torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2)),
    )
    chain = parse.load(run / "config.yaml").chain
    deployed = (deployed_sampler(chain, {"best_of": n}, control=True) for n in (1, 16))
    drawn = [
        candidates(make_policy(policy.model, sampler, policy.parts), condition, 16)
        for sampler in deployed
    ]
    mean, several = (float(x.std(1).mean()) for x in drawn)
    assert several > 20 * mean


def test_only_its_own_name_draws_several(run: Path):
    """The other names are still single samples where the best of several is deployed."""
    asked = [name for name in PRESETS if name not in ("deployed", "native")]
    made = {v.name: v.sampler.best_of for v in variants(asked, saved(run, best_of=8))}
    assert made == {**dict.fromkeys(asked, 1), "deployed": 8, "best_of_16": 16}


def test_evaluate_tells_what_it_costs_and_brings(run: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("genpolicy.cli.evaluate_episodes.DECISIONS", 20)
    asked = [
        "evaluate",
        "--trust",
        str(run),
        "--episodes",
        "40",
        "--gifs",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert main([*asked, "--samplers", "last_mean", "best_of_4", "best_of_16"]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    others = {entry["name"]: entry for entry in found["samplers"]}
    assert [
        others[name]["nfe_per_decision"] for name in ("last_mean", "best_of_4", "best_of_16")
    ] == [4, 16, 64]
    assert others["best_of_4"]["sampler"]["best_of"] == 4
    assert found["sampler"]["best_of"] == 1
    assert others["best_of_16"]["latency_ms"]["p50"] > 0
    returns = [others[name]["return"] for name in ("last_mean", "best_of_4", "best_of_16")]
    assert returns[0] < returns[1] < returns[2]
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert " 64 " in lines["best_of_16"]


def test_a_wrong_judge_brings_harm(run: Path, tmp_path: Path):
    """The negative control of what it brings: the same critic, its readout turned around."""
    wrong = saved(run).load().attach("best_of", progress())
    critic = wrong.judge.critic  # type: ignore[union-attr]
    readout = [critic.weights[-1], critic.biases[-1]]
    with torch.no_grad():
        for part in readout:
            part.neg_()
    section = parse.load(run / "config.yaml").policy
    save_policy(wrong, section, saved(run).sampler, tmp_path / "policy")
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    returns = {}
    for home in (run, tmp_path):
        out = tmp_path / "out"
        asked = [
            "evaluate",
            "--trust",
            str(home),
            "--episodes",
            "40",
            "--gifs",
            "0",
            "--out",
            str(out),
        ]
        assert main([*asked, "--samplers", "last_mean", "best_of_4"]) == 0
        entries = json.loads((out / "eval.json").read_text())["samplers"]
        returns[home] = {entry["name"]: entry["return"] for entry in entries}
    assert returns[tmp_path]["last_mean"] == returns[run]["last_mean"]
    assert returns[tmp_path]["best_of_4"] < returns[run]["last_mean"] < returns[run]["best_of_4"]


def test_it_is_listed(capsys):
    assert main(["list", "samplers"]) == 0
    assert "best_of_16" in capsys.readouterr().out
    assert main(["evaluate", "--help"]) == 0
    assert "best_of_16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samplers", "best_of_0"], "a sampler is 'best_of_0'; did you mean best_of_16"),
        (["--samplers", "best_of"], "did you mean best_of_16"),
        (["--samplers", "best_of=0"], "best_of is 0; it must be at least 1"),
        (["--samplers", "best_of=2.5"], "best_of is 2.5; it must be a whole number"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    run: Path, tmp_path: Path, capsys, arguments: list[str], said: str
):
    out = tmp_path / "out"
    assert said in complaint(
        capsys, out, "evaluate", "--trust", str(run), "--out", str(out), *FEW, *arguments
    )


def test_a_policy_without_a_judge_says_so(run: Path, tmp_path: Path, capsys):
    found, out = saved(run), str(tmp_path / "out")
    plain = make_policy(found.load().model, found.sampler)
    save_policy(plain, found.policy, found.sampler, tmp_path / "policy")
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    for arguments in (["--samplers", "best_of_4"], ["--sampler", "best_of=4"]):
        asked = ["evaluate", "--trust", str(tmp_path), "--out", out, *arguments]
        said = complaint(capsys, tmp_path / "out", *asked)
        assert "best_of is 4, but the policy has no critic" in said


def test_a_policy_with_a_damaged_judge_says_so(run: Path, tmp_path: Path, capsys):
    file = run / "policy/parts/best_of/judge.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    try:
        said = complaint(
            capsys,
            tmp_path / "out",
            "evaluate",
            "--trust",
            str(run),
            "--out",
            str(tmp_path / "out"),
        )
        assert f"{file} is not as it was written: the saved policy" in said
    finally:
        file.write_bytes(whole)
