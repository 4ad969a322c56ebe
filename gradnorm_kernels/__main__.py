"""``python -m gradnorm_kernels`` is ``gradnorm``."""

import sys

from .cli import main

sys.exit(main())
