"""ReinFlow: the likelihood of whole chains, the noise that is learned and dropped,
and that it improves policies.
"""

import math

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributions import Normal

import genpolicy
from genpolicy.chain import Gaussian, Noise
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.config.schema import OptimizerConfig
from genpolicy.methods import reinflow
from genpolicy.methods.reinflow import ReinFlow
from genpolicy.policy.files import save_policy
from genpolicy.policy.parts.learned_std import LearnedStd
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from tests import toy
from tests.toy_control import Recorded, cloned, experiment, prepared

SHORT = {"name": "tests.toy_control:Point", "limit": 4}
ODE = {"steps": 4, "kernel": {"name": "ddim", "eta": 0.0}, "window": [0, 4]}
SMALL = {"name": "reinflow", "episodes": 8, "warm_up": 0, "minibatch": 8, "epochs": 2}


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """The folder of a flow policy that walks slowly."""
    return cloned(tmp_path_factory.mktemp("slow"), family="flow")


def noisy(folder, pretrained, **sections):
    """A run whose policy's noise is learned, as the method sets it up;
    the noise net has moved from its start.
    """
    run, method = prepared(
        folder,
        **{
            "policy": {"name": "mlp", "pretrained": pretrained},
            "chain": ODE,
            "method": SMALL,
            "task": SHORT,
            **sections,
        },
    )
    noise = LearnedStd(
        run.features, math.prod(run.policy.model.event_shape), method.std_low, method.std_high
    )
    for parameter in noise.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    run.attach(std=noise)
    return run, method, noise


def moved(run, noise, by=0.02):
    for parameter in [*run.trainable, *noise.parameters()]:
        parameter.data += by * torch.randn_like(parameter)


# -- the noise -------------------------------------------------------------------------------------


def test_the_noise_begins_in_the_middle_and_stays_between_its_bounds():
    net = LearnedStd(3, 6, 0.1, 0.4)
    t, features = torch.rand(50).double(), torch.randn(50, 3)
    assert torch.allclose(net(t, features), torch.full((50, 6), math.sqrt(0.1 * 0.4)))
    for scale in (1.0, 100.0):
        for parameter in net.parameters():
            parameter.data = scale * torch.randn_like(parameter)
        std = net(t, features)
        assert std.shape == (50, 6)
        assert std.min() >= 0.1 * (1 - 1e-6)
        assert std.max() <= 0.4 * (1 + 1e-6)
    assert std.min() < 0.11
    assert std.max() > 0.39


def test_the_noise_by_hand():
    """log std^2 = low + (high - low)(tanh(MLP(features, t, t^2)) + 1)/2."""
    net = LearnedStd(3, 2, 0.1, 0.24)
    for parameter in net.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    t, features = torch.tensor([0.25, 1.0]).double(), torch.randn(2, 3)
    inputs = torch.cat([features, torch.tensor([[0.25, 0.0625], [1.0, 1.0]])], -1)
    low, high = math.log(0.1**2), math.log(0.24**2)
    expected = torch.exp((low + (high - low) * (net.network(inputs).tanh() + 1) / 2) / 2)
    assert torch.allclose(net(t, features), expected, atol=1e-6)
    assert not torch.allclose(net(t.flip(0), features), expected, atol=1e-3)  # it knows the time
    assert not torch.allclose(net(t, features.flip(0)), expected, atol=1e-3)  # and what is seen


def test_the_kernel_is_the_euler_step_with_the_learned_std(tmp_path, slow):
    run, _, noise = noisy(tmp_path, slow)
    rollout = run.collect(64, 1)
    chains, grid, model = rollout.trajectory, run.policy.chain.grid, run.policy.model
    for k in range(4):
        x, t, s = chains.x[:, k], float(grid[k]), float(grid[k + 1])
        prediction = model.denoise(x, grid[k].expand(len(x)), chains.condition)
        velocity = prediction.eps - prediction.x0
        assert torch.allclose(chains.mean[:, k], x + velocity * (s - t), atol=1e-5)
        std = noise(grid[k].expand(len(x)), model.features(chains.condition)).view_as(x)
        assert torch.allclose(chains.std[:, k], std, atol=1e-6)
        drawn = (chains.x[:, k + 1] - chains.mean[:, k]) / chains.std[:, k]
        assert abs(float(drawn.mean())) < 4 / drawn.numel() ** 0.5
        assert abs(float(drawn.std()) - 1) < 4 / drawn.numel() ** 0.5


