"""The command genpolicy-runtime as ``python -m genpolicy_runtime``."""

import sys

from genpolicy_runtime.cli import main

sys.exit(main())
