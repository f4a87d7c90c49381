"""``python -m rectiflow`` is the command ``rectiflow``."""

from __future__ import annotations

import sys

from rectiflow.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
