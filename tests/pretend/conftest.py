"""These tests need the plugin `pretended_gpu`; `make pretended` runs them."""

import sys

collect_ignore_glob = [] if "pretended_gpu" in sys.modules else ["test_*.py"]
