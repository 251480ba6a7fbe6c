"""`python -m runner DIR PROMPT` generates without the toolkit."""

import sys

from runner.cli.commands import main

sys.exit(main())
