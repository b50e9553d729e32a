"""Acts with a policy that `genpolicy export` wrote, with numpy and onnxruntime alone."""

from genpolicy_runtime.errors import ExportError, ObservationError
from genpolicy_runtime.policy import Policy

__all__ = ["ExportError", "ObservationError", "Policy", "__version__"]
__version__ = "0.1.0"
