"""The distributed tests attach the adapters of the integration tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "integration"))
