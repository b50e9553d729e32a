"""RL-100: its course, what a candidate is and what becomes of it, the loss by hand,
and that it learns.
"""

import json
import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.distributions import Normal, kl_divergence

from genpolicy.chain import Noise
from genpolicy.config import parse, schema
from genpolicy.config.errors import ConfigError
from genpolicy.learning.acceptance import Comparison
from genpolicy.learning.objective import clipped_surrogate
from genpolicy.methods import rl100
from genpolicy.methods.parts import ppo
from genpolicy.methods.rl100 import RL100, _Pipeline
from genpolicy.policy.files import saved
from genpolicy.rollout.minibatch import Batch
from genpolicy.training.experiment import rehearse, train
from genpolicy.training.processes import Processes
from tests import toy_control
from tests.peers import peers, together
from tests.rl100_toy import CLIPPED, SMALL, experiment

BETTER, WORSE = Comparison(1.0, 0.0, 1.0), Comparison(-1.0, 0.0, 1.0)
LR = {"weight_decay": 0.0, "max_grad_norm": 1e9}


def built(folder, method=(), optimizer=(), **sections):
    """A run that stands at iteration 1, and its pipeline, which has learned nothing yet."""
    folder.mkdir(exist_ok=True)
    raw = experiment(folder, method=dict(method), optimizer={**LR, **dict(optimizer)}, **sections)
    raw.pop("output")
    run, settings = toy_control.prepared(folder, **raw)
    return run, _Pipeline(settings, run)


def improving(folder, verdict=BETTER, **offline):
    """A pipeline that is about to improve what a data set shows; the gate says ``verdict``."""
    run, pipeline = built(
        folder, {"stage": "offline", "offline": {"episodes": 0, "lr": 1e-2, **offline}}
    )
    toy_control.enter(run, "improve")
    pipeline.offline.verdict = lambda in_force: verdict
    return run, pipeline


def state(run):
    """The numbers that an update changes, flat."""
    optimizer = run.learner.optimizer.state_dict()
    moments = [value for each in optimizer["adamw"]["state"].values() for value in each.values()]
    return [*run.weights().values, *moments, *(optimizer["ema"] or [])], optimizer["updates"]


def same(a, b):
    return (
        a[1] == b[1]
        and len(a[0]) == len(b[0])
        and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    )


def copied(found):
    return [value.clone() for value in found[0]], found[1]


# -- the course ------------------------------------------------------------------------------------


