"""The door: `genpolicy VERB`. Every verb imports what it needs only when it runs, so that --help
answers at once.
"""

import argparse
import ast
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

    from genpolicy.config.schema import Experiment
    from genpolicy.policy.files import Saved
    from genpolicy.training.rehearsal import Rehearsal

INTERRUPTED = 130
BAD_INPUT = 2
LISTED = ("methods", "models", "rewards", "tasks", "datasets", "kernels", "samplers", "configs")
WORLDS = ("both", "pictures", "robot")
FRAMES_PER_SECOND = 8
OF_PICTURES = ("prompts", "samples", "reward", "guidance")
OF_ACTIONS = ("episodes", "environments", "gifs", "samplers", "task")
"""Options of evaluate that only mean something for policies that draw, and for policies that act.
"""
NOISE = 0.1
"""On what an expert does, unless it is asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0, 1 for a law that fails, 2 for bad input, 130 when
    interrupted.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a dotted leaf, mypkg.mod:fn, may lie beside the user's YAML
    try:
        parser = _parser()
        args, extra = parser.parse_known_args(argv)
        foreign = [word for word in extra if not word.startswith(args.keys)]
        if foreign:
            parser.error(
                f"{args.verb} does not take {foreign[0]!r}; genpolicy {args.verb} --help shows what it does"
            )
        args.overrides = extra
        return args.run(args)
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("genpolicy: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `genpolicy list ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"genpolicy: {sentence}", file=sys.stderr)
        return BAD_INPUT


def _sentence(error: Exception) -> str | None:
    """What to say instead of a traceback: about bad input, nothing else."""
    from genpolicy.config.errors import ConfigError

    reward = sys.modules.get("genpolicy.contracts.reward")
    known = (ConfigError, OSError, *((reward.RewardError,) if reward is not None else ()))
    if not isinstance(error, known):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())


class _Parser(argparse.ArgumentParser):
    """Complains in one sentence, like everything else here."""

    def error(self, message: str) -> NoReturn:
        from genpolicy.config.errors import ConfigError

        raise ConfigError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            from genpolicy.config.errors import choice

            choice(
                action.metavar if isinstance(action.metavar, str) else action.dest,
                value,
                list(action.choices),
            )


def _parser() -> argparse.ArgumentParser:
    from genpolicy import __version__

    parser = _Parser(
        prog="genpolicy",
        description="Improve diffusion and flow policies by reinforcement learning.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"genpolicy {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(
        name: str, run: Callable[[Any], int], text: str, keys: str | tuple[str, ...] = ()
    ) -> Any:
        made = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(
            run=run, keys=keys
        )  # keys: how what it takes beside its options must begin
        return made

    policy = "a run's folder, its policy/ or policy_best/, a diffusers or LeRobot folder or hub id"
    overrides = "any key of the experiment, for example --optimizer.lr=1e-5"

    one = verb(
        "quickstart",
        _quickstart,
        "Train the embedded models with reinforcement and show what changed.",
    )
    one.add_argument(
        "--out", default="runs/quickstart", help="folder to write (default: %(default)s)"
    )
    one.add_argument("--seed", type=int, default=0, help="of the runs (default: %(default)s)")
    one.add_argument(
        "--world",
        choices=WORLDS,
        default=WORLDS[0],
        metavar="WORLD",
        help=f"one of {', '.join(WORLDS)} (default: both)",
    )

    one = verb(
        "train", _train, "Run an experiment, or resume one from its run's config.yaml.", keys=""
    )
    one.usage = "genpolicy train CONFIG [--section.key=value ...] [--plan]"
    one.add_argument("config", help="a YAML, or the name of a shipped one (genpolicy list configs)")
    one.add_argument(
        "--plan",
        action="store_true",
        help="only measure one iteration: cost, time, memory; writes nothing",
    )
    one.add_argument("--section.key=value", action="store_true", dest="overrides", help=overrides)

    text = "Judge a policy's deployed sampler on fixed prompts, or in episodes from fixed starts; writes eval.json."
    one = verb("evaluate", _evaluate, text, keys="--task.")
    one.usage = "genpolicy evaluate POLICY [options] [--task.key=value ...]"
    one.add_argument("policy", help=policy)
    one.add_argument(
        "--seed",
        type=int,
        help="of the noise and of the first start (default: the run's evaluation)",
    )
    one.add_argument(
        "--out",
        metavar="DIR",
        help="folder of eval.json (default: the policy's, else the current one)",
    )
    _sampler_options(one)
    drawn = one.add_argument_group("of policies that draw")
    drawn.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line (default: the run's evaluation prompts)",
    )
    drawn.add_argument(
        "--samples", type=int, metavar="N", help="samples in all (default: the run's)"
    )
    drawn.add_argument(
        "--reward", nargs="+", metavar="NAME", help="rewards to measure (default: the run's)"
    )
    acted = one.add_argument_group("of policies that act")
    acted.add_argument(
        "--task", metavar="NAME|YAML", help="a task, or a YAML with one (default: the run's)"
    )
    acted.add_argument(
        "--task.key=value",
        action="store_true",
        dest="overrides",
        help="its settings, as --task.env=assembly-v3",
    )
    acted.add_argument(
        "--episodes", type=int, metavar="N", help="episodes to play (default: the run's)"
    )
    acted.add_argument(
        "--environments", type=int, metavar="N", help="of them side by side (default: the run's)"
    )
    acted.add_argument(
        "--samplers",
        nargs="+",
        metavar="NAME|K=V",
        help="others to compare it with: ode, mean, stochastic, last_mean, best_of_16 (of so many samples the one that the"
        " policy's critic picks), native, or a key of the sampler (steps=1)",
    )
    acted.add_argument(
        "--gifs", type=int, metavar="N", help="GIFs of so many successes and failures (default: 2)"
    )

    text = "Record an expert's or a policy's episodes of a task as a data set."
    one = verb("demonstrate", _demonstrate, text, keys="--task.")
    one.usage = "genpolicy demonstrate TASK [--out DIR] [options] [--task.key=value ...]"
    one.add_argument(
        "task", metavar="NAME|YAML", help="a task, or a YAML with one, as of an experiment"
    )
    one.add_argument("--task.key=value", action="store_true", dest="overrides", help="its settings")
    one.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write (default: where the YAML's data section looks)",
    )
    one.add_argument(
        "--episodes", type=int, default=10, metavar="N", help="to record (default: %(default)s)"
    )
    one.add_argument("--noise", type=float, help=f"std, on the expert's actions (default: {NOISE})")
    one.add_argument(
        "--seed", type=int, default=10_000, help="of the first start (default: %(default)s)"
    )
    one.add_argument("--by", metavar="POLICY", help="who acts (default: the task's expert)")

    text = "Train several experiments from one start, at equal budget, over several seeds."
    one = verb("compare", _compare, text, keys="")
    one.usage = (
        "genpolicy compare CONFIG CONFIG ... --out DIR [--seeds S] [--section.key=value ...]"
    )
    one.add_argument("configs", nargs="+", metavar="CONFIG", help="YAMLs, or names of shipped ones")
    one.add_argument("--seeds", default="0-2", help="such as 0-2 or 0,3,7 (default: %(default)s)")
    one.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the runs, the table and the figure"
    )
    one.add_argument(
        "--section.key=value", action="store_true", dest="overrides", help=f"{overrides}; for all"
    )

    one = verb(
        "sample",
        _sample,
        "Draw with a policy's deployed sampler: a PNG (videos: a GIF) per sample, and a grid.",
    )
    one.add_argument("policy", help=policy)
    one.add_argument(
        "--prompts",
        required=True,
        metavar="TEXT|FILE",
        help="one prompt, or a file with one a line",
    )
    one.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    one.add_argument(
        "--n", type=int, default=1, help="samples of each prompt (default: %(default)s)"
    )
    one.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    _sampler_options(one)

    one = verb("list", _list, "What ships, with one line each.")
    one.add_argument("kind", choices=LISTED, help=f"one of {', '.join(LISTED)}", metavar="KIND")

    one = verb("check", _check, "Test the laws that a reward or a method of your own must keep.")
    one.add_argument("leaf", help="mypkg.mod or mypkg.mod:entry")
    return parser


def _sampler_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, help="denoising steps (default: the deployed sampler's)"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        help="classifier-free scale, 1 is none (default: the deployed sampler's)",
    )
    parser.add_argument(
        "--sampler",
        nargs="+",
        metavar="K=V",
        default=[],
        help="its other keys, such as kernel.name=heun",
    )


def _sampler(args: Any) -> dict[str, Any]:
    """The sampler's keys that the command line replaces."""
    from genpolicy.config.parse import override

    asked: dict[str, Any] = {
        k: getattr(args, k) for k in ("steps", "guidance") if getattr(args, k) is not None
    }
    for text in args.sampler:
        override(asked, f"--{text}")
    return asked


