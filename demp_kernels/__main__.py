"""`python -m demp_kernels`: the same as the command `demp`."""
from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