# -- the likelihood --------------------------------------------------------------------------------


def chain_density(chains, mean, std, reduce):
    """log of the whole chain's density, prior included,
    summed or averaged over its K + 1 draws and their dims.
    """
    prior = Normal(0.0, 1.0).log_prob(chains.x[:, :1])
    density = torch.cat([prior, Normal(mean, std).log_prob(chains.x[:, 1:])], 1).flatten(1)
    return density.sum(1) if reduce == "sum" else density.mean(1)


def transitions(run, chains):
    found = [run.policy.transition(chains, k) for k in chains.steps]
    return torch.stack([g.mean for g in found], 1), torch.stack([g.std for g in found], 1)


def scored_chains(run, chains, advantage):
    steps = list(chains.steps)
    rows = torch.arange(len(chains)).repeat_interleave(len(steps))
    k = torch.tensor(steps).repeat(len(chains))
    return run.policy.score(chains[rows], k, advantage[rows], None)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_ratio_is_that_of_whole_chains(tmp_path, slow, reduce):
    run, method, noise = noisy(tmp_path, slow)
    method.reduce, method.clip, method.entropy = reduce, 1e9, 0.0
    rollout = run.collect(6, 1)
    chains = rollout.trajectory
    moved(run, noise)
    mean, std = transitions(run, chains)
    difference = chain_density(chains, mean, std, reduce) - chain_density(
        chains, chains.mean, chains.std, reduce
    )
    if reduce == "mean":
        difference = difference * 5 / 4  # ours leaves the prior, which cancels, out of the mean
    advantage = torch.randn(len(chains))
    loss, metrics = method.loss(scored_chains(run, chains, advantage))
    ratio = metrics["ratio_mean"].float().view(len(chains), 4)
    assert torch.equal(ratio, ratio[:, :1].expand_as(ratio)), "a chain has one ratio"
    assert torch.allclose(ratio[:, 0].log(), difference, atol=1e-3)
    assert difference.abs().max() > 1e-2
    expected = -advantage.repeat_interleave(4) * metrics["ratio_mean"].float()
    assert torch.allclose(loss, expected, rtol=1e-4)
    single = (
        Normal(mean, std).log_prob(chains.x[:, 1:])
        - Normal(chains.mean, chains.std).log_prob(chains.x[:, 1:])
    ).flatten(2)
    of_steps = single.sum(2) if reduce == "sum" else single.mean(2)
    assert not torch.allclose(
        of_steps, difference[:, None].expand_as(of_steps), atol=1e-3
    )  # control: a step's own


def test_the_first_pass_has_ratio_one_and_clips_nothing(tmp_path, slow):
    run, method, noise = noisy(tmp_path, slow)
    rollout = run.collect(6, 1)
    chains, advantage = rollout.trajectory, torch.randn(len(rollout.trajectory))
    _, metrics = method.loss(scored_chains(run, chains, advantage))
    assert (metrics["ratio_mean"] - 1).abs().max() < 1e-5
    assert metrics["clip_fraction"].sum() == 0
    moved(run, noise, 0.1)
    _, after = method.loss(scored_chains(run, chains, advantage))
    assert (after["ratio_mean"] - 1).abs().max() > 1e-3
    assert after["clip_fraction"].sum() > 0


