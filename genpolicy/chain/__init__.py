"""The denoising chain as a policy: schedules, kernels, and the one transition that acting and
scoring share.

Legend (one meaning each, everywhere): **B** batch, **N** group members, **K** denoising steps,
**E** event dims ((C,H,W) latents, (C,F,H,W) video, (T,D) action chunk). ``t`` is noise time, larger
is noisier, 0 is data; ``x_t = alpha(t) x_0 + sigma(t) eps``; a step goes from t to s < t; ``k``
counts steps, 0 is the noisiest; ``std`` is always the total standard deviation of a transition.
"""

from genpolicy.chain.chain import Chain, Trajectory
from genpolicy.chain.guidance import ClipX0, Guidance
from genpolicy.chain.kernel import CPS, DDIM, SDE, ClipStd, Consistency, FloorStd, Mean
from genpolicy.chain.noise import Noise
from genpolicy.chain.prior import StandardNormal
from genpolicy.chain.schedule import EDM, Linear, Step, VariancePreserving
from genpolicy.chain.solver import DPMSolver, Heun
from genpolicy.chain.values import Condition, Gaussian, Prediction
from genpolicy.chain.warm_start import RTI, SDEdit

__all__ = [
    "CPS",
    "DDIM",
    "EDM",
    "RTI",
    "SDE",
    "Chain",
    "ClipStd",
    "ClipX0",
    "Condition",
    "Consistency",
    "DPMSolver",
    "FloorStd",
    "Gaussian",
    "Guidance",
    "Heun",
    "Linear",
    "Mean",
    "Noise",
    "Prediction",
    "SDEdit",
    "StandardNormal",
    "Step",
    "Trajectory",
    "VariancePreserving",
]
