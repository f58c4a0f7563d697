import sys

from r3patch.cli import main

sys.exit(main())