def test_control_two_time_grids_do_not_replay(tmp_path, slow):
    """The public code acts on linspace(0, 1, K) and scores on linspace(0, 1 - 1/K, K);
    unchanged weights must give ratio 1.
    """
    run, method, _ = noisy(tmp_path, slow)
    model, K = run.policy.model, 4
    context, _, _ = Recorded(episodes=4).rows(torch.arange(6), 1, range(2))
    condition, std = model.encode(context), 0.17

    def means(x, times):
        found = []
        for k in range(K):
            prediction = model.denoise(x[:, k], times[k].expand(len(x)), condition)
            found.append(x[:, k] - (prediction.eps - prediction.x0) / K)
        return torch.stack(found, 1).detach()

    def sample(times):
        x = [torch.randn(6, *model.event_shape)]
        for k in range(K):
            prediction = model.denoise(x[-1], times[k].expand(6), condition)
            mean = x[-1] - (prediction.eps - prediction.x0) / K
            x.append((mean + std * torch.randn_like(mean)).detach())
        return torch.stack(x, 1)

    acting, scoring = (
        1 - torch.linspace(0, 1, K).double(),
        1 - torch.linspace(0, 1 - 1 / K, K).double(),
    )
    acting[-1] = 1e-3  # our flow is not asked at 0
    x = sample(acting)
    old, one, two = means(x, acting), means(x, acting), means(x, scoring)

    def gap(new):
        gaussians = [
            Gaussian(m, torch.full_like(m, std))
            for m in (new[:, 0], old[:, 0], new[:, 2], old[:, 2])
        ]
        log_ratios = [
            method.log_ratio(*gaussians[:2], x[:, 1]),
            method.log_ratio(*gaussians[2:], x[:, 3]),
        ]
        return float(torch.stack(log_ratios).abs().max())

    assert gap(one) == 0
    assert gap(two) > method.clip
    rollout = run.collect(6, 1)
    assert run.verified(rollout, method.log_ratio, method.clip / 10) is rollout
    assert run.replay_check.gap < 1e-4


def test_micro_batches_never_divide_a_chain(tmp_path, slow):
    found = []
    for micro_batch in ("auto", 1, 6):
        folder = tmp_path / str(micro_batch)
        folder.mkdir()
        torch.manual_seed(0)
        run, method, _ = noisy(folder, slow, micro_batch=micro_batch)
        rollout = run.collect(6, 1)
        advantage = torch.linspace(-1, 1, len(rollout.trajectory))
        for batch in run.chains(rollout, 2, 0):
            run.update(rollout, batch, advantage, method.loss)
        found.append(run.weights().values)
    for other in found[1:]:
        assert max(float((a - b).abs().max()) for a, b in zip(found[0], other, strict=True)) < 1e-5


def test_the_gradient_is_the_mean_over_chains(tmp_path, slow):
    run, method, noise = noisy(tmp_path, slow, optimizer={"lr": 1e-3, "max_grad_norm": 1e9})
    rollout = run.collect(6, 1)
    chains, advantage = rollout.trajectory, torch.randn(len(rollout.trajectory))
    moved(run, noise, 0.005)
    mean, std = transitions(run, chains)
    new = Normal(mean, std).log_prob(chains.x[:, 1:]).flatten(1).mean(1)
    old = Normal(chains.mean, chains.std).log_prob(chains.x[:, 1:]).flatten(1).mean(1)
    ratio = (new - old).exp()
    surrogate = torch.maximum(
        -advantage * ratio, -advantage * ratio.clamp(1 - method.clip, 1 + method.clip)
    )
    objective = (surrogate - method.entropy * std.flatten(1).log().mean(1)).mean()
    parameters = [*run.trainable, *noise.parameters()]
    expected = torch.autograd.grad(objective, parameters)
    also = run.new_optimizer(noise.parameters(), OptimizerConfig(lr=1e-3, max_grad_norm=1e9))
    (batch,) = run.chains(rollout, 1, 0)
    run.update(rollout, batch, advantage, method.loss, also=[also])
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=2e-3, atol=1e-6)
    assert all(float(g.abs().max()) > 0 for g in expected)


@pytest.mark.parametrize(("entropy", "sign"), [(0.5, 1), (0.0, 0)])
def test_the_entropy_term_widens_the_noise(tmp_path, slow, entropy, sign):
    run, method, noise = noisy(tmp_path, slow)
    method.entropy = entropy
    rollout = run.collect(6, 1)
    before = transitions(run, rollout.trajectory)[1].detach().log().mean()
    also = run.new_optimizer(noise.parameters(), OptimizerConfig(lr=1e-2, weight_decay=0.0))
    weights = [p.detach().clone() for p in noise.parameters()]
    (batch,) = run.chains(rollout, 1, 0)
    run.update(rollout, batch, torch.zeros(len(rollout.trajectory)), method.loss, also=[also])
    after = transitions(run, rollout.trajectory)[1].detach().log().mean()
    if sign:
        assert after > before + 1e-3
    else:
        assert all(torch.equal(a, b) for a, b in zip(weights, noise.parameters(), strict=True))


# -- training --------------------------------------------------------------------------------------


