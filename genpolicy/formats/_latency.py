"""Latency: milliseconds per decision of the exported graph and of the policy in torch."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from genpolicy.formats import _graph
from genpolicy.formats._capture import Draws, blank, decide, no_plan
from genpolicy.policy.policy import ChainPolicy

REPETITIONS = 200
"""Decisions of each, in turns."""
WARM_UP = 5
"""Decisions of each that go before."""
SECONDS = 10.0
"""After so many no more are made, but `FEWEST` at least."""
FEWEST = 5


@torch.no_grad()
def measure(
    session: Any, policy: ChainPolicy, shape: tuple[int, ...], instruction: str = ""
) -> dict[str, Any]:
    """The contents of latency.json: of each the minimum and the median, in milliseconds per
    decision, both in turns on one thread, with observations of zeros.

    session: of a policy with a warm start that of the later decisions, which are measured.
    shape: of the noise, [draws,*E].
    """
    observation = blank(policy.model, 1)  # type: ignore[arg-type]  # its caller saw that it acts
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    previous = None if policy.warm is None else no_plan(policy, 1)
    inputs = {**observation, "noise": noise}
    feed = _graph.fed(inputs if previous is None else {**inputs, "previous": previous}, 0)
    calls = {
        "torch": lambda: decide(policy, observation, Draws(noise), instruction, previous),
        "onnxruntime": lambda: session.run(None, feed),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {**interleaved(calls), "threads": 1, "device": "cpu"}
    finally:
        torch.set_num_threads(threads)


def interleaved(calls: Mapping[str, Callable[[], object]]) -> dict[str, Any]:
    """Minimum, median and count of the milliseconds of each call, made in turns, so that whatever
    else the machine does meets all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for number in range(WARM_UP + REPETITIONS):
        if number >= WARM_UP + FEWEST and time.perf_counter() - started > SECONDS:
            break
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if number >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - begun))
    return {
        name: {
            "min_ms": min(taken),
            "median_ms": float(torch.tensor(taken).median()),
            "repetitions": len(taken),
        }
        for name, taken in times.items()
    }
