"""The meaning of a network's output, `prediction_type`: a setting of every model, saved with it.

A model that is loaded with another head than it was saved with keeps its weights as they are: no
change of the last layer turns one meaning into another, because the two differ by x_t and t, so
that the network has to learn its last layer again.
"""

import logging
from collections.abc import Sequence

from genpolicy.chain.values import Parametrisation

log = logging.getLogger(__name__)

VARIANCE_PRESERVING: tuple[Parametrisation, ...] = ("epsilon", "sample", "v_prediction")
"""The heads of alpha^2 + sigma^2 = 1. A velocity eps - x_0 is defined by alpha + sigma = 1."""
FLOW: tuple[Parametrisation, ...] = ("velocity", "sample")
"""The heads of alpha + sigma = 1. At its noisiest time alpha is 0, and epsilon says nothing of x_0.
"""


def choose(
    asked: Parametrisation | None,
    own: Parametrisation,
    valid: Sequence[Parametrisation],
    network: str,
) -> Parametrisation:
    """Returns the head that is asked for, or ``own`` where none is.

    Raises `ValueError` where what is asked for is none of ``valid``; ``network`` names whose head
    it is.
    """
    if asked is None:
        return own
    if asked not in valid:
        raise ValueError(
            f"policy.prediction_type is {asked!r}; valid for {network}: {', '.join(valid)}"
        )
    return asked


def tell(asked: Parametrisation | None, saved: Parametrisation) -> None:
    """Warns where another head is asked for than the one of the saved policy that is loaded."""
    if asked not in (None, saved):
        log.warning(
            "policy.prediction_type is %s, and the saved policy says %s: training begins with its"
            " weights as they are, and teaches them the new meaning",
            asked,
            saved,
        )
