"""`python -m instep` is the command line."""

import sys

from instep.cli.main import main

sys.exit(main())