def stages(run):
    """The stages' names in order, one per iteration."""
    return [stage.name for stage in run.stages.all for _ in range(stage.iterations or 1)]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, "imitate imitate collect criticise improve improve online"),
        ({"stage": "imitation"}, "imitate imitate"),
        ({"stage": "offline"}, "collect criticise improve improve"),
        ({"stage": "online"}, "online"),
        (
            {"stage": "offline", "offline": {"episodes": 0, "candidates": 1, "rounds": 2}},
            "criticise improve " * 2,
        ),
        (
            {"stage": "offline", "offline": {"rounds": 2, "recloning": 5, "candidates": 1}},
            "collect reclone criticise improve " * 2,
        ),
    ],
)
def test_stages_follow_each_other(tmp_path, method, expected):
    run, _ = built(tmp_path, method)
    assert stages(run) == expected.split()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All three stages, from one YAML mapping."""
    patch = pytest.MonkeyPatch()
    patch.setattr("genpolicy.evaluation.curves.figures", lambda folder: None)
    critics = []
    honest = _Pipeline.criticise

    def criticise(self):
        through = honest(self)
        critics.append(
            (self, {n: p.detach().clone() for n, p in self.offline.value.q.state_dict().items()})
        )
        return through

    patch.setattr(_Pipeline, "criticise", criticise)
    result = train(
        parse.parse(experiment(tmp_path_factory.mktemp("whole"), budget={"iterations": 8}))
    )
    patch.undo()
    return result, critics


def test_three_stages_from_one_experiment(whole):
    result, _ = whole
    rows = lines(result.folder)
    of = {i: {key for row in rows if row["iteration"] == i for key in row} for i in range(1, 9)}
    assert [i for i in of if "bc/loss" in of[i]] == [1, 2]
    assert [i for i in of if "reward/return" in of[i]] == [3, 7, 8]
    assert [i for i in of if "world/held_out" in of[i]] == [4]
    assert [i for i in of if "gate/accepted" in of[i]] == [5, 6]
    assert [i for i in of if "policy/kl" in of[i]] == [5, 6]
    assert [i for i in of if "policy/ratio_mean" in of[i]] == [5, 6, 7, 8]
    assert [i for i in of if "critic/explained" in of[i]] == [7, 8]
    assert result.summary["replay_gap"] < 0.01
    assert result.summary["env_decisions"] > 3 * 8
    counted = [row["env_steps"] for row in rows if "env_steps" in row]
    assert [b > a for a, b in pairwise([0, *counted])] == [
        False,
        False,
        True,
        False,
        False,
        False,
        True,
        True,
    ]


def test_milestones_are_examined_and_load_again(whole):
    """Each as it was deployed; the one that picks the best of several has its judge:
    the critic, as it was then.
    """
    result, critics = whole
    found = {path.name for path in (result.folder / "stages").iterdir()}
    assert found == {"imitation", "best_of_3", "offline", "candidate-5", "candidate-6"}
    for name, iteration in (("imitation", 2), ("best_of_3", 4), ("offline", 6)):
        (row,) = [row for row in lines(result.folder) if f"{name}/success_rate" in row]
        assert row["iteration"] == iteration
        policy = saved(str(result.folder / "stages" / name)).load()
        assert policy.best_of == (3 if name == "best_of_3" else 1)
    picking = saved(str(result.folder / "stages" / "best_of_3")).load()
    assert picking.judge is not None
    ((pipeline, weights),) = critics
    features, event = torch.randn(5, 4), torch.randn(5, 2, 2)
    pipeline.offline.value.q.load_state_dict(weights)
    with torch.no_grad():
        expected = pipeline.offline.value.lower(pipeline.offline.value.q, features, event)
    assert torch.allclose(picking.judge(features, event), expected, atol=1e-6)
    assert list(picking.chain.stochastic) == [0, 1], "its last step is without noise"
    noise = Noise.rows(0, 1, torch.arange(5), 1)
    plain = saved(str(result.folder / "stages" / "offline")).load()
    assert not torch.equal(picking.sample(features, noise).x0, plain.sample(features, noise).x0)


def test_imitation_alone_ends_before_its_budget(tmp_path):
    result = train(
        parse.parse(experiment(tmp_path, method={"stage": "imitation"}, budget={"iterations": 50}))
    )
    assert result.summary["iterations"] == 2
    assert result.summary["over"]
    assert {path.name for path in (result.folder / "stages").iterdir()} == {"imitation"}


@pytest.mark.parametrize(
    ("family", "kernel", "window"),
    [
        ("flow", {"name": "sde", "a": 0.7}, None),
        ("flow", {"name": "cps", "a": 0.8}, None),
        (
            "flow",
            {"name": "floorstd", "floor": 0.1, "kernel": {"name": "ddim", "eta": 1.0}},
            [0, 3],
        ),
        ("vp", CLIPPED, [0, 3]),
    ],
)
def test_offline_alone_on_data_from_elsewhere(tmp_path, family, kernel, window):
    """No environment is played in but for the examinations; flows and single actions too."""
    result = train(
        parse.parse(
            experiment(
                tmp_path,
                policy={"name": "mlp", "hidden": 16, "blocks": 1, "chunk": 1, "family": family},
                chain={"steps": 3, "kernel": kernel, "window": window},
                method={"stage": "offline", "offline": {"episodes": 0}},
            )
        )
    )
    assert result.summary["over"]
    assert result.summary["iterations"] == 3
    assert result.summary["env_steps"] == result.summary["env_decisions"] == 0
    gates = [row for row in lines(result.folder) if "gate/gain" in row]
    assert len(gates) == 2
    assert all(
        math.isfinite(row["gate/gain"]) and math.isfinite(row["gate/distance"]) for row in gates
    )
    assert result.summary["replay_gap"] < 0.01
    assert not (result.folder / "episodes").exists()


def test_online_alone_needs_a_policy_and_no_data(tmp_path, whole):
    start = str(whole[0].folder / "stages" / "imitation")
    result = train(
        parse.parse(
            experiment(
                tmp_path,
                policy={"name": "mlp", "pretrained": start},
                data=None,
                method={"stage": "online"},
                budget={"iterations": 2},
            )
        )
    )
    assert not result.summary["over"]
    assert result.summary["env_steps"] > 0
    assert not (result.folder / "stages").exists()


def test_what_does_not_fit_is_told(tmp_path, whole):
    start = str(whole[0].folder / "stages" / "imitation")
    pretrained = {"policy": {"name": "mlp", "pretrained": start}, "data": None}
    for number, (sections, said) in enumerate(
        (
            (pretrained, "name them in the data section"),
            (
                {**pretrained, "method": {"stage": "offline", "offline": {"episodes": 0}}},
                "nothing to learn from",
            ),
            (
                {
                    "chain": {
                        "steps": 3,
                        "kernel": CLIPPED | {"kernel": {"name": "ddim", "eta": 0.0}, "floor": 0.0},
                    }
                },
                "std",
            ),
            ({"method": {"stage": "both"}}, "stage"),
            ({"method": {"offline": {"candidates": 0}}}, "candidates is 0"),
            ({"method": {"online": {"lam": 1.5}}}, "lam is 1.5"),
        )
    ):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(ConfigError, match=said):
            train(parse.parse(experiment(tmp_path / str(number), **sections)))


def test_a_rehearsal_goes_through_every_stage(tmp_path):
    """Each once, online past its warm-up; the rest of the budget is online RL's;
    nothing is written.
    """
    raw = experiment(tmp_path, method={"online": {"warm_up": 2}}, budget={"iterations": 40})
    raw["output"] = str(tmp_path / "run")
    (tmp_path / "rl100.yaml").write_text(yaml.safe_dump(raw))
    cost = rehearse(tmp_path / "rl100.yaml")[1]
    stages = {stage.stage: stage for stage in cost.stages}
    assert list(stages) == ["imitate", "collect", "criticise", "improve", "online"]
    assert [stage.iterations for stage in cost.stages] == [2, 1, 1, 2, None]
    assert "update" in stages["online"].phases, (
        "control: a first iteration of the stage would train the value alone"
    )
    assert stages["collect"].env_steps > 0 == stages["criticise"].env_steps
    assert cost.iterations == 40
    each = {name: stage.evaluations for name, stage in stages.items()}
    expected = 2 * each["imitate"] + each["collect"] + 2 * each["improve"] + 34 * each["online"]
    assert cost.evaluations == pytest.approx(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rl100.yaml"]


def test_without_demonstrations_the_critic_sees_the_runs_own_episodes(tmp_path):
    """The run's own episodes are imitated all the same;
    with demonstrations, the control, those are what the replay begins with.
    """
    lengths = {}
    for demonstrations in (True, False):
        offline = {"demonstrations": demonstrations, "episodes": 4}
        (tmp_path / str(demonstrations)).mkdir()
        run, pipeline = built(
            tmp_path / str(demonstrations), {"stage": "offline", "offline": offline}
        )
        toy_control.enter(run, "collect")
        pipeline.collect()
        e = pipeline.offline.experience
        everything, recorded = (
            e.everything,
            int((e.everything.episode < len(run.data.episode.unique())).sum()),
        )
        assert 0 < recorded < len(everything)
        lengths[demonstrations] = len(e.replay), len(everything), recorded
        drawn = e.redraw(30, 0)[1]
        first = 0 if demonstrations else recorded
        assert torch.equal(e.replay.event[drawn], everything.event[first + drawn])
        views = len(everything.views) - (0 if demonstrations else int(everything.now[recorded]))
        assert len(e.replay.views) == views
        context, event, _ = e.imitable(torch.arange(int(everything.success.sum())))
        assert len(context) == len(event) == int(everything.success.sum())
    (whole, everything, recorded), (own, same_everything, _) = lengths[True], lengths[False]
    assert whole == everything == same_everything
    assert own == everything - recorded


# -- a candidate -----------------------------------------------------------------------------------


def test_without_advantage_and_without_kl_nothing_changes(tmp_path):
    for name, scale in (("none", 0.0), ("some", 1.0)):
        run, pipeline = improving(tmp_path / name, kl=0.0, lr=1e-2, far=1e9)
        honest = pipeline.offline.value.advantage
        pipeline.offline.value.advantage = lambda f, e, honest=honest, scale=scale: (
            scale * honest(f, e)
        )
        before = run.weights().values
        assert pipeline.improve() is False
        moved = max(
            float((a - b).abs().max()) for a, b in zip(before, run.weights().values, strict=True)
        )
        assert (moved == 0) == (scale == 0)
        assert run.learner.optimizer.updates > 0


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_refused_candidate_is_undone_to_the_bit(tmp_path, ema):
    """After one that was accepted, so that there are moments to restore;
    it was a candidate: it had moved.
    """
    run, pipeline = improving(tmp_path, far=1e9)
    settings = schema.OptimizerConfig(lr=1e-2, weight_decay=0.01, ema=ema, warmup=5)
    run.plan([replace(run.stages.now, optimizer=settings)])
    fresh = copied(state(run))
    assert pipeline.improve() is False
    accepted = copied(state(run))
    assert not same(fresh, accepted), "an accepted candidate stays"
    pipeline.offline.verdict = lambda in_force: WORSE
    run.spent.iteration, moved = 2, []
    rewind = run.rewind
    run.rewind = lambda point: moved.append(copied(state(run))) or rewind(point)
    assert pipeline.improve() is False
    assert not same(moved[0], accepted), "there was something to undo"
    assert same(state(run), accepted)
    assert [run.metrics.numbers[f"gate/{n}"] for n in ("accepted", "gain")] == [
        [1.0, 0.0],
        [1.0, -1.0],
    ]
    run.rewind = lambda point: None  # control
    pipeline.improve()
    assert not same(state(run), accepted)


def test_the_next_candidate_is_what_it_would_have_been(tmp_path):
    """A refused candidate leaves no trace in the one after it."""
    found = []
    for name in ("refused", "never"):
        run, pipeline = improving(tmp_path / name, verdict=WORSE)
        if name == "refused":
            pipeline.improve()
        pipeline.offline.verdict, run.spent.iteration = lambda in_force: BETTER, 2
        run.replay_check.again = False
        pipeline.improve()
        found.append(copied(state(run)))
    assert same(*found)


def test_the_verdict_compares_the_candidate_with_what_it_came_from(tmp_path):
    """The comparison is on the same starts; the gain has the sign of the score's."""
    run, pipeline = improving(tmp_path)
    del pipeline.offline.verdict
    point = run.save_point()
    assert pipeline.offline.verdict(point[0]) == Comparison(
        0.0, 0.0, pipeline.offline.verdict(point[0]).old
    )
    for p in run.trainable:
        p.data += 0.05
    candidate = run.weights().values
    new = (
        pipeline.offline.evaluation(
            pipeline.offline.experience.replay, pipeline.offline.experience.features
        )
        .double()
        .mean()
    )
    verdict = pipeline.offline.verdict(point[0])
    assert all(torch.equal(a, b) for a, b in zip(candidate, run.weights().values, strict=True))
    assert verdict.old + verdict.difference == pytest.approx(float(new), abs=1e-6)
    with point[0].using():
        old = (
            pipeline.offline.evaluation(
                pipeline.offline.experience.replay, pipeline.offline.experience.features
            )
            .double()
            .mean()
        )
    assert verdict.old == pytest.approx(float(old), abs=1e-6)


