"""Run the command line by ``python -m dfpir``."""

import sys

from dfpir.cli import main

sys.exit(main())
