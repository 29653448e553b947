"""Choose the inputs of a target that are worth keeping, and make them its corpus.

    python -m fuzz.keep TARGET DIRECTORY...

All inputs of the directories, of the corpus and of `seeds()` are run, and the steps from line to
line that each takes in conduit are noted. Kept is, one by one, the input that takes most steps that
none before has taken, up to `MOST` inputs.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGE: Final = str(ROOT / "conduit")
MOST: Final = 48

Step = tuple[str, int, int]


class Steps:
    """Notes which steps from line to line are taken while it is traced."""

    def __init__(self) -> None:
        self.taken: set[Step] = set()
        self._last: dict[int, int] = {}

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Follow the functions of conduit, and no others."""
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        key = id(frame)
        if event == "call":
            self._last[key] = 0
        elif event == "line":
            line = frame.f_lineno
            self.taken.add((frame.f_code.co_filename, self._last.get(key, 0), line))
            self._last[key] = line
        elif event == "return":
            self._last.pop(key, None)
        return self.trace


def steps_of(target: Any, data: bytes) -> set[Step]:
    """Return the steps that an input takes."""
    steps = Steps()
    sys.settrace(steps.trace)
    try:
        target.run(data)
    finally:
        sys.settrace(None)
    return steps.taken


def main(name: str, directories: list[Path]) -> None:
    target = importlib.import_module(f"fuzz.targets.{name}")
    corpus = ROOT / "fuzz" / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    inputs = set(target.seeds())
    for directory in [corpus, *directories]:
        inputs |= {path.read_bytes() for path in directory.iterdir() if path.is_file()}
    for data in inputs:  # what is made once is made before anything is noted
        target.run(data)
    left = {data: steps_of(target, data) for data in inputs}
    kept: list[bytes] = []
    known: set[Step] = set()
    while left and len(kept) < MOST:
        best = max(left, key=lambda data: (len(left[data] - known), -len(data), data))
        if not left[best] - known:
            break
        known |= left.pop(best)
        kept.append(best)
    for path in corpus.iterdir():
        path.unlink()
    for data in kept:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    size = sum(map(len, kept))
    print(f"{name}: {len(kept)} of {len(inputs)} inputs, {size:,} bytes, {len(known)} steps")


if __name__ == "__main__":
    main(sys.argv[1], [Path(path) for path in sys.argv[2:]])