@pytest.mark.parametrize("agreeing", [True, False])
def test_a_process_that_finds_another_verdict_follows_the_main_one(tmp_path, monkeypatch, agreeing):
    accelerators = peers(2)
    pipelines = []
    for index, accelerator in enumerate(accelerators):
        offline = {"episodes": 0, "lr": 1e-2, "far": 1e9, "delta": 0.0, "z": 0.0}
        run, pipeline = built(
            tmp_path / str(index), {"stage": "offline", "offline": offline}, accelerator=accelerator
        )
        toy_control.enter(run, "improve")
        # the candidate's score, then that of the policy in force: one bit apart
        scores = iter([torch.full((2,), 1.0 - 2**-23 * index), torch.full((2,), 1.0 - 2**-24)])
        pipeline.offline.evaluation = lambda replay, features, scores=scores: next(scores)
        pipelines.append(pipeline)
    if not agreeing:
        monkeypatch.setattr(Processes, "agreed", lambda self, values: list(values))
    together([pipeline.improve for pipeline in pipelines], accelerators)
    accepted = [pipeline.run.metrics.numbers["gate/accepted"] for pipeline in pipelines]
    weights = [pipeline.run.weights().values for pipeline in pipelines]
    alike = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert accepted == ([[1.0], [1.0]] if agreeing else [[1.0], [0.0]])
    assert alike == agreeing