# Verbs


def _train(args: Any) -> int:
    from genpolicy.training.experiment import rehearse, train
    from genpolicy.training.processes import end_processes

    main_process = os.environ.get("RANK", "0") == "0"
    if args.plan:
        plan = rehearse(args.config, args.overrides)
        end_processes()
        if main_process:
            _print_plan(*plan)
        return 0
    result = train(args.config, args.overrides)
    end_processes()
    if main_process:
        print(f"{result.folder}: {_rewards(result.before, result.after)}")
    return 0


def _rewards(before: dict[str, Any], after: dict[str, Any]) -> str:
    judged = ("success_rate", "return")
    names = [
        name for name in after if (name.startswith("reward/") or name in judged) and name in before
    ]
    return ", ".join(
        f"{name.removeprefix('reward/')} {before[name]:.3f} -> {after[name]:.3f}" for name in names
    )


def _print_plan(experiment: "Experiment", cost: "Rehearsal") -> None:
    from genpolicy.config.parse import to_yaml

    print(to_yaml(experiment))
    for stage in cost.stages:
        name = f" of {stage.stage}" if len(cost.stages) > 1 else ""
        print(
            f"one real iteration{name}: {stage.did}, {stage.evaluations_per_sample:.1f} network evaluations each"
        )
        print(f"{'phase':>14} {'seconds':>9} {'peak GB':>8}")
        for phase, (seconds, gigabytes) in stage.phases.items():
            print(f"{phase:>14} {seconds:9.2f} {gigabytes:8.2f}")
    print(f"memory is {cost.memory}; the replay check is made once, at the first iteration")
    print(f"one evaluation: {cost.judged}, about {_duration(cost.evaluation_seconds)}")
    iterations = f"{cost.iterations} iterations, {cost.evaluations:.3g} network evaluations"
    print(f"the whole budget: {iterations}, about {_duration(cost.seconds)}, evaluation included")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return (
        f"{seconds:.1f} s"
        if minutes < 2
        else f"{minutes:.0f} min"
        if minutes < 120
        else f"{minutes / 60:.1f} h"
    )


