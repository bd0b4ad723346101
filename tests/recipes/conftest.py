from __future__ import annotations

import sys
from pathlib import Path

# `image_files` beside the tests writes the data that they read
sys.path.insert(0, str(Path(__file__).parent))
