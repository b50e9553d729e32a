"""The observations that a policy of actions is given, checked against the shapes it needs."""

from torch import Tensor

from genpolicy.contracts.task import Context


def observed(context: Context, name: str, wanted: tuple[int, ...]) -> Tensor:
    """Returns the observation ``name`` [B,*wanted] of B rows, wanted = (history, *shape).

    Raises `ValueError` where it is missing or has another shape.
    """
    seen = context.observation.get(name)
    if seen is None or seen.shape[1:] != wanted:
        got = "is missing" if seen is None else f"comes as {list(seen.shape[1:])}"
        raise ValueError(f"observation {name} {got}; this policy needs {list(wanted)} of every row")
    return seen