def _evaluate(args: Any) -> int:
    from dataclasses import asdict

    from genpolicy.evaluation import metrics_file
    from genpolicy.evaluation.prompt_scores import draw, latency, measure
    from genpolicy.policy import files
    from genpolicy.training import build

    saved = files.saved(args.policy, **_sampler(args))
    if saved.acts:
        return _try(args, saved)
    _refuse(args, OF_ACTIONS, f"{args.policy} draws: judge it with --prompts, --samples, --reward")
    raw_rewards, prompts, source, samples, seed = _evaluation_set(args, saved)
    rewards = build.make_rewards(raw_rewards)
    build.load_rewards(rewards)
    policy = saved.load()
    measured, per_sample = measure(policy, rewards, prompts=prompts, samples=samples, seed=seed)
    metrics = measured.metrics()
    found: dict[str, Any] = {
        "policy": saved.where,
        **{name: value for name, value in metrics.items() if name.startswith("reward/")},
        "ci95": {
            name.removeprefix("ci95/"): value
            for name, value in metrics.items()
            if name.startswith("ci95/")
        },
        "diversity": metrics["diversity"],
        "n": measured.samples,
        "prompts": source,
        "seeds": {"eval": seed},
        "sampler": asdict(saved.sampler),
        "nfe_per_sample": per_sample,
        "latency_ms": latency(lambda call: draw(policy, prompts[:1], 1, seed + call)),
    }
    out = _beside(args, saved)
    metrics_file.write_json(out / "eval.json", found)
    for name, (low, high) in found["ci95"].items():
        print(f"{name:>24}  {found[f'reward/{name}']:8.4f}  [{low:.4f}, {high:.4f}]")
    print(f"{measured.samples} samples, {per_sample:.1f} evaluations each; {out / 'eval.json'}")
    return 0


def _beside(args: Any, saved: "Saved") -> Path:
    """The folder of eval.json."""
    return Path(args.out or (args.policy if saved.run is not None else "."))


