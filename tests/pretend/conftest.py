"""The tests here need the plugin `pretended_gpu`, which must be loaded before torch; `make pretended` runs them."""

from __future__ import annotations

import sys

collect_ignore_glob = ["generated_code.py", "launcher.py", "pretended_gpu.py", "stubbed_triton.py"]
if "pretended_gpu" not in sys.modules:
    collect_ignore_glob.append("test_*.py")