def test_who_went_too_far_is_refused_whatever_the_gate_says(tmp_path):
    run, pipeline = improving(tmp_path, far=1e-6)
    before = copied(state(run))
    assert pipeline.improve() is True, "and the round is over"
    assert same(state(run), before)
    assert run.metrics.numbers["gate/distance"][0] > 1e-6
    left = []
    run.advance(False, left.append)
    assert not left, "control: the stage has a second candidate"
    run.advance(True, left.append)
    assert left == ["improve"]
    assert run.spent.over, "it was the last"


def test_distance_is_the_kl_of_whole_chains_in_nats(tmp_path):
    """The distance is worked out by hand at the chains that the policy draws now, summed over steps
    and the chunk, the mean over decisions.
    """
    run, pipeline = improving(tmp_path, states=9)
    assert pipeline._distance() == 0
    anchor = run.weights()
    for p in run.trainable:
        p.data += 0.03 * torch.randn_like(p)
    found = pipeline._distance()
    chains = pipeline.offline.experience.redraw(
        pipeline.settings.offline.states, pipeline.settings.offline.sweeps
    )[0].trajectory
    total = 0.0
    with torch.no_grad(), anchor.using():
        for k in chains.steps:
            then, now = run.policy.transition(chains, k), chains.acted(k)
            total += kl_divergence(
                Normal(now.mean, now.std), Normal(then.mean, then.std.expand_as(now.mean))
            ).sum()
    assert found == pytest.approx(float(total) / 9, rel=1e-4)
    pipeline.anchor.renew()
    assert pipeline._distance() == 0


