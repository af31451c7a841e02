"""The independent form of MimIC that patched models are tested against serves the objectives too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "patch"))
