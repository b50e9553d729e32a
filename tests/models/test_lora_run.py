"""A run that starts from a user's LoRA:
that LoRA is the reference, and what is saved loads in plain diffusers.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import genpolicy
from genpolicy.chain import Noise
from genpolicy.cli.main import main
from genpolicy.config import parse
from genpolicy.config.errors import ConfigError
from genpolicy.contracts.task import Context
from genpolicy.training import checkpoint
from genpolicy.training.experiment import train
from genpolicy.training.prepare import prepare
from genpolicy.training.processes import Processes
from tests import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    tiny.sd3().save_pretrained(folder)
    return folder


def raw(pipeline: Path, folder: Path, start: str | None = None, **sections) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    return {
        "policy": {
            "name": "diffusers_pipeline",
            "pretrained": str(pipeline),
            "train": "lora",
            "lora": {"rank": 4, "alpha": 8, "start": start},
            "call": {"height": 32, "width": 32, "max_sequence_length": 16},
        },
        "chain": {"steps": 4, "kernel": {"name": "sde", "a": 0.7}},
        "task": {"name": "prompts", "prompts": str(folder / "prompts.txt")},
        "reward": "jpeg_compressibility",
        "method": {
            "name": "flow_grpo",
            "groups": 2,
            "group": 4,
            "updates": 1,
            "reduce": "sum",
            "clip": 0.2,
            "beta": 0.1,
            "advantage": "group",
        },
        "optimizer": {"lr": 1e-2},
        "budget": {"iterations": 3},
        "eval": {"every": 0, "samples": 4},
        "output": str(folder / "run"),
        **sections,
    }


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory):
    return train(parse.parse(raw(pipeline, tmp_path_factory.mktemp("first"))))


def lines(result) -> list[dict]:
    read = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if "policy/kl" in line]


def test_kl_starts_at_zero_and_grows(trained):
    kl = [line["policy/kl"] for line in lines(trained)]
    assert kl[0] == 0
    assert kl[-1] > 0


def test_reference_of_a_run_from_a_lora_is_that_lora(pipeline, trained, tmp_path):
    """KL 0 at the first update from a non-zero LoRA;
    against the bare base (adapters off) it is not.
    """
    experiment = parse.parse(raw(pipeline, tmp_path, start=str(trained.folder / "policy")))
    run, method = prepare(experiment, tmp_path / "run", Processes(Accelerator(cpu=True)))
    run.spent.iteration = 1
    reference, rollout = run.weights(), run.collect(2, 4)
    assert (
        max(
            float(p.detach().abs().max())
            for name, p in run.policy.model.trainable().items()
            if "lora_B" in name
        )
        > 0
    )
    step = run.policy.score(rollout.trajectory, 1, rollout.rows(torch.zeros(2, 4)), reference)
    assert method.loss(step)[1]["kl"].abs().max() == 0
    run.policy.model.denoiser.disable_adapters()
    with torch.no_grad():
        bare = run.policy.transition(rollout.trajectory, 1)
    run.policy.model.denoiser.enable_adapters()
    assert method.loss(replace(step, reference=bare))[1]["kl"].min() > 0


def test_saved_lora_draws_our_images_in_plain_diffusers(pipeline, trained):
    from diffusers import StableDiffusion3Pipeline

    policy = genpolicy.load(trained.folder)
    noise = Noise.rows(5, 0, torch.arange(2), 1)
    prompts = ["a red circle", "a blue square"]
    ours = policy.sample(policy.model.encode(Context(prompts)), noise).x0
    pipe = StableDiffusion3Pipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    call = {
        "latents": noise(-1, policy.model.event_shape),
        "num_inference_steps": 4,
        "sigmas": [1.0, 0.75, 0.5, 0.25],
        "guidance_scale": 1.0,
        "output_type": "latent",
        "height": 32,
        "width": 32,
        "max_sequence_length": 16,
    }
    bare = pipe(prompts, **call).images
    pipe.load_lora_weights(
        trained.folder / "policy", weight_name="pytorch_lora_weights.safetensors"
    )
    assert (pipe(prompts, **call).images - ours).abs().max() < 1e-5
    assert (bare - ours).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_networks_train_with_an_exact_replay(pipeline, tmp_path, precision):
    """fp16 goes through the gradient scaler;
    what is scored is what acted, so that nothing needs to be scored again.
    """
    experiment = raw(pipeline, tmp_path, budget={"iterations": 2})
    experiment["policy"] |= {
        "precision": precision,
        "gradient_checkpointing": True,
        "offload": True,
    }
    result = train(parse.parse(experiment))
    assert result.summary["replay_gap"] < 1e-5
    assert all(
        line["policy/ratio_mean"] == pytest.approx(1, abs=1e-3) for line in lines(result)[:1]
    )
    start = torch.load(result.folder / "checkpoints/0/state.pt", weights_only=True)["parameters"]
    end = torch.load(result.folder / "checkpoints/2/state.pt", weights_only=True)["parameters"]
    assert any(not torch.equal(a, b) for a, b in zip(start, end, strict=True))
    assert all(b.isfinite().all() for b in end)


def without_train(experiment: dict) -> dict:
    """The experiment whose policy section leaves ``train`` to its default, which is lora."""
    del experiment["policy"]["train"]
    return experiment


def drawn(folder: Path) -> torch.Tensor:
    policy = genpolicy.load(folder)
    noise = Noise.rows(5, 0, torch.arange(2), 1)
    return policy.sample(policy.model.encode(Context(["a red circle", "a blue square"])), noise).x0


def test_a_lora_run_that_leaves_train_to_its_default_loads_again(pipeline, trained, tmp_path):
    result = train(parse.parse(without_train(raw(pipeline, tmp_path / "default"))))
    assert torch.equal(drawn(result.folder), drawn(trained.folder))
    # and another run goes on from it
    start = str(result.folder / "policy")
    on = without_train(raw(pipeline, tmp_path / "on", start, budget={"iterations": 1}))
    assert (drawn(train(parse.parse(on)).folder) - drawn(result.folder)).abs().max() > 1e-4


@pytest.mark.parametrize("default", [False, True])
def test_a_lora_run_of_the_last_steps_loads_again_with_its_base(
    pipeline, tmp_path, default, capsys
):
    """DPPO's K' < K on prompts: the noisier steps stay the LoRA's that the run began with."""
    experiment = raw(
        pipeline,
        tmp_path / "run",
        method={"name": "dppo", "episodes": 4, "warm_up": 0},
        chain={"steps": 4, "kernel": {"name": "ddim", "eta": 1.0}, "window": [2, 3]},
        budget={"iterations": 1},
    )
    result = train(parse.parse(without_train(experiment) if default else experiment))
    policy = genpolicy.load(result.folder)
    assert list(policy.parts) == ["base"]
    out = tmp_path / "pictures"
    words = ["sample", str(result.folder), "--prompts", "a red circle", "--out", str(out)]
    assert main(words) == 0
    assert (out / "grid.png").is_file()
    # another run goes on from it, and its base stays what it is
    start = str(result.folder / "policy")
    on = {**experiment, "output": str(tmp_path / "on")}
    on["policy"] = {**experiment["policy"], "lora": {"start": start}}
    again = genpolicy.load(train(parse.parse(on)).folder)
    base, other = (p.parts["base"].weights for p in (policy, again))
    assert all(torch.equal(base[name], other[name]) for name in base)


