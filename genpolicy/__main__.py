"""`python -m genpolicy` and `accelerate launch -m genpolicy`: the same door as the `genpolicy`
command.
"""

import sys

from genpolicy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
