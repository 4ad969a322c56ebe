"""What every example ends with: its steps with stock PyTorch and under the switch, by turns."""

import sys
from pathlib import Path

# For `python examples/NAME.py`, which looks for modules beside that file only.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import penalties


def compare(*codes: str) -> None:
    """Prints these rows of ``benchmarks.penalties``, whose options (``--rounds``, ``--device``) it takes."""
    sys.argv = [penalties.__file__, *codes, *sys.argv[1:]]
    penalties.main()