def test_both_networks_learn_and_are_resumable(tmp_path, slow):
    raw = experiment(
        tmp_path,
        policy={"name": "mlp", "pretrained": slow},
        chain=ODE,
        method={**SMALL, "noise_lr": 1e-2},
        task=SHORT,
        budget={"iterations": 2},
        checkpoint_every=1,
    )
    folder = train(parse.parse(raw)).folder
    one, two = (torch.load(folder / f"checkpoints/{i}/state.pt", weights_only=True) for i in (1, 2))
    assert {"noise_optimizer", "value", "value_optimizer"} < set(one["kept"])
    assert set(one["parts"]) == {"std"}
    for kept, name in (("parts", "std"), ("kept", "value")):
        assert any(not torch.equal(v, two[kept][name][n]) for n, v in one[kept][name].items())
    assert any(
        not torch.equal(a, b) for a, b in zip(one["parameters"], two["parameters"], strict=True)
    )
    assert two["kept"]["noise_optimizer"]["updates"] == two["optimizer"]["updates"] > 0


def test_the_noise_is_saved_and_acts_only_where_the_sampler_draws(tmp_path, slow):
    """The deployed policy acts with the ODE; with the training kernel it acts as in training."""
    run, _, noise = noisy(tmp_path, slow)
    moved(run, noise)
    assert run.deployed.noise is None
    assert run.deployed.parts["std"] is noise
    save_policy(run.deployed, run.experiment.policy, run.deployment.sampler, tmp_path / "saved")
    loaded = genpolicy.load(tmp_path / "saved")
    assert loaded.noise is None
    state = loaded.parts["std"].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in noise.state_dict().items())
    kept, was = (load_file(f"{folder}/mlp.safetensors") for folder in (tmp_path / "saved", slow))
    assert kept.keys() == was.keys()
    context, _, _ = Recorded(episodes=4).rows(torch.arange(6), 1, range(2))
    condition, names = loaded.model.encode(context), Noise.rows(0, 0, torch.arange(6), 1)
    x, grid = names(-1, loaded.model.event_shape), loaded.chain.grid
    for k in range(4):
        prediction = loaded.model.denoise(x, grid[k].expand(6), condition)
        x = x + (prediction.eps - prediction.x0) * float(grid[k + 1] - grid[k])
    assert torch.allclose(loaded.sample(condition, names).x0, x, atol=1e-5)
    training = run.policy.sample(run.policy.model.encode(context), names).x0
    assert not torch.allclose(training, x, atol=1e-2)  # control: with its noise it acts otherwise
    again = genpolicy.load(tmp_path / "saved", kernel=ODE["kernel"])
    assert torch.equal(again.sample(condition, names).x0, training)
    nowhere = genpolicy.load(tmp_path / "saved", kernel=ODE["kernel"], window=[0, 0])
    assert torch.allclose(nowhere.sample(condition, names).x0, x, atol=1e-5)


def test_a_run_goes_on_with_the_noise_that_its_policy_has_learned(tmp_path, slow):
    run, _, noise = noisy(tmp_path, slow)
    save_policy(run.deployed, run.experiment.policy, run.deployment.sampler, tmp_path / "saved")
    raw = experiment(
        tmp_path,
        policy={"name": "mlp", "pretrained": str(tmp_path / "saved")},
        chain=ODE,
        method={**SMALL, "warm_up": 1},
        task=SHORT,
        budget={"iterations": 1},
    )
    folder = train(parse.parse(raw)).folder
    state = torch.load(folder / "checkpoints/1/state.pt", weights_only=True)["parts"]["std"]
    assert all(torch.equal(value, state[name]) for name, value in noise.state_dict().items())


def test_what_training_has_taught_the_noise_is_saved_with_the_policy(tmp_path, slow):
    raw = experiment(
        tmp_path,
        policy={"name": "mlp", "pretrained": slow},
        chain=ODE,
        method={**SMALL, "noise_lr": 1e-2},
        task=SHORT,
        budget={"iterations": 2},
    )
    folder = train(parse.parse(raw)).folder
    learned = torch.load(folder / "checkpoints/2/state.pt", weights_only=True)["parts"]["std"]
    assert learned["network.2.bias"].abs().max() > 0, "control: it has learned"
    for saved in (folder / "policy", folder / "policy_best"):
        state = genpolicy.load(saved).parts["std"].state_dict()
        assert state.keys() == learned.keys()
        assert all(torch.equal(value, learned[name]) for name, value in state.items())


