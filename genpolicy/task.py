"""Tasks: what a policy is asked to do. A prompt is a task of horizon 1, judged by the run's reward alone."""

from pathlib import Path
from typing import Protocol

from genpolicy.reward import Context


class Task(Protocol):
    """Episodes by number. The same number is the same episode on any machine and any number of processes."""

    def reset(self, episodes: range) -> Context:
        """Begin the given episodes: their prompts, one row each."""
        ...


def read_prompts(path: str) -> tuple[str, ...]:
    """The non-empty lines of a prompt file. Raises with one sentence if it is missing or has none."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist")
    lines = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not lines:
        raise ValueError(f"prompt file {path} has no prompts: it needs one a line")
    return lines