def test_an_old_folder_of_a_whole_network_that_named_a_lora_loads(pipeline, tmp_path):
    """It was not read then."""
    experiment = raw(pipeline, tmp_path / "run", budget={"iterations": 1})
    experiment["policy"] |= {"train": "full", "lora": {"rank": 4}}
    folder = train(parse.parse(experiment)).folder / "policy"
    description = json.loads((folder / "genpolicy.json").read_text())
    description["policy"]["lora"] = {"start": "somewhere"}
    del description["crc32"]
    (folder / "genpolicy.json").write_text(json.dumps(description))
    assert genpolicy.load(folder).model.train == "full"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--policy.lora.alpha=16", r"policy.lora.alpha is 16, and was 8 when the checkpoint in"),
        ("--policy.lora.rank=2", "policy.lora.rank is 2, and was 4"),
        ("--policy.train=full", "policy.train is 'full', and was 'lora'"),
        ("--policy.negative_prompt=blue", "policy.negative_prompt is 'blue', and was None"),
    ],
)
def test_a_resumed_run_keeps_the_meaning_of_what_it_learned(trained, override, said):
    before = (trained.folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=said):
        train(trained.folder / "config.yaml", [override, "--budget.iterations=4"])
    assert (trained.folder / "config.yaml").read_text() == before


def test_a_resumed_run_keeps_the_lora_that_it_started_from(trained):
    """Another file has another alpha, which would rescale what was learned."""
    start = trained.folder / "policy"
    with pytest.raises(ConfigError, match=r"policy.lora.start is .*policy', and was None when"):
        train(
            trained.folder / "config.yaml",
            [f"--policy.lora.start={start}", "--budget.iterations=4"],
        )


def test_a_checkpoint_that_did_not_keep_its_policy_section_says_so(
    pipeline, tmp_path, monkeypatch, capsys
):
    """As checkpoints of older versions."""
    write = checkpoint.write

    def older(folder: Path, iteration: int, state: dict) -> None:
        write(folder, iteration, {key: value for key, value in state.items() if key != "policy"})

    monkeypatch.setattr(checkpoint, "write", older)
    result = train(parse.parse(raw(pipeline, tmp_path, budget={"iterations": 1})))
    assert "is of an older genpolicy" not in capsys.readouterr().err
    train(result.folder / "config.yaml", ["--budget.iterations=2"])
    said = capsys.readouterr()
    assert "is of an older genpolicy, which did not keep its policy" in said.out + said.err


def test_a_resumed_run_may_be_computed_otherwise(pipeline, tmp_path):
    """With another device, memory or place of the same files."""
    result = train(parse.parse(raw(pipeline, tmp_path, budget={"iterations": 1})))
    moved = tmp_path / "moved"
    shutil.copytree(pipeline, moved)
    more = ["--policy.offload=true", "--policy.gradient_checkpointing=true"]
    more += [f"--policy.pretrained={moved}", "--budget.iterations=2"]
    assert train(result.folder / "config.yaml", more).summary["iterations"] == 2


def test_a_resumed_run_goes_to_no_other_folder(trained, tmp_path):
    config, other = trained.folder / "config.yaml", tmp_path / "other"
    with pytest.raises(ConfigError, match=r"output is .*other, and .* resumes the run in its own"):
        train(config, [f"--output={other}"])
    assert not other.exists()
    train(config, [f"--output={trained.folder}"])  # control: that is where it goes on