def _refuse(args: Any, names: Sequence[str], why: str) -> None:
    """Raise if one of these options was given."""
    from genpolicy.config.errors import ConfigError

    given = [name for name in names if getattr(args, name) is not None]
    if given or (args.overrides and "task" in names):
        raise ConfigError(f"--{given[0] if given else 'task'} does not apply: {why}")


def _try(args: Any, saved: "Saved") -> int:
    """Evaluate a policy that acts."""
    import torch

    from genpolicy.cli.evaluate_episodes import Plan, trial
    from genpolicy.config import parse, schema

    _refuse(
        args,
        OF_PICTURES,
        f"{args.policy} acts: judge it with --task, --episodes, --environments, --samplers",
    )
    run = parse.load(saved.run / "config.yaml") if saved.run is not None else None
    defaults, side_by_side = schema.EvalConfig(), schema.Experiment.environments
    if run is not None:
        defaults, side_by_side = run.eval, run.environments
        if run.threads is not None:
            torch.set_num_threads(run.threads)
    task = _task(
        args, run.task if run is not None else {}, f"{args.policy} comes from no run of ours"
    )
    plan = Plan(
        episodes=defaults.episodes if args.episodes is None else args.episodes,
        seed=defaults.seed if args.seed is None else args.seed,
        environments=side_by_side if args.environments is None else args.environments,
        gifs=2 if args.gifs is None else args.gifs,
    )
    trial(saved, task, plan, args.samplers or (), _beside(args, saved))
    return 0


def _task(args: Any, default: dict[str, Any], why: str) -> dict[str, Any]:
    """The task section that is asked for by name or in a YAML, or else the default one, with
    --task.key=value.
    """
    from genpolicy.config import errors, parse

    raw = {"task": _named(args.task)["task"] if args.task is not None else dict(default)}
    for text in args.overrides:
        parse.override(raw, text)
    if not raw["task"]:
        raise errors.ConfigError(
            f"{why}: name its --task, for example --task metaworld --task.env=assembly-v3"
        )
    return raw["task"]


def _named(name: str) -> dict[str, Any]:
    """A YAML with a task section, or the same of a task's bare name."""
    from genpolicy.config import errors, leaves, parse, shipped

    tasks = leaves.names("tasks")
    if ":" in name or name in tasks:
        return {"task": {"name": name}}
    if Path(name).suffix not in shipped.SUFFIXES and name not in shipped.configs():
        raise errors.ConfigError(
            f"there is no task {name!r}{errors.nearest(name, tasks)}; or give a YAML with one"
        )
    raw = parse.read_yaml(name)
    if "task" not in raw:
        raise errors.ConfigError(f"{name} has no task section")
    return raw if isinstance(raw["task"], dict) else {**raw, "task": {"name": raw["task"]}}


def _demonstrate(args: Any) -> int:
    from genpolicy.config.errors import ConfigError
    from genpolicy.rollout.demonstrations import demonstrate

    task, data = _task(args, {}, ""), _named(args.task).get("data")
    out = args.out or (data.get("root") if isinstance(data, dict) else None)
    if out is None:
        raise ConfigError(f"{args.task} does not say where its data set is: give --out DIR")
    noise = args.noise if args.noise is not None else 0.0 if args.by is not None else NOISE
    done = demonstrate(
        task, Path(out), episodes=args.episodes, noise=noise, seed=args.seed, policy=args.by
    )
    kept = f"{done.episodes} episodes of {done.tried} tried, {done.successes} of them successful"
    print(f"{out}: {kept}, {done.frames} frames")
    return 0


def _evaluation_set(
    args: Any, saved: "Saved"
) -> tuple[dict[str, Any], tuple[str, ...], str, int, int]:
    """The rewards, the prompts and where they come from, the samples and the seed: the run's, or
    what was asked for.
    """
    from genpolicy.config import errors, leaves, parse, schema
    from genpolicy.training import build
    from genpolicy.training.experiment import evaluation_prompts

    if args.samples is not None and args.samples < 1:
        raise errors.ConfigError(f"--samples is {args.samples}; it must be at least 1")
    rewards: dict[str, Any] = dict.fromkeys(args.reward or (), 1.0)
    source, defaults = args.prompts, schema.EvalConfig()
    prompts = build.prompt_lines(source) if source is not None else ()
    if saved.run is not None:
        experiment = parse.load(saved.run / "config.yaml")
        rewards, defaults = rewards or experiment.reward, experiment.eval
        prompts = prompts or evaluation_prompts(experiment, leaves.make("tasks", experiment.task))
        source = source or defaults.prompts or str(experiment.task.get("prompts"))
    if source is None or not rewards:
        raise errors.ConfigError(
            f"{args.policy} comes from no run of ours: name its --prompts FILE and --reward NAME"
        )
    seed = defaults.seed if args.seed is None else args.seed
    return rewards, prompts, source, args.samples or defaults.samples, seed


