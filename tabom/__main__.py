"""`python -m tabom`: the `tabom` command, for torchrun and for environments without scripts."""

import sys

from tabom.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
