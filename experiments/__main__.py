"""Lists all experiments, and how long each takes: python -m experiments"""

import ast
import sys
from pathlib import Path

if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="replace")  # the titles are not all ASCII
for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    title, *_, last = ast.get_docstring(ast.parse(path.read_bytes())).splitlines()
    print(f"{path.stem:14}{title}" + f"\n{'':14}{last}" * last.startswith("Time"))
