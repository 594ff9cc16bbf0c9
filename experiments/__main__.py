"""Lists all experiments: python -m experiments"""

import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    print(f"{path.stem:14}{ast.get_docstring(ast.parse(path.read_bytes())).splitlines()[0]}")