LEARNING = {
    "name": "reinflow",
    "episodes": 64,
    "gamma": 0.8,
    "warm_up": 1,
    "epochs": 4,
    "minibatch": 32,
    "reduce": "sum",
    "clip": 0.2,
    "std_low": 0.2,
    "std_high": 0.5,
    "entropy": 0.0,
    "noise_lr": 1e-3,
    "critic_lr": 3e-3,
    "critic_epochs": 5,
}


def improved(folder, pretrained, iterations=6):
    raw = experiment(
        folder,
        policy={"name": "mlp", "pretrained": pretrained},
        chain=ODE,
        task=SHORT,
        method=LEARNING,
        optimizer={"lr": 3e-3},
        budget={"iterations": iterations},
        eval={"every": 0, "episodes": 60},
        environments=64,
    )
    return train(parse.parse(raw))


def test_it_improves_a_robot_policy_in_seconds(tmp_path, slow):
    result = improved(tmp_path, slow)
    assert result.after["return"] > result.before["return"] + 0.3
    assert result.summary["replay_gap"] < LEARNING["clip"] / 10


def test_control_the_wrong_sign_makes_it_worse(tmp_path, slow, monkeypatch):
    honest = reinflow.clipped_surrogate
    monkeypatch.setattr(
        reinflow,
        "clipped_surrogate",
        lambda log_rho, advantage, clip: honest(log_rho, -advantage, clip),
    )
    result = improved(tmp_path, slow)
    assert result.after["return"] < result.before["return"]


def test_a_chain_of_one_step(tmp_path, slow):
    raw = experiment(
        tmp_path,
        policy={"name": "mlp", "pretrained": slow},
        chain={**ODE, "steps": 1, "window": [0, 1]},
        method=SMALL,
        task=SHORT,
        budget={"iterations": 1},
    )
    assert train(parse.parse(raw)).summary["replay_gap"] < 1e-4


def test_what_it_is_not_derived_for_is_refused(tmp_path, slow):
    raw = experiment(tmp_path, chain=ODE, method=SMALL)
    with pytest.raises(ConfigError, match="does not predict a velocity"):
        train(parse.parse(raw))
    with pytest.raises(ConfigError, match=r"std_low 0.3 must be below std_high 0.2"):
        ReinFlow(std_low=0.3, std_high=0.2)
    for wrong, said in (
        ({"std_low": 0.0}, "std_low is 0.0"),
        ({"entropy": -1.0}, "entropy is -1.0"),
        ({"clip": 0.0}, "clip is 0.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            ReinFlow(**wrong)


FLOORED = {"name": "floorstd", "floor": 0.1, "kernel": {"name": "ddim", "eta": 0.0}}


@pytest.mark.parametrize(
    "kernel", [{"name": "ddim", "eta": 1.0}, {"name": "sde", "a": 0.7}, FLOORED]
)
def test_a_kernel_with_noise_of_its_own_is_refused(tmp_path, slow, kernel):
    """Its mean leaves room for its own std, and the learned one would be drawn around it."""
    sections = {"policy": {"name": "mlp", "pretrained": slow}, "method": SMALL, "task": SHORT}
    run, method = prepared(tmp_path, chain={**ODE, "kernel": kernel}, **sections)
    with run, pytest.raises(ConfigError, match="learns the noise of its steps, and kernel"):
        method.train(run)
    own = run.policy.chain.coefficients(1)
    (tmp_path / "ode").mkdir()
    ode = prepared(tmp_path / "ode", chain=ODE, **sections)[0].policy.chain.coefficients(1)
    assert float((own.eps - ode.eps).abs()) > 1e-3, "control: it is no Euler step"


def test_a_chain_that_explores_nowhere_is_refused(tmp_path, slow):
    """Without a window a chain of one step has no step that is not the last:
    that must be said before any work.
    """
    raw = experiment(
        tmp_path,
        policy={"name": "mlp", "pretrained": slow},
        chain={**ODE, "steps": 1, "window": None},
        method=SMALL,
        task=SHORT,
    )
    with pytest.raises(ConfigError, match="no stochastic step"):
        train(parse.parse(raw))


def test_a_toy_of_prompts_is_known_by_its_features(tmp_path):
    run, _ = prepare(
        parse.parse(toy.experiment(tmp_path)), tmp_path / "run", Processes(Accelerator(cpu=True))
    )
    assert run.features == 8