@pytest.mark.parametrize(
    ("rates", "kept"), [((0.4, 0.5), True), ((0.4, 0.4), False), ((0.4, 0.3), False)]
)
def test_real_episodes_have_the_last_word(tmp_path, rates, kept):
    """The policy in force is tried first, and once; then the candidate, from the same starts."""
    run, pipeline = improving(tmp_path, check=7)
    before, answers, weights = copied(state(run)), list(rates), []

    def try_out(episodes, name):
        assert (episodes, name) == (7, pipeline.anchor.iteration)
        weights.append(run.weights().values)
        return answers.pop(0)

    run.try_out = try_out
    pipeline.improve()
    assert same(state(run), before) != kept
    assert run.metrics.numbers["gate/accepted"] == [float(kept)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], before[0], strict=False)), (
        "the first is the one in force"
    )
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert pipeline.anchor.rate == (rates[1] if kept else rates[0])
    answers.append(0.9)
    pipeline.improve()
    assert len(weights) == 3, "the policy in force is not tried again"


def test_trying_out_is_paired_and_counted(tmp_path):
    run, _ = improving(tmp_path)
    asked, honest = [], run.collector.environments.reset
    run.collector.environments.reset = lambda slots, seeds: (
        asked.append(list(seeds)) or honest(slots, seeds)
    )
    one = run.try_out(6, 1)
    first = [seed for seeds in asked for seed in seeds]
    asked.clear()
    assert run.try_out(6, 1) == one
    assert [seed for seeds in asked for seed in seeds] == first
    assert len(set(first)) == 6
    assert run.metrics.env_steps >= 12
    assert run.metrics.collected >= 12
    asked.clear()
    run.try_out(6, 2)
    assert not {seed for seeds in asked for seed in seeds} & set(first), (
        "control: another name, other starts"
    )


def test_a_redraw_shows_what_was_encoded_once(tmp_path):
    """Recorded views are encoded when they are first asked for,
    and not again while the encoder stands still.
    """
    run, pipeline = improving(tmp_path, states=20)
    e = pipeline.offline.experience
    conditions = e.conditions.clone()
    honest = run.policy.model.encode
    run.policy.model.encode = lambda context: pytest.fail("the encoder was asked again")
    rollout, rows = pipeline.offline.experience.redraw(pipeline.settings.offline.states, 0)
    assert torch.equal(rollout.trajectory.condition, conditions[rows])
    assert {int(row) for row in rows} <= {int(row) for row in e.replay.now}
    assert len(rows.unique()) > 10
    again, other = (
        pipeline.offline.experience.redraw(pipeline.settings.offline.states, 0),
        pipeline.offline.experience.redraw(pipeline.settings.offline.states, 1),
    )
    assert torch.equal(again[0].trajectory.x0, rollout.trajectory.x0)
    assert torch.equal(again[1], rows)
    assert not torch.equal(other[1], rows), "every sweep draws decisions"
    assert not torch.equal(other[0].trajectory.x0, rollout.trajectory.x0)
    pipeline.improve()
    assert torch.equal(e.conditions, conditions)
    run.policy.model.encode = honest
    e.renew()
    assert torch.equal(e.conditions, conditions)