def _sample(args: Any) -> int:
    from genpolicy.config import errors
    from genpolicy.evaluation import pictures
    from genpolicy.evaluation.prompt_scores import draw
    from genpolicy.policy import files
    from genpolicy.training import build

    if args.n < 1:
        raise errors.ConfigError(f"--n is {args.n}; it must be at least 1")
    saved = files.saved(args.policy, **_sampler(args))
    if saved.acts:
        raise errors.ConfigError(
            f"{args.policy} acts, it does not draw: genpolicy evaluate plays and films it"
        )
    is_file = (
        Path(args.prompts).suffix == ".txt"
        or Path(args.prompts).is_file()
        or args.prompts.startswith("assets/")
    )
    prompts = build.prompt_lines(args.prompts) if is_file else (args.prompts,)
    if not all(prompt.strip() for prompt in prompts):
        raise errors.ConfigError("--prompts is empty: give a prompt, or a file with one a line")
    asked = [prompt for prompt in prompts for _ in range(args.n)]
    outputs = draw(saved.load(), prompts, args.n, args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for row, output in enumerate(outputs):
        _write_sample(output, out / f"{row // args.n:03d}_{row % args.n:02d}")
    pictures.grid(outputs, asked, out / "grid.png", columns=args.n if args.n > 1 else 8)
    count = f"{len(outputs)} sample{'s' * (len(outputs) > 1)}"
    print(
        f"{count} of {len(prompts)} prompt{'s' * (len(prompts) > 1)} in {out}, all together in {out / 'grid.png'}"
    )
    return 0


def _write_sample(output: "Tensor", stem: Path) -> None:
    """[3,H,W] to a PNG, [F,3,H,W] to a GIF."""
    from PIL import Image

    from genpolicy.evaluation.pictures import pixels

    frames = [
        Image.fromarray(frame) for frame in pixels(output if output.ndim == 4 else output[None])
    ]
    if output.ndim == 3:
        frames[0].save(stem.with_suffix(".png"))
    else:
        milliseconds = 1000 // FRAMES_PER_SECOND
        frames[0].save(
            stem.with_suffix(".gif"),
            save_all=True,
            append_images=frames[1:],
            duration=milliseconds,
            loop=0,
        )


def _compare(args: Any) -> int:
    from genpolicy.cli.compare import compare, seeds
    from genpolicy.training.processes import end_processes

    code = compare(args.configs, seeds(args.seeds), Path(args.out), args.overrides)
    end_processes()
    return code


def _quickstart(args: Any) -> int:
    from genpolicy.cli.quickstart import quickstart

    return quickstart(Path(args.out), args.seed, args.world)


def _check(args: Any) -> int:
    from genpolicy.cli.check import check

    return check(args.leaf)


def _list(args: Any) -> int:
    rows = list(_listed(args.kind))
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())
    return 0


def _listed(kind: str) -> Iterator[tuple[str, str]]:
    """(name, first line of its description). Leaves are read, not imported: some bring half a
    minute of libraries.
    """
    if kind == "configs":
        from genpolicy.config.shipped import configs

        for name, file in sorted(configs().items()):
            first = file.read_text(encoding="utf-8").lstrip().splitlines()[:1]
            yield (
                name,
                first[0].removeprefix("#").strip() if first and first[0].startswith("#") else "",
            )
        return
    if kind == "kernels":
        from genpolicy.policy.sampler import kernels

        for name, entry in sorted(kernels().items()):
            yield name, (entry.__doc__ or "").strip().partition("\n")[0]
        return
    if kind == "samplers":
        from genpolicy.evaluation.samplers import PRESETS

        yield from PRESETS.items()
        return
    for file in sorted((Path(__file__).parent / kind).glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        yield file.stem, text.partition("\n")[0]
