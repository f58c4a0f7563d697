"""``python -m r3patch``: the command line."""

import sys

from r3patch.cli import main

sys.exit(main())