@pytest.mark.parametrize("samples", [1, 4])
def test_the_advantage_is_that_of_what_was_drawn(tmp_path, samples):
    """Not of what was recorded: A(s, a) of the redrawn chunk, against V or the state's other
    samples, normalised over the sweep.
    """
    run, pipeline = improving(tmp_path, sweeps=1, states=20, samples=samples)
    told, honest = [], pipeline._learn
    pipeline._learn = lambda rollout, advantage, *rest: (
        told.append((rollout, advantage)) or honest(rollout, advantage, *rest)
    )
    pipeline.improve()
    ((rollout, advantage),) = told
    seen, x0 = run.policy.model.features(rollout.trajectory.condition), rollout.trajectory.x0
    with torch.no_grad():
        raw = q = pipeline.offline.value.lower(pipeline.offline.value.q, seen, x0)
        if samples == 1:
            raw = q - pipeline.offline.value.v(seen)
        else:
            for i in range(len(q)):
                others = [j for j in range(len(q)) if j // samples == i // samples and j != i]
                assert torch.equal(seen[others[0]], seen[i])
                raw = raw.index_fill(0, torch.tensor(i), float(q[i] - q[others].mean()))
            assert len({tuple(row.tolist()) for row in x0.flatten(1)}) == len(q), (
                "every sample is a draw of its own"
            )
    assert torch.allclose(advantage.float(), (raw - raw.mean()) / raw.std(correction=0), atol=1e-4)


# -- the loss --------------------------------------------------------------------------------------


def perturbed(folder, **offline):
    """A redrawn rollout, and a policy that has moved since; its anchor has not."""
    run, pipeline = improving(folder, **{"states": 10, **offline})
    rollout, _ = pipeline.offline.experience.redraw(pipeline.settings.offline.states, 0)
    draw = torch.Generator().manual_seed(5)
    for p in run.trainable:
        p.data += 0.02 * torch.randn(p.shape, generator=draw)
    return run, pipeline, rollout


def test_the_gradient_of_the_kl_is_that_of_the_analytic_one(tmp_path):
    """beta times the gradient of KL(N(mean, s) || N(mean at the stage's start, s)),
    summed over the chunk, mean over pairs.
    """
    run, pipeline, rollout = perturbed(tmp_path)
    chains, beta = rollout.trajectory, 0.7
    with torch.no_grad(), pipeline.anchor.weights.using():
        start = [run.policy.transition(chains, k) for k in chains.steps]
    divergences = []
    for k, then in zip(chains.steps, start, strict=True):
        now = run.policy.transition(chains, k)
        std = now.std.expand_as(now.mean)
        divergences.append(
            kl_divergence(Normal(now.mean, std), Normal(then.mean, std)).flatten(1).sum(1)
        )
    loss = beta * torch.stack(divergences).mean()
    expected = torch.autograd.grad(loss, run.trainable)
    zero = torch.zeros(len(chains))
    told = rl100.partial(pipeline.loss, clip=0.2, kl=beta)
    means = run.update(rollout, Batch(slice(0, len(chains))), zero, told, pipeline.anchor.weights)
    assert means["kl"] * beta == pytest.approx(float(loss.detach()), rel=1e-4)
    assert means["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    largest = max(float(g.abs().max()) for g in expected)
    assert largest > 1e-3
    for parameter, gradient in zip(run.trainable, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-4 * largest)
    with pytest.raises(AssertionError):  # control: a mean over the chunk is another number
        assert means["kl"] == pytest.approx(
            float(torch.stack(divergences).mean().detach()) / 4, rel=1e-2
        )


def test_a_policy_at_its_anchor_feels_no_kl(tmp_path):
    run, pipeline = improving(tmp_path, states=10)
    rollout, _ = pipeline.offline.experience.redraw(pipeline.settings.offline.states, 0)
    told = rl100.partial(pipeline.loss, clip=0.2, kl=5.0)
    batch, zero = Batch(slice(0, 10)), torch.zeros(10)
    assert run.update(rollout, batch, zero, told, pipeline.anchor.weights)["kl"] < 1e-9


def test_the_loss_by_hand(tmp_path):
    """max(-A rho, -A clip(rho)) + beta KL, rho the ratio of the chunk's whole density,
    one advantage for all steps.
    """
    run, pipeline, rollout = perturbed(tmp_path)
    chains, advantage, apart = rollout.trajectory, torch.randn(10), []
    for k in chains.steps:
        step = run.policy.score(chains, k, advantage, pipeline.anchor.weights)
        found, metrics = pipeline.loss(step, clip=0.2, kl=0.3)
        new, old = (Normal(g.mean, g.std.expand_as(g.mean)) for g in (step.new, chains.acted(k)))
        ratio = (
            (new.log_prob(chains.after(k)) - old.log_prob(chains.after(k))).flatten(1).sum(1).exp()
        )
        assert torch.allclose(
            ppo.chunk_log_ratio(step.new, step.old, step.x).exp(), ratio, rtol=1e-3
        )
        surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        kl = ((step.new.mean - step.reference.mean) ** 2 / (2 * step.new.std**2)).flatten(1).sum(1)
        assert torch.allclose(found, surrogate + 0.3 * kl, rtol=1e-3, atol=1e-4)
        assert torch.allclose(metrics["kl"], kl, rtol=1e-4)
        mean = (
            (new.log_prob(chains.after(k)) - old.log_prob(chains.after(k))).flatten(1).mean(1).exp()
        )
        apart.append(float((mean - ratio).abs().max()))
        plain, metrics = pipeline.loss(
            run.policy.score(chains, k, advantage, None), clip=0.2, kl=0.3
        )
        assert "kl" not in metrics
        assert torch.allclose(plain, surrogate, rtol=1e-3, atol=1e-4)
    assert max(apart) > 1e-2, "control: a mean over the chunk is another ratio"


@pytest.mark.parametrize("minibatch", [1, 7, 12, 1000])
@pytest.mark.parametrize("update", ["pairs", "chain", "step"])
def test_every_decision_and_step_once_a_pass(tmp_path, update, minibatch):
    run, pipeline = built(
        tmp_path, {"stage": "offline", "update": update, "offline": {"episodes": 0, "states": 11}}
    )
    rollout, _ = pipeline.offline.experience.redraw(pipeline.settings.offline.states, 0)
    whole = sorted((row, k) for row in range(11) for k in rollout.trajectory.steps)
    passes = []
    for epoch in range(2):
        batches = [
            list(zip(b.rows.tolist(), b.k.tolist(), strict=True))
            for b in ppo.batches(run, rollout, update, minibatch, epoch)
        ]
        assert sorted(pair for batch in batches for pair in batch) == whole
        assert max(map(len, batches)) <= minibatch + (2 if update == "chain" else 0), (
            "chains are not divided"
        )
        for batch in batches:
            steps = {k for _, k in batch}
            if update == "step":
                assert len(steps) == 1
            if update == "chain":
                assert len(batch) == 3 * len({row for row, _ in batch})
        passes.append(batches)
    if minibatch < 12:
        assert passes[0] != passes[1], "each pass in an order of its own"
        kinds = {tuple(sorted(k for _, k in batch)) for batch in passes[0]}
        assert (len(kinds) > 1) == (update != "chain" or minibatch > 3)


def test_a_pass_is_made_so_many_times(tmp_path):
    run, pipeline = improving(tmp_path, sweeps=3, epochs=2, states=10, samples=2, minibatch=10)
    pipeline.improve()
    assert run.learner.optimizer.updates == 3 * 2 * math.ceil(10 * 2 * 3 / 10)


# -- from stage to stage ---------------------------------------------------------------------------


def test_the_value_goes_on_from_the_offline_one(tmp_path):
    run, pipeline = built(tmp_path)
    own, offline = (
        pipeline.on_policy.critic.value.state_dict(),
        pipeline.offline.value.v.state_dict(),
    )
    assert not any(torch.equal(own[n], offline[n]) for n in own if own[n].dim() > 1)
    run.deployment.evaluate = lambda iteration: {"success_rate": 0.0, "return": 0.0, "n": 0}
    run.folder.mkdir(exist_ok=True)
    pipeline._leave("improve")
    own = pipeline.on_policy.critic.value.state_dict()
    assert all(torch.equal(own[n], offline[n]) for n in own)
    pipeline.on_policy.critic.value.network[0].weight.data.add_(1)
    assert not torch.equal(
        pipeline.offline.value.v.network[0].weight,
        pipeline.on_policy.critic.value.network[0].weight,
    ), "a copy"


def test_the_anchor_is_the_policy_at_the_stages_start(tmp_path):
    run, pipeline = built(tmp_path, {"stage": "offline", "offline": {"episodes": 0}})
    run.milestone = lambda *_: None
    for p in run.trainable:
        p.data += 1
    assert not torch.equal(pipeline.anchor.weights.values[0], run.trainable[0])
    pipeline._leave("criticise")
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipeline.anchor.weights.values, run.trainable, strict=True)
    )
    run.trainable[0].data += 1
    assert not torch.equal(pipeline.anchor.weights.values[0], run.trainable[0]), "a copy"


