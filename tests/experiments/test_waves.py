from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "add-an-experiment.md"


def test_the_experiment_in_the_docs_runs(tmp_path):
    (code,) = re.findall(r"```python\n(from dataclasses.*?)```", PAGE.read_text(), flags=re.DOTALL)
    code = code.replace("epochs=10", "epochs=1").replace("seeds=5", "seeds=1").replace("0.003, 0.01, 0.03", "0.01,")
    (tmp_path / "waves.py").write_text(code)
    done = subprocess.run([sys.executable, "waves.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("With about 880 trained parameters each, ")
    assert done.stdout.endswith(
        "The hypernetwork is not told apart from 3 of 3 other methods with as many parameters.\n"
    )
    assert "Which method learns waves best?" in (tmp_path / "results" / "waves" / "report.html").read_text()
