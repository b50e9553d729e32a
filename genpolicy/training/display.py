"""The display of a run: a progress bar with the numbers that matter, lines above it, figures."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from genpolicy.config.schema import Experiment
from genpolicy.evaluation import curves, pictures
from genpolicy.rollout.rollout import Rollout

REDRAW = 30.0
"""Seconds between two drawings of the curves: one costs a second, which short runs would spend
again and again.
"""


class Display:
    """The view of a run while it goes on; only the main process shows anything."""

    def __init__(self, experiment: Experiment, folder: Path, main: bool) -> None:
        self.experiment, self.folder, self.main = experiment, folder, main
        self._bar: tqdm | None = None
        self._drawn = 0.0

    def say(self, text: str) -> None:
        """Write one line above the progress bar."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    @contextmanager
    def bar(self, share: float) -> Iterator[None]:
        """Show a progress bar that begins at a ``share`` of the budget."""
        total = self.experiment.budget.iterations or 100
        with tqdm(
            total=total,
            initial=min(share, 1.0) * total,
            desc=str(self.experiment.method["name"]),
            unit="it" if self.experiment.budget.iterations else "%",
            disable=not self.main,
            bar_format=(
                "{desc} {percentage:3.0f}%|{bar:20}| {n:.0f}/{total}"
                " [{elapsed}<{remaining}] {postfix}"
            ),
            file=sys.stderr,
        ) as self._bar:
            yield

    def advance(self, share: float, metrics: Mapping[str, float]) -> None:
        """Move the bar to a ``share`` of the budget and show an iteration's metrics."""
        bar = self._bar
        assert bar is not None
        if "reward/total" in metrics:
            shown = f"reward {metrics['reward/total']:.3f} ± {metrics['reward/total_ci95']:.3f}"
        else:
            losses = (value for name, value in metrics.items() if name.endswith("/loss"))
            shown = f"loss {next(losses, math.nan):.4f}"
        shown += f", {metrics['nfe_per_sample']:.1f} evaluations/sample"
        bar.set_postfix_str(shown, refresh=False)
        bar.update(min(share, 1.0) * bar.total - bar.n)

    def draw_curves(self) -> None:
        """Draw the curves, unless that was done a moment ago."""
        if self.main and time.monotonic() - self._drawn > REDRAW:
            curves.figures(self.folder)
            self._drawn = time.monotonic()

    def draw_group(self, rollout: Rollout, advantage: Tensor, iteration: int) -> None:
        """Draw one group of pictures with its rewards and advantages [M,N]."""
        if self.main:
            n = rollout.rewards.shape[1]
            group = int(rollout.local[0])
            pictures.group(
                rollout.outputs[:n],
                rollout.prompts[group],
                rollout.rewards[group],
                advantage[group],
                self.folder / "samples" / str(iteration) / "group.png",
            )
