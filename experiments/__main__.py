"""Lists all experiments, and how long each takes: python -m experiments"""

import ast
from pathlib import Path

from support.run import steady_streams

steady_streams()  # the titles are not all ASCII
for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    title, *_, last = ast.get_docstring(ast.parse(path.read_bytes())).splitlines()
    print(f"{path.stem:14}{title}" + f"\n{'':14}{last}" * last.startswith("Time"))
