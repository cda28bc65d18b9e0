"""`python -m clip`: the `clip` command."""

import sys

from .app.cli import main

sys.exit(main())
