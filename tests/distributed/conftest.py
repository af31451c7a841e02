"""The distributed tests attach the adapters of integration's, on batches of training's."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / room) for room in ("integration", "training")]
