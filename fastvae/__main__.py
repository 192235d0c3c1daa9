"""``python -m fastvae``."""

import sys

from .cli import main

sys.exit(main())