def test_warming_up_trains_the_value_alone(tmp_path):
    run, pipeline = built(tmp_path, {"stage": "online", "online": {"warm_up": 1}})
    value = pipeline.on_policy.critic.value.network[0].weight
    before, was = run.weights().values, value.detach().clone()
    pipeline.online()
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights().values, strict=True))
    assert not torch.equal(value, was)
    run.stages.advance()
    run.spent.iteration = 2
    pipeline.online()
    assert not all(torch.equal(a, b) for a, b in zip(before, run.weights().values, strict=True))


def test_recloning_imitates_what_succeeded(tmp_path):
    """Only decisions of episodes that succeeded;
    what was encoded before is encoded again when it is asked for.
    """
    data = {"name": "tests.rl100_toy:Outcomes", "episodes": 12, "skill": 0.15}
    run, pipeline = built(
        tmp_path,
        {"stage": "offline", "offline": {"episodes": 0, "rounds": 2, "recloning": 4}},
        data=data,
    )
    replay = pipeline.offline.experience.replay
    good = replay.success.nonzero().flatten()
    assert 0 < len(good) < len(replay)
    context, event, mask = pipeline.offline.experience.imitable(torch.arange(len(good)))
    assert torch.equal(event, replay.event[good])
    assert torch.equal(
        run.policy.model.encode(context), pipeline.offline.experience.conditions[replay.now[good]]
    )
    assert mask is None
    asked, honest = [], run.policy.model.encode
    run.policy.model.encode = lambda context: asked.append(len(context)) or honest(context)
    before = run.weights().values
    toy_control.enter(run, "reclone")
    pipeline.reclone()
    assert run.learner.optimizer.updates == rl100.AT_ONCE
    asked.clear()
    assert len(pipeline.offline.experience.conditions) == sum(asked) == len(replay.views)
    assert not all(torch.equal(a, b) for a, b in zip(before, run.weights().values, strict=True))


