"""The gate, on a linear-Gaussian world where every value has a closed form.

f' = A f + B a + w, w ~ N(0, W); r = -(f'Cf + a'Ra); policies a = -G f + s noise, so that E f f' and
every quadratic follow by matrix algebra in fp64.
"""

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from genpolicy.chain import Noise
from genpolicy.chain.noise import PRIOR
from genpolicy.learning import dynamics
from genpolicy.learning.acceptance import Comparison, compare, rank_correlation
from genpolicy.learning.dynamics import TransitionModel, imagined

F, E, GAMMA, HORIZON, STARTS = 3, 2, 0.95, 8, 400
A = torch.tensor([[1.0, 0.2, 0.0], [0.0, 0.9, 0.2], [0.1, 0.0, 0.9]], dtype=torch.float64)
B = torch.tensor([[0.0, 0.1], [0.3, 0.0], [0.0, 0.4]], dtype=torch.float64)
W = torch.tensor([0.10, 0.15, 0.10], dtype=torch.float64)  # std of w
C = torch.diag(torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64))
R = 0.1 * torch.eye(E, dtype=torch.float64)
S = 0.1  # std of a policy's own noise


class World:
    """The true world, in the gate's words."""

    def step(self, features: Tensor, event: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
        return features @ A.T + event.flatten(1) @ B.T + W * noise


def best_gain() -> Tensor:
    """Riccati by value iteration."""
    P = C
    for _ in range(500):
        G = torch.linalg.solve(R + GAMMA * B.T @ P @ B, GAMMA * B.T @ P @ A)
        P = C + G.T @ R @ G + GAMMA * (A - B @ G).T @ P @ (A - B @ G)
    return G


def value(G: Tensor) -> tuple[Tensor, float]:
    """V(f) = -(f'Pf + c) of the policy G, discounted, for ever."""
    P, closed = C, A - B @ G
    for _ in range(2000):
        P = C + G.T @ R @ G + GAMMA * closed.T @ P @ closed
    each = S**2 * R.trace() + GAMMA * (P @ (torch.diag(W**2) + S**2 * B @ B.T)).trace()
    return P, float(each) / (1 - GAMMA)


def q_function(G: Tensor) -> tuple[Tensor, float]:
    """Q(f,a) = -(z'Mz + c) of the policy G, z = (f, a)."""
    P, constant = value(G)
    AB = torch.cat([A, B], 1)
    return torch.block_diag(C, R) + GAMMA * AB.T @ P @ AB, GAMMA * (
        float((P * torch.diag(W**2)).sum()) + constant
    )


# The critic is that of the policy in force, as it is where a gate stands;
# the five policies lie around it.
BEST = best_gain()
GAINS = [x * BEST for x in (0.55, 1.0, 0.25, 0.8, 0.4)]
IN_FORCE = GAINS[4]
M, CONSTANT = q_function(IN_FORCE)


def starts(count: int = STARTS, seed: int = 0) -> Tensor:
    return torch.randn(count, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(count: int = STARTS, seed: int = 0) -> Noise:
    return Noise(seed, 0, torch.arange(count), torch.zeros(count, dtype=torch.long))


def actor(G: Tensor, noise: Noise, k: int = PRIOR):
    def act(features: Tensor, h: int) -> Tensor:
        own = noise.at(torch.full_like(noise.group, h))(k, (E, 1)).to(features.dtype)
        return (features @ -G.to(features.dtype).T)[
            ..., None
        ] + S * own  # an event of two dims, [S,E,1]

    return act


def score(features: Tensor, event: Tensor) -> Tensor:
    z = torch.cat([features, event.flatten(1)], 1).double()
    return -((z @ M) * z).sum(1) - CONSTANT


def am_q(
    G: Tensor, model, noise: Noise, f0: Tensor, horizon: int = HORIZON, k: int = PRIOR
) -> Tensor:
    return imagined(actor(G, noise, k), score, model, f0, horizon, noise)


def true_values(f0: Tensor) -> list[float]:
    moment = f0.T @ f0 / len(f0)
    return [-float((P * moment).sum()) - c for P, c in map(value, GAINS)]


def closed_form(G: Tensor, f0: Tensor, horizon: int = HORIZON) -> float:
    """sum_h E Q(f_h, a_h) by the second moment of (f_h, a_h), the mean over these starts."""
    moment, closed, total = f0.T @ f0 / len(f0), A - B @ G, 0.0
    act = torch.cat([torch.eye(F, dtype=torch.float64), -G])
    for _ in range(horizon):
        z = act @ moment @ act.T
        z[F:, F:] += S**2 * torch.eye(E, dtype=torch.float64)
        total -= float((M * z).sum()) + CONSTANT
        moment = closed @ moment @ closed.T + S**2 * B @ B.T + torch.diag(W**2)
    return total


def td_residual_score(G: Tensor, model, noise: Noise, f0: Tensor, lam: float = 0.95) -> Tensor:
    """The released code's score (ensemble_dynamics_for_batch.py with use_gae, its default): the
    mean over the rollout of GAE on gamma Q_{h+1} - Q_h, without reward (predict_r is off). It
    telescopes: what counts is that Q rises.
    """
    seen = []

    def listen(features: Tensor, event: Tensor) -> Tensor:
        seen.append(score(features, event))
        return seen[-1]

    imagined(actor(G, noise), listen, model, f0, HORIZON + 1, noise)
    advantages, following = [], torch.zeros(len(f0), dtype=torch.float64)
    for now, after in zip(reversed(seen[:-1]), reversed(seen[1:]), strict=True):
        following = GAMMA * after - now + GAMMA * lam * following
        advantages.append(following)
    return torch.stack(advantages).mean(0)


# -- the score, in the true world ------------------------------------------------------------------


def test_the_closed_forms_agree_with_playing():
    """The oracle itself: V by Lyapunov equals discounted returns, Q equals r + gamma V'."""
    f0 = starts(4000)
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randn(len(f0), n, generator=generator, dtype=torch.float64)  # noqa: E731
    for G, expected in zip(GAINS, true_values(f0), strict=True):
        f, total = f0, torch.zeros(len(f0), dtype=torch.float64)
        for h in range(150):
            a = f @ -G.T + S * draw(E)
            total -= GAMMA**h * (((f @ C) * f).sum(1) + ((a @ R) * a).sum(1))
            f = f @ A.T + a @ B.T + W * draw(F)
        # what is left after 150 decisions is < .1 % of V;
        # the spread of starts is in `expected` already
        assert float(total.mean()) == pytest.approx(expected, rel=0.03)
    f, a = starts(1).expand(20_000, F), draw(E)[:1].expand(20_000, E)
    P, c = value(IN_FORCE)
    after = f @ A.T + a @ B.T + W * torch.randn(20_000, F, generator=generator, dtype=torch.float64)
    reward = -((f @ C) * f).sum(1) - ((a @ R) * a).sum(1)
    target = reward - GAMMA * (((after @ P) * after).sum(1) + c)
    assert abs(float((target - score(f, a)).mean())) < 4 * float(target.std()) / math.sqrt(len(f))


@pytest.mark.parametrize("horizon", [1, 2, HORIZON])
def test_the_score_is_the_closed_form(horizon):
    """Within 4 standard errors over 12 seeds, and these are small: under 1 % of the score."""
    f0 = starts()
    for G in (GAINS[0], GAINS[2]):
        scores = torch.stack(
            [am_q(G, World(), rows(seed=s), f0, horizon).mean() for s in range(12)]
        )
        error = float(scores.std()) / math.sqrt(len(scores))
        expected = closed_form(G, f0, horizon)
        assert error < 0.01 * abs(expected)
        assert abs(float(scores.mean()) - expected) < 4 * error + 1e-9


class Listener(World):
    """The true world, and the luck it was handed at each decision: uniform [S], noise [S,F]."""

    def __init__(self) -> None:
        self.luck: list[tuple[Tensor, Tensor]] = []

    def step(self, features: Tensor, event: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
        self.luck.append((uniform, noise))
        return super().step(features, event, uniform, noise)


@pytest.mark.parametrize("k", [PRIOR, 0, 99, dynamics.MODEL])
def test_a_policys_draws_are_not_the_models(k):
    """A policy draws from the same rows by its own k;
    with the model's k (control) its action is the world's luck.
    """
    world, noise = Listener(), rows()
    am_q(GAINS[0], world, noise, starts(), k=k)
    found = []
    for h, (_, luck) in enumerate(world.luck):
        own = noise.at(torch.full_like(noise.group, h))(k, (E, 1)).double()
        both = torch.cat([own.flatten(1), luck], 1)
        found.append(torch.corrcoef(both.T)[:E, E:].abs().max())
    worst = float(torch.stack(found).max())
    assert worst > 0.99 if k == dynamics.MODEL else worst < 5 / math.sqrt(STARTS)


def test_the_score_ranks_policies_as_truth_does():
    f0 = starts()
    truth = true_values(f0)
    scores = [float(am_q(G, World(), rows(), f0).mean()) for G in GAINS]
    assert rank_correlation(scores, truth) == pytest.approx(1.0)
    assert rank_correlation([closed_form(G, f0) for G in GAINS], truth) == pytest.approx(1.0)


def test_control_the_released_codes_score_does_not():
    """GAE over Q residuals: the worse a policy, the further Q climbs from where it began."""
    f0 = starts()
    scores = [float(td_residual_score(G, World(), rows(), f0).mean()) for G in GAINS]
    spearman = rank_correlation(scores, true_values(f0))
    print(f"Spearman of the TD-residual score: {spearman:.2f}")
    assert spearman <= 0.0


# -- common random numbers -------------------------------------------------------------------------


def test_common_random_numbers_shrink_the_error_of_the_difference():
    """Variance over seeds of mean(new) - mean(old): same luck; own luck;
    own luck and own starts (the released code).
    """
    old, new = GAINS[3], 1.05 * GAINS[3]
    common, own, fresh = [], [], []
    f0, count = starts(100), 100
    for seed in range(40):
        here = float(am_q(old, World(), rows(count, seed), f0).mean())
        common.append(float(am_q(new, World(), rows(count, seed), f0).mean()) - here)
        own.append(float(am_q(new, World(), rows(count, 1000 + seed), f0).mean()) - here)
        here = float(am_q(old, World(), rows(count, seed), starts(100, seed)).mean())
        fresh.append(
            float(am_q(new, World(), rows(count, 1000 + seed), starts(100, 1000 + seed)).mean())
            - here
        )
    variance = [float(torch.tensor(x).var()) for x in (common, own, fresh)]
    print(
        f"variance: own luck / common {variance[1] / variance[0]:.0f},"
        f" own starts too {variance[2] / variance[0]:.0f}"
    )
    assert variance[1] > 30 * variance[0]
    assert variance[2] > 300 * variance[0]
    difference = closed_form(new, f0) - closed_form(old, f0)
    assert abs(sum(common) / 40 - difference) < 4 * math.sqrt(variance[0] / 40)


def test_the_luck_of_a_start_is_its_own():
    """Any subset of the starts gives the same scores, and no global generator is read."""
    f0, noise, index = starts(20), rows(20), torch.tensor([13, 2, 7])
    whole = am_q(GAINS[0], World(), noise, f0)
    torch.manual_seed(5)
    assert torch.equal(am_q(GAINS[0], World(), noise, f0), whole)
    assert torch.allclose(
        am_q(GAINS[0], World(), noise[index], f0[index]), whole[index], rtol=1e-12
    )
    assert not torch.allclose(am_q(GAINS[0], World(), rows(20, seed=1), f0), whole)


def test_every_decision_has_its_own_luck():
    world = Listener()
    am_q(GAINS[0], world, rows(), starts())
    uniforms, noises = (torch.stack(part) for part in zip(*world.luck, strict=True))
    assert uniforms.shape == (HORIZON - 1, STARTS)
    assert noises.shape == (HORIZON - 1, STARTS, F)
    assert float(uniforms.min()) >= 0
    assert float(uniforms.max()) <= 1
    assert abs(float(uniforms.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / uniforms.numel())
    assert abs(float(uniforms.var()) - 1 / 12) < 0.005
    table = torch.corrcoef(torch.cat([uniforms, noises.flatten(0, 1).T.reshape(-1, STARTS)]))
    assert float((table - torch.eye(len(table))).abs().max()) < 5 / math.sqrt(STARTS)


def test_bad_calls():
    with pytest.raises(ValueError, match="horizon is 0"):
        am_q(GAINS[0], World(), rows(), starts(), horizon=0)
    with pytest.raises(ValueError, match="400 starts and noise for 3"):
        am_q(GAINS[0], World(), rows(3), starts())
    with pytest.raises(ValueError, match="2 starts or more"):
        compare(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="elites is 4"):
        TransitionModel(F, E, members=3, elites=4)
    with pytest.raises(ValueError, match="one for each of 7 members"):
        TransitionModel(F, E).choose_elites(torch.zeros(6))
    with pytest.raises(ValueError, match="3 and 2 values"):
        rank_correlation([1, 2, 3], [1, 2])


# -- the learned model -----------------------------------------------------------------------------


def transitions(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Around the policy in force, with broad actions:
    features [n,F], events [n,E,1], after [n,F], fp32.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(count, n, generator=generator, dtype=torch.float64)  # noqa: E731
    f = 1.3 * draw(F)
    a = (f @ -BEST.T) * torch.rand(
        count, 1, generator=generator, dtype=torch.float64
    ) * 1.3 + 0.4 * draw(E)
    return f.float(), a[..., None].float(), (f @ A.T + a @ B.T + W * draw(F)).float()


@pytest.fixture(scope="module")
def fitted() -> TransitionModel:
    torch.manual_seed(0)
    model = TransitionModel(F, E, members=5, elites=3, hidden=48, layers=2)
    data, held = transitions(4000, 0), transitions(1000, 1)
    model.fit_scale(data[0], data[2])
    updates = 900
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    order = torch.Generator().manual_seed(0)
    for _ in range(updates):
        pick = torch.randint(len(data[0]), (256,), generator=order)
        optimiser.zero_grad()
        model.loss(*(part[pick] for part in data)).mean().backward()
        optimiser.step()
        schedule.step()
    model.choose_elites(model.hold_out(*held))
    return model.requires_grad_(False)


def test_the_learned_model_knows_the_world(fitted):
    """Held-out error is that of the noise alone, and the std it says is the world's."""
    f, a, after = transitions(2000, 2)
    floor = float(((W.float() / fitted.change_std) ** 2).mean())
    assert float(fitted.hold_out(f, a, after).max()) < 1.15 * floor
    mean, std = fitted.predict(f, a)
    assert mean.shape == std.shape == (3, 2000, F)
    truth = f.double() @ A.T + a.double().flatten(1) @ B.T
    assert float(((mean - truth) ** 2).mean().sqrt()) < 0.05
    assert torch.allclose(std.mean((0, 1)).double(), W, rtol=0.12)


def test_the_score_in_the_learned_model(fitted):
    """Ranks as truth does, and lies within 5 % of the closed form."""
    f0 = starts()
    scores = [float(am_q(G, fitted, rows(), f0.float()).mean()) for G in GAINS]
    spearman = rank_correlation(scores, true_values(f0))
    wrong = [float(td_residual_score(G, fitted, rows(), f0.float()).mean()) for G in GAINS]
    control = rank_correlation(wrong, true_values(f0))
    print(f"Spearman in the learned model: AM-Q {spearman:.2f}, TD-residual {control:.2f}")
    assert spearman == pytest.approx(1.0)
    assert control <= 0.0
    for G, found in zip(GAINS, scores, strict=True):
        assert found == pytest.approx(closed_form(G, f0), rel=0.05)


def test_the_gate_takes_the_better_and_refuses_the_worse(fitted):
    f0 = starts().float()
    by = {i: am_q(G, fitted, rows(), f0) for i, G in enumerate(GAINS)}
    assert compare(by[0], by[4]).accepts(delta=0.05, z=2.0)
    assert not compare(by[2], by[4]).accepts(delta=0.0, z=0.0)
    assert not compare(by[4], by[4]).accepts(delta=0.05, z=0.0)


def test_disagreement_grows_off_the_data(fitted):
    f, a, _ = transitions(500, 3)
    known = fitted.disagreement(f, a)
    far = fitted.disagreement(f, a + 8.0)
    further = fitted.disagreement(6 * f, a + 8.0)
    assert known.shape == (500,)
    assert float(far.median()) > 5 * float(known.median())
    assert float(further.median()) > float(far.median())
    _, std = fitted.predict(f, a)
    assert float((std / fitted.change_std).mean()) > 5 * float(known.median()), (
        "noise is not ignorance"
    )


def test_disagreement_by_hand(fitted):
    f, a, _ = transitions(5, 3)
    mean = (fitted.predict(f, a)[0] - f) / fitted.change_std
    by_hand = ((mean - mean.mean(0)) ** 2).mean(0).mean(1).sqrt()
    assert torch.allclose(fitted.disagreement(f, a), by_hand, rtol=1e-3, atol=1e-6)


# -- the model's parts -----------------------------------------------------------------------------


def small(seed: int = 0, **sizes) -> TransitionModel:
    torch.manual_seed(seed)
    model = TransitionModel(F, E, **{"members": 4, "elites": 2, "hidden": 16, "layers": 2, **sizes})
    f, _, after = transitions(200, 0)
    model.fit_scale(f, after)
    return model.requires_grad_(False)


def member(model: TransitionModel, index: int, f: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """One member's mean and log-variance by plain matrix products, bounded as PETS bounds them."""
    x = torch.cat([(f - f_scale(0).mean(0)) / f_scale(0).std(0, correction=0), a.flatten(1)], 1)
    layers = [part for part in model.network if hasattr(part, "weight")]
    for i, layer in enumerate(layers):
        x = x @ layer.weight[index] + layer.bias[index]
        if i < len(layers) - 1:
            x = x * x.sigmoid()
    mean, raw = x[:, :F], x[:, F:]
    raw = 0.5 - torch.log1p((0.5 - raw).exp())
    return mean, -10.0 + torch.log1p((raw + 10.0).exp())


def f_scale(part: int) -> Tensor:
    return transitions(200, 0)[part]


def test_loss_is_the_normals_negative_log_likelihood():
    model, (f, a, after) = small(), transitions(7, 5)
    f0, _, after0 = transitions(200, 0)
    target = (after - f) / (after0 - f0).std(0, correction=0)
    losses = model.loss(f, a, after)
    assert losses.shape == (4, 7)
    for index in range(4):
        mean, log_variance = member(model, index, f, a)
        by_hand = (
            -torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(target).mean(1)
        )
        assert torch.allclose(losses[index], by_hand, rtol=1e-4, atol=1e-5)
        assert float(model.hold_out(f, a, after)[index]) == pytest.approx(
            float(((target - mean) ** 2).mean()), rel=1e-4
        )


def test_log_variance_stays_within_its_bounds():
    model = small()
    f, a, _ = transitions(50, 1)
    for huge in (1e4, -1e4):
        model.network[-1].bias[..., F:] = huge
        log_variance = 2 * (model.predict(f, a)[1] / model.change_std).log()
        low, high = dynamics.LOG_VARIANCE
        assert float(log_variance.min()) >= low - 1e-3
        assert float(log_variance.max()) <= high + 1e-3
        assert torch.isfinite(model.loss(f, a, f)).all()


def test_elites_are_the_best():
    model = small()
    f, a, _ = transitions(6, 1)
    model.choose_elites(torch.tensor([0.3, 0.1, math.nan, 0.2]))
    assert model.elites.tolist() == [1, 3]
    mean, std = model.predict(f, a)
    for row, index in enumerate((1, 3)):
        by_hand, log_variance = member(model, index, f, a)
        assert torch.allclose(mean[row], f + model.change_std * by_hand, atol=1e-5)
        assert torch.allclose(std[row], model.change_std * (log_variance / 2).exp(), atol=1e-5)


def test_a_spoiled_member_is_no_elite(fitted):
    spoiled = TransitionModel(F, E, members=5, elites=3, hidden=48, layers=2)
    spoiled.load_state_dict(fitted.state_dict())
    worst = int(spoiled.elites[0])
    spoiled.requires_grad_(False).network[-1].weight[worst] += 0.3
    spoiled.choose_elites(spoiled.hold_out(*transitions(1000, 1)))
    assert worst not in spoiled.elites.tolist()


def test_a_step_is_one_elite_and_its_noise():
    model = small(elites=3)
    f, a, _ = transitions(4, 1)
    uniform, noise = torch.tensor([0.0, 0.34, 0.67, 1.0]), torch.randn(4, F)
    mean, std = model.predict(f, a)
    by_hand = torch.stack(
        [mean[e, row] + std[e, row] * noise[row] for row, e in enumerate((0, 1, 2, 2))]
    )
    assert torch.equal(model.step(f, a, uniform, noise), by_hand)


def test_a_step_is_deterministic():
    model = small()
    f, a, _ = transitions(30, 1)
    uniform, noise = torch.rand(30), torch.randn(30, F)
    torch.manual_seed(1)
    first = model.step(f, a, uniform, noise)
    assert torch.equal(model.step(f, a, uniform, noise), first)
    assert torch.allclose(
        model.step(f[3:5], a[3:5], uniform[3:5], noise[3:5]), first[3:5], atol=1e-6
    )
    assert not torch.equal(model.step(f, a, uniform, torch.randn(30, F)), first)
    assert not torch.equal(model.step(f, a, (uniform + 0.5) % 1, noise), first)


def test_scales_and_elites_are_saved():
    model, other = small(), TransitionModel(F, E, members=4, elites=2, hidden=16, layers=2)
    model.choose_elites(torch.tensor([3.0, 1.0, 2.0, 0.0]))
    other.load_state_dict(model.state_dict())
    f, a, _ = transitions(6, 1)
    assert all(
        torch.equal(x, y) for x, y in zip(model.predict(f, a), other.predict(f, a), strict=True)
    )


def test_scales_of_features_that_do_not_move():
    model = TransitionModel(2, 1, members=2, elites=1)
    f = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
    model.fit_scale(f, f + torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert torch.allclose(model.centre, torch.tensor([1.0, 5.0]))
    assert torch.allclose(model.feature_std, torch.tensor([1.0, 0.01]))
    assert torch.allclose(model.change_std, torch.tensor([1.0, 1e-5]))
    after = model.step(f, torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 2))
    assert torch.allclose(after[:, 1], f[:, 1], atol=1e-4)


# -- accept or reject ------------------------------------------------------------------------------


def test_comparison_by_hand():
    found = compare(torch.tensor([3.0, 2.0, 7.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert found.difference == pytest.approx(2.0)  # of 2, 0, 4
    assert found.error == pytest.approx(2.0 / math.sqrt(3))
    assert found.old == pytest.approx(2.0)


@pytest.mark.parametrize("old", [10.0, -10.0])
def test_acceptance_at_its_boundary(old):
    """.05 * |old| = .5 also where the score is negative; z = 2 errors of .25 take another .5."""
    assert Comparison(0.5, 0.25, old).accepts(delta=0.05, z=0.0)
    assert not Comparison(0.499, 0.25, old).accepts(delta=0.05, z=0.0)
    assert Comparison(1.0, 0.25, old).accepts(delta=0.05, z=2.0)
    assert not Comparison(0.999, 0.25, old).accepts(delta=0.05, z=2.0)
    assert Comparison(0.5, 0.25, old).accepts(delta=0.0, z=2.0)
    assert not Comparison(-0.001, 0.0, old).accepts(delta=0.0, z=0.0)
    assert Comparison(-3.0, 0.25, old).accepts(delta=-1.0, z=2.0), "a negative delta may lose"


def test_what_is_not_a_number_is_not_better():
    assert not Comparison(math.nan, 0.0, 1.0).accepts(0.0, 0.0)
    assert not compare(torch.tensor([math.inf, 1.0]), torch.tensor([0.0, 0.0])).accepts(0.0, 0.0)
    assert not compare(torch.tensor([1.0, 1.0]), torch.tensor([-math.inf, 0.0])).accepts(0.05, 1.0)


# -- ranks -----------------------------------------------------------------------------------------


def test_rank_correlation_is_scipys():
    generator = torch.Generator().manual_seed(0)
    for values in (3, 1000):  # many ties, and none
        a, b = torch.randint(values, (2, 30), generator=generator).double()
        assert rank_correlation(a, b) == pytest.approx(float(spearmanr(a, b)[0]), abs=1e-12)


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 1e9]) == 1.0
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, -math.inf]) == -1.0
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(rank_correlation([1, 2, 3], [0.1, 0.1, 0.1]))
    assert math.isnan(rank_correlation([1, 2, math.nan], [1, 2, 3]))
    assert math.isnan(rank_correlation([1], [2]))
