"""The state of a run: what a checkpoint holds, and how a run takes it up again."""

from collections.abc import Mapping
from typing import Any

from genpolicy.config.errors import ConfigError
from genpolicy.config.seal import edited
from genpolicy.config.whole_file import STAGED
from genpolicy.evaluation import metrics_file
from genpolicy.policy.teacher import TEACHER
from genpolicy.training import checkpoint
from genpolicy.training.run import Run
from genpolicy.training.workspace import CONFIG

FREE = (
    # what was learned from there is in the checkpoint, and so is who the teacher is (`Taught`)
    *("pretrained", "revision", TEACHER),
    *("device", "precision", "offload", "gradient_checkpointing"),
)
"""Settings of a policy that may change when its run is resumed: where files lie, and how it is
computed. Any other would give the weights of the checkpoint another meaning (a LoRA's alpha, and
the file that it starts from, whose own alpha it takes).
"""


def save(run: Run) -> None:
    """Checkpoint, and the policy as it stands, written atomically by the main process."""
    if run.processes.main:
        kept = run.state.registered
        state = {
            **run.learner.state_dict(),
            "policy": _meaning(run),
            "kept": run.state.waiting | {name: value.state_dict() for name, value in kept.items()},
            "parts": run.state.parts_state(),
        }
        # the policy first: a run that is killed in between resumes from before and saves it again;
        # a resumed run that stops before its first iteration has not attached every part again
        if run.iteration and not run.state.unclaimed:
            run.deployment.save(run.folder / "policy")
        checkpoint.write(run.folder, run.iteration, state)
        run.collector.trim(min(checkpoint.iterations(run.folder)))
    run.processes.wait()


def resume(run: Run) -> None:
    """Take up the newest whole checkpoint in the run's folder, if there is one.

    Raises `ConfigError` where all are damaged, where iterations were measured and no checkpoint is
    left, and where the checkpoint does not fit the experiment.
    """
    if run.processes.main:  # what a kill has left half-written
        for left in run.folder.rglob(f"{STAGED}*"):
            left.unlink()
    for number in metrics_file.damaged(run.folder):
        run.say(f"{run.folder / metrics_file.METRICS}: line {number} is damaged and left out")
    state = checkpoint.latest(run.folder, run.say)
    if state is None:
        measured = max((m["iteration"] for m in metrics_file.read(run.folder)), default=0)
        if measured:
            raise ConfigError(
                f"run {run.folder} has measured {measured} iterations and has no checkpoint: put"
                f" its folder checkpoints back from a copy, or delete {metrics_file.METRICS} to"
                " start again"
            )
        if run.processes.main:
            metrics_file.truncate(run.folder, -1)
        return
    config = run.folder / CONFIG
    if config.is_file() and edited(config.read_text(encoding="utf-8")):
        run.say(f"{config} has changed since the run wrote it: the run goes on as it says now")
    if "policy" in state:
        _require_same_policy(run, state["policy"])
    else:
        run.say(
            f"the checkpoint in {run.folder} is of an older genpolicy, which did not keep its"
            " policy section: what was learned keeps its meaning only if that section is as it was"
        )
    try:
        _restore(run, state)
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the checkpoint in {run.folder} does not fit this experiment (was its policy or"
            f" method changed?): {error}"
        ) from error
    if run.processes.main:
        metrics_file.truncate(run.folder, run.iteration)
    run.processes.wait()
    run.say(f"resumed at iteration {run.iteration}")


def _restore(run: Run, state: dict[str, Any]) -> None:
    run.learner.load_state_dict(state)
    for name, value in run.state.registered.items():
        value.load_state_dict(state["kept"][name])
    known = run.state.registered
    run.state.waiting = {n: value for n, value in state["kept"].items() if n not in known}
    run.state.load_parts(state["parts"])


def _require_same_policy(run: Run, then: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where the policy section gives the weights another meaning than when the
    checkpoint was made.
    """
    now = _meaning(run)
    for key in dict.fromkeys([*now, *then]):
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"policy.{key} is {now.get(key)!r}, and was {then.get(key)!r} when the checkpoint"
                f" in {run.folder} was made: it would give what was learned another meaning; leave"
                " it as it was, or begin another run from this one's policy folder"
            )


def _meaning(run: Run) -> dict[str, Any]:
    """The settings of the policy section by name, `FREE` ones aside."""
    flat = _flat(run.experiment.policy)
    return {key: value for key, value in flat.items() if key.split(".")[0] not in FREE}


def _flat(section: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a section by their names, those of sections in it as section.name."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        inner = _flat(value) if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return flat
