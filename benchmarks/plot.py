"""Draw rate and latency against calls in flight, from the results of a run with the sweep.

.venvs/bench/bin/python benchmarks/plot.py benchmarks/results/latest.json docs/performance.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib  # type: ignore[import-not-found]

matplotlib.use("svg")
import matplotlib.pyplot as plt  # type: ignore[import-not-found]

# The same figures give the same file.
matplotlib.rcParams["svg.hashsalt"] = "conduit"
COLOURS = {"conduit": "#0b6e4f", "picows": "#c1666b", "websockets": "#4a6fa5", "grpc": "#8a817c"}


def draw(sweep: dict[str, Any], target: Path) -> None:
    """Draw the two panels."""
    figure, (rate, latency) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = [point["label"] for point in sweep["points"]]
    names = list(dict.fromkeys(name for point in sweep["points"] for name in point["by"]))
    for name in names:
        points = [
            (int(point["label"]), point["by"][name])
            for point in sweep["points"]
            if "rate" in point["by"].get(name, {})
        ]
        if not points:
            continue
        in_flight = [number for number, _ in points]
        style = {"label": name, "color": COLOURS.get(name), "marker": "o", "markersize": 4}
        rate.plot(in_flight, [f["rate"] / 1000 for _, f in points], **style)
        latency.plot(in_flight, [f["p50"] / 1000 for _, f in points], **style)
    rate.set_ylabel("thousand calls a second")
    latency.set_ylabel("median latency, ms")
    for axes in (rate, latency):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("calls in flight on one connection")
        axes.set_xticks([int(label) for label in labels], labels)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    rate.legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text())
    draw(results["workloads"]["sweep"], Path(sys.argv[2]))
