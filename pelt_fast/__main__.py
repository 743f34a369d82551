"""``python -m pelt_fast``: the same as ``pelt-fast``."""

import sys

from pelt_fast.cli import main

sys.exit(main())
