"""``python -m r3patch``: the command line, where its script is not on the path."""

import sys

from r3patch.cli import main

sys.exit(main())
