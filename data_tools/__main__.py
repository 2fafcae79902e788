"""`python -m data_tools COMMAND`: getting data in."""

from __future__ import annotations

import sys

from data_tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
