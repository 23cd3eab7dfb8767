"""`python -m coded_resnext`: the same as the command `coded-resnext`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
