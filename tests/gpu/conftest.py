"""Make the helpers of this folder importable by name. The programs that the stages run are no test modules."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
collect_ignore_glob = ["[!t]*.py", "time_*.py"]