def test_collecting_adds_to_what_is_learned_from(tmp_path):
    run, pipeline = built(tmp_path, {"stage": "offline", "offline": {"episodes": 5}})
    e = pipeline.offline.experience
    recorded = len(e.replay)
    before = e.conditions
    pipeline.collect()
    assert e.iterations == [1]
    assert run.collector.store.pinned == {1}
    assert len(e.replay) > recorded
    assert len(e.conditions) == len(e.replay.views) > len(before)
    assert torch.equal(e.conditions[: len(before)], before)
    assert len(e.replay.episode.unique()) == 12 + 5
    (tmp_path / "other").mkdir()
    other, resumed = built(tmp_path / "other", {"stage": "offline", "offline": {"episodes": 5}})
    other.collector.store.folder = run.collector.store.folder
    resumed.offline.experience.load_state_dict(e.state_dict())
    assert torch.equal(resumed.offline.experience.replay.rewards, e.replay.rewards)
    assert other.collector.store.pinned == {1}
    assert len(resumed.offline.experience.replay) != recorded, "control"


@pytest.mark.parametrize("samples", [1, 4])
def test_processes_redraw_what_one_does(tmp_path, samples):
    """Each its share of the decisions, all samples of each, by the noise of their places."""
    run, pipeline = improving(tmp_path)
    whole, rows = pipeline.offline.experience.redraw(10, 1, samples)
    for index in range(3):
        run.processes = SimpleNamespace(index=index, count=3)
        part, mine = pipeline.offline.experience.redraw(10, 1, samples)
        mine_of_whole = torch.arange(10 * samples).view(10, samples)[index::3].flatten()
        assert torch.equal(mine, rows[mine_of_whole])
        assert torch.allclose(part.trajectory.x0, whole.trajectory.x0[mine_of_whole], atol=1e-5)
        assert part.decisions.total == 10 * samples


# -- that it learns --------------------------------------------------------------------------------

LEARNING = {
    "gamma": 0.97,
    "imitation": {
        "iterations": 1,
        "updates": 140,
        "batch": 64,
        "lr": 3e-3,
        "warmup": 20,
        "ema": 0.9,
    },
    "offline": {
        **{
            "episodes": 60,
            "critic_updates": 300,
            "model_updates": 150,
            "candidates": 2,
            "sweeps": 4,
            "states": 256,
        },
        **{
            "epochs": 2,
            "minibatch": 512,
            "lr": 1e-3,
            "horizon": 4,
            "starts": 64,
            "best_of": 4,
            "kl": 0.05,
        },
    },
    "online": {
        "episodes": 60,
        "epochs": 4,
        "minibatch": 256,
        "lr": 1e-3,
        "critic_epochs": 5,
        "warm_up": 1,
        "ema": 0.9,
    }
    | {"final": 1.0},  # a short run has no time to slow down
}


def learned(folder, iterations):
    raw = experiment(
        folder,
        policy={"name": "mlp", "hidden": 32, "blocks": 1, "chunk": 2},
        chain={"steps": 4, "kernel": CLIPPED, "window": [0, 4]},
        data={"name": "tests.rl100_toy:Outcomes", "episodes": 12, "skill": 0.25},
        task={"name": "tests.toy_control:Point", "limit": 8},
        method=LEARNING,
        optimizer={"weight_decay": 0.0, "max_grad_norm": 0.5},
        budget={"iterations": iterations},
        eval={"every": 0, "episodes": 60},
        environments=60,
    )
    result = train(parse.parse(raw))
    rates = {
        name: row[f"{name}/success_rate"]
        for name in ("imitation", "best_of_4", "offline")
        for row in lines(result.folder)
        if f"{name}/success_rate" in row
    }
    return {**rates, "online": result.after["success_rate"]}


def test_success_rises_from_stage_to_stage(tmp_path):
    rates = learned(tmp_path, 24)
    print(rates)
    assert rates["imitation"] < 0.7
    assert rates["best_of_4"] > rates["imitation"]
    assert rates["online"] > rates["imitation"] + 0.2


def test_control_a_turned_advantage_unlearns(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ppo,
        "clipped_surrogate",
        lambda log_rho, advantage, clip: clipped_surrogate(log_rho, -advantage, clip),
    )
    monkeypatch.setitem(LEARNING, "offline", {**LEARNING["offline"], "delta": 0.0, "candidates": 1})
    rates = learned(tmp_path, 8)
    print(rates)
    assert rates["online"] < rates["imitation"] + 0.05


def test_the_small_course_is_what_other_tests_say(tmp_path):
    assert RL100(**{}).stage == "all"
    assert SMALL["offline"]["candidates"] == 2
