"""The options of every verb. Only the standard library is imported here, so that --help answers at
once.
"""

import argparse
from typing import Any, NoReturn

from genpolicy import __version__
from genpolicy.config.errors import ConfigError, choice

LISTED = (
    *("methods", "models", "rewards", "tasks", "datasets", "formats"),
    *("kernels", "samplers", "configs"),
)
"""The kinds that `genpolicy list` knows."""
WORLDS = ("both", "pictures", "robot")
"""The halves of the quickstart, and both of them."""
NOISE = 0.1
"""Standard deviation of the noise on an expert's actions, unless it is asked for (in actions)."""
FORMAT = "onnx"
"""The format of an export, unless it is asked for."""
POLICY = "a run's folder, its policy/ or policy_best/, a diffusers or LeRobot folder or hub id"
TRUST = "let the policy's and the data's files import the code that they name (docs/security.md)"
OVERRIDES = "any key of the experiment, for example --optimizer.lr=1e-5"


class Parser(argparse.ArgumentParser):
    """A parser that raises `ConfigError` with one sentence where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = action.metavar if isinstance(action.metavar, str) else action.dest
            choice(name, value, list(action.choices))


def command_line() -> Parser:
    """The parser of `genpolicy VERB ...`.

    What it reads holds, beside the verb's own options, ``module`` (the name of the file of
    genpolicy/cli that does the verb) and ``keys`` (what an argument that is no option of the verb
    must begin with).
    """
    parser = Parser(
        prog="genpolicy",
        description="Improve diffusion and flow policies by reinforcement learning.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"genpolicy {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _quickstart(verbs)
    _train(verbs)
    _evaluate(verbs)
    _demonstrate(verbs)
    _compact(verbs)
    _compare(verbs)
    _sample(verbs)
    _pairs(verbs)
    _export(verbs)
    _list(verbs)
    _check(verbs)
    return parser


def _verb(verbs: Any, name: str, text: str, module: str, keys: str | tuple[str, ...] = ()) -> Any:
    made = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    made.set_defaults(module=module, keys=keys)
    return made


def _quickstart(verbs: Any) -> None:
    text = "Train the embedded models with reinforcement and show what changed."
    verb = _verb(verbs, "quickstart", text, "quickstart")
    verb.add_argument(
        "--out", default="runs/quickstart", help="folder to write (default: %(default)s)"
    )
    verb.add_argument("--seed", type=int, default=0, help="of the runs (default: %(default)s)")
    verb.add_argument(
        "--world",
        choices=WORLDS,
        default=WORLDS[0],
        metavar="WORLD",
        help=f"one of {', '.join(WORLDS)} (default: both)",
    )


def _train(verbs: Any) -> None:
    text = "Run an experiment, or resume one from its run's config.yaml."
    verb = _verb(verbs, "train", text, "train", keys="")
    verb.usage = "genpolicy train CONFIG [--section.key=value ...] [--plan] [--trust]"
    verb.add_argument(
        "config", help="a YAML, or the name of a shipped one (genpolicy list configs)"
    )
    verb.add_argument(
        "--plan",
        action="store_true",
        help="only measure one iteration: cost, time, memory; writes nothing. Of a published"
        " pipeline that is not on this machine the memory is computed, for cards of 24, 48 and"
        " 80 GB",
    )
    _trust(verb)
    verb.add_argument("--section.key=value", action="store_true", dest="overrides", help=OVERRIDES)


def _evaluate(verbs: Any) -> None:
    text = (
        "Judge a policy's deployed sampler on fixed prompts, or in episodes from fixed starts; "
        "writes eval.json."
    )
    verb = _verb(verbs, "evaluate", text, "evaluate", keys="--task.")
    verb.usage = "genpolicy evaluate POLICY [options] [--task.key=value ...]"
    verb.add_argument("policy", help=f"{POLICY}; or an export, played through genpolicy_runtime")
    verb.add_argument(
        "--seed",
        type=int,
        help="of the noise and of the first start (default: the run's evaluation)",
    )
    verb.add_argument(
        "--out",
        metavar="DIR",
        help="folder of eval.json (default: the policy's, else the current one)",
    )
    _trust(verb)
    _sampler_options(verb)
    _evaluate_prompts(verb.add_argument_group("of policies that draw"))
    _evaluate_episodes(verb.add_argument_group("of policies that act"))


def _evaluate_prompts(group: Any) -> None:
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line (default: the run's evaluation prompts)",
    )
    group.add_argument(
        "--samples", type=int, metavar="N", help="samples in all (default: the run's)"
    )
    group.add_argument(
        "--reward",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="rewards to measure (default: the run's)",
    )


def _evaluate_episodes(group: Any) -> None:
    group.add_argument(
        "--task", metavar="NAME|YAML", help="a task, or a YAML with one (default: the run's)"
    )
    group.add_argument(
        "--task.key=value",
        action="store_true",
        dest="overrides",
        help="its settings, as --task.env=assembly-v3",
    )
    group.add_argument(
        "--episodes", type=int, metavar="N", help="episodes to play (default: the run's)"
    )
    group.add_argument(
        "--environments", type=int, metavar="N", help="of them side by side (default: the run's)"
    )
    group.add_argument(
        "--samplers",
        nargs="+",
        action="extend",
        metavar="NAME|K=V",
        help="others to compare it with: ode, mean, stochastic, last_mean, best_of_16 (of so many"
        " samples the one that the policy's critic picks), native, rti, rti_mean, sdedit (each"
        " decision from the plan before it, docs/rti.md), or a key of the sampler (steps=1)",
    )
    group.add_argument(
        "--deploy",
        metavar="DIR",
        help="save the policy into a new folder, deployed with the last of the samplers",
    )
    group.add_argument(
        "--gifs", type=int, metavar="N", help="GIFs of so many successes and failures (default: 2)"
    )


def _demonstrate(verbs: Any) -> None:
    text = "Record an expert's or a policy's episodes of a task as a data set."
    verb = _verb(verbs, "demonstrate", text, "demonstrate", keys="--task.")
    verb.usage = "genpolicy demonstrate TASK [--out DIR] [options] [--task.key=value ...]"
    verb.add_argument(
        "task", metavar="NAME|YAML", help="a task, or a YAML with one, as of an experiment"
    )
    verb.add_argument(
        "--task.key=value", action="store_true", dest="overrides", help="its settings"
    )
    verb.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write (default: where the YAML's data section looks)",
    )
    verb.add_argument(
        "--episodes", type=int, default=10, metavar="N", help="to record (default: %(default)s)"
    )
    verb.add_argument(
        "--noise", type=float, help=f"std, on the expert's actions (default: {NOISE})"
    )
    verb.add_argument(
        "--seed", type=int, default=10_000, help="of the first start (default: %(default)s)"
    )
    verb.add_argument("--by", metavar="POLICY", help="who acts (default: the task's expert)")
    _trust(verb)


def _compact(verbs: Any) -> None:
    text = "Write the episodes that a run has kept (record: true) as one data set."
    verb = _verb(verbs, "compact", text, "compact")
    verb.add_argument("run", metavar="RUN", help="a run's folder")
    verb.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    _trust(verb)


def _compare(verbs: Any) -> None:
    text = "Train several experiments from one start, at equal budget, over several seeds."
    verb = _verb(verbs, "compare", text, "compare", keys="")
    verb.usage = (
        "genpolicy compare CONFIG CONFIG ... --out DIR [--seeds S] [--section.key=value ...]"
    )
    verb.add_argument(
        "configs", nargs="+", metavar="CONFIG", help="YAMLs, or names of shipped ones"
    )
    verb.add_argument("--seeds", default="0-2", help="such as 0-2 or 0,3,7 (default: %(default)s)")
    verb.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the runs, the table and the figure"
    )
    _trust(verb)
    verb.add_argument(
        "--section.key=value", action="store_true", dest="overrides", help=f"{OVERRIDES}; for all"
    )


def _sample(verbs: Any) -> None:
    text = "Draw with a policy's deployed sampler: a PNG (videos: a GIF) per sample, and a grid."
    verb = _verb(verbs, "sample", text, "sample")
    verb.add_argument("policy", help=POLICY)
    verb.add_argument(
        "--prompts",
        required=True,
        metavar="TEXT|FILE",
        help="one prompt, or a file with one a line",
    )
    verb.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    verb.add_argument(
        "--n", type=int, default=1, help="samples of each prompt (default: %(default)s)"
    )
    verb.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    _trust(verb)
    _sampler_options(verb)


def _pairs(verbs: Any) -> None:
    text = "Draw pairs of pictures from a policy, of which a reward prefers one, as a data set."
    verb = _verb(verbs, "pairs", text, "pairs")
    verb.add_argument("policy", help=POLICY)
    verb.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    verb.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line (default: the prompts of the run)"
    )
    verb.add_argument(
        "--reward",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="rewards to sum (default: the run's)",
    )
    verb.add_argument(
        "--groups",
        type=int,
        metavar="N",
        help="groups of samples, over the prompts in turn; each gives a pair of its best and its"
        " worst, or none where the reward sees no difference (default: one per prompt)",
    )
    verb.add_argument(
        "--members", type=int, default=8, metavar="N", help="samples per group (default: 8)"
    )
    verb.add_argument(
        "--wrong",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="probability of each label to be wrong, to study noise (default: %(default)s)",
    )
    verb.add_argument(
        "--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)"
    )
    _trust(verb)
    _sampler_options(verb)


def _export(verbs: Any) -> None:
    text = (
        "Write a policy in another format: an ONNX graph that acts without torch, a LeRobot folder,"
        " a diffusers pipeline, a LoRA."
    )
    verb = _verb(verbs, "export", text, "export")
    verb.add_argument("policy", help=POLICY)
    verb.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    verb.add_argument(
        "--format",
        default=FORMAT,
        metavar="NAME",
        help="onnx, lerobot, lerobot_plugin, diffusers, lora or kohya; genpolicy list formats tells"
        " more (default: %(default)s)",
    )
    verb.add_argument(
        "--instruction",
        metavar="TEXT",
        help="what a policy that reads words is to do (default: what its run's task says)",
    )
    verb.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        help="of the networks in an onnx graph; inputs and outputs stay fp32 (default: fp32)",
    )
    _trust(verb)
    _sampler_options(verb)


def _list(verbs: Any) -> None:
    verb = _verb(verbs, "list", "What ships, with one line each.", "listing")
    verb.add_argument("kind", choices=LISTED, help=f"one of {', '.join(LISTED)}", metavar="KIND")


def _check(verbs: Any) -> None:
    text = "Test the laws that a reward or a method of your own must keep."
    verb = _verb(verbs, "check", text, "check")
    verb.add_argument("leaf", help="mypkg.mod or mypkg.mod:entry")


def _trust(verb: Any) -> None:
    verb.add_argument("--trust", action="store_true", help=TRUST)


def _sampler_options(verb: Any) -> None:
    verb.add_argument("--steps", type=int, help="denoising steps (default: the deployed sampler's)")
    verb.add_argument(
        "--guidance",
        type=float,
        help="classifier-free scale, 1 is none (default: the deployed sampler's)",
    )
    verb.add_argument(
        "--sampler",
        nargs="+",
        action="extend",
        metavar="K=V",
        default=[],
        help="its other keys, such as kernel.name=heun",
    )
