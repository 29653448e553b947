"""Run inputs again without atheris, on any Python: python -m fuzz.targets TARGET FILE..."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    name, *files = sys.argv[1:]
    target = importlib.import_module(f"fuzz.targets.{name}")
    for file in files:
        target.run(Path(file).read_bytes())
        print(f"{file}: nothing wrong")
