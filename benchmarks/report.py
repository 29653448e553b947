"""Tables from results, on the terminal and in docs/performance.md.

python benchmarks/report.py benchmarks/results/latest.json docs/performance.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# So that it can be run as a file. Behind everything else: see worker.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.contestants import CONTESTANTS
from benchmarks.workloads import WORKLOADS

PARTS = ("figures", "hurt")
"""What docs/performance.md has a marked place for: load that hurts, and everything else."""

PEERS = [name for name, e in CONTESTANTS.items() if not (e.floor or name.startswith("conduit"))]

AIMS = (
    ("in-flight", 2.0, "F1"),
    ("in-flight", 2.0, "picows"),
    ("in-flight", 45.0, "grpc"),
    ("connections", 1.4, "F1"),
    ("connections", 1.8, "the best peer"),
    ("one-core", 0.6, "F1"),
    ("echo-1m", 0.8, "SF"),
    ("echo-64m", 0.3, "SF"),
    ("stream", 0.2, "Fc"),
    ("stream", 5.0, "the best peer"),
    ("connect", 1.0, "grpc"),
    ("connect", 1.0, "websockets"),
    ("connect", 1.0, "socketio"),
    ("connect", 1.0, "nats"),
    ("connect", 1.0, "netconduit"),
    ("broadcast", 3.0, "websockets"),
)
"""Workload, how many times the other's rate conduit is to reach at least, and the other."""


def number(value: float) -> str:
    """Write a number with three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def lines(rows: list[list[str]]) -> str:
    """Lay a table out as Markdown that can be read as it is; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    # Text to the left, figures to the right.
    text = [
        "| "
        + " | ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join(
        "-" * (w + 2) if not i else "-" * (w + 1) + ":" for i, w in enumerate(widths)
    )
    return "\n".join([text[0], rule + "|", *text[1:]])


def table(name: str, workload: dict[str, Any]) -> str:
    """Return the heading and the table of a workload."""
    heading = f"**{name}**: {workload['title']}\n\n"
    if any("rare_p50" in by for point in workload["points"] for by in point["by"].values()):
        return heading + beside(workload)
    if len(workload["points"]) > 1:
        return heading + many_points(workload)
    return heading + one_point(workload, workload["points"][0]["by"])


def one_point(workload: dict[str, Any], by: dict[str, Any]) -> str:
    """Compare contestants: the best first."""
    floor = by.get(workload["floor"], {}).get("rate")
    is_memory = workload["unit"].startswith("KiB")
    timed = any("p50" in figures for figures in by.values())
    head = ["", workload["unit"], "lowest to highest"]
    head += [] if is_memory else [f"x {workload['floor']}"] if floor else []
    head += ["p50 us", "p99 us"] if timed else []
    head += [] if is_memory else ["server us", "client us"]
    rows = [head]
    order = sorted(by, key=lambda one: by[one].get("rate", 0.0), reverse=not is_memory)
    for name in order:
        figures, title = by[name], CONTESTANTS[name].title
        if "error" in figures:
            rows.append([title, "failed", *[""] * (len(head) - 2)])
            continue
        if figures.get("wanted", 0) > figures["count"]:
            title += f" ({figures['count'] / figures['wanted']:.1%} arrived)"
        row = [title, number(figures["rate"])]
        row.append(f"{number(figures['lowest'])} to {number(figures['highest'])}")
        if floor and not is_memory:
            row.append(number(figures["rate"] / floor))
        if timed:
            row += [number(figures[key]) if key in figures else "" for key in ("p50", "p99")]
        if not is_memory:
            row += [number(figures.get(f"{side}_us", 0.0)) for side in ("server", "client")]
        rows.append(row)
    return lines(rows)


BESIDE = {
    "rare_p50": "p50 ms",
    "rare_p99": "p99 ms",
    "rare_max": "max ms",
    "server_lag_p99": "server late p99 ms",
    "server_lag_max": "max ms",
    "client_lag_p99": "client late p99 ms",
    "client_lag_max": "max ms",
}
"""What a caller beside the rest notices, and how late timers fire on the loops of both sides."""


def beside(workload: dict[str, Any]) -> str:
    """Show what others do to a caller that makes a call now and then."""
    rows = [["", "the others", *BESIDE.values(), workload["unit"]]]
    for point in workload["points"]:
        for name, figures in point["by"].items():
            row = [CONTESTANTS[name].title, point["label"]]
            if "error" in figures:
                rows.append([*row, "failed", *[""] * len(BESIDE)])
                continue
            row += [number(figures[key]) for key in BESIDE]
            rows.append([*row, number(figures["rate"]) if figures["rate"] else ""])
    return lines(rows)


def many_points(workload: dict[str, Any]) -> str:
    """Show how figures change along the points: all of conduit's, and the rates of others."""
    points = workload["points"]
    names = list(dict.fromkeys(name for point in points for name in point["by"]))
    timed = any("p50" in figures for point in points for figures in point["by"].values())
    head = [""]
    for name in names:
        head.append(f"{name}, {workload['unit']}")
        head += ["p50 us"] if timed else []
        head += ["server us", "client us"] if name == "conduit" else []
    rows = [head]
    for point in points:
        row = [point["label"]]
        for name in names:
            figures = point["by"].get(name, {})
            keys = ["rate", *(["p50"] if timed else [])]
            keys += ["server_us", "client_us"] if name == "conduit" else []
            row += [number(figures[key]) if key in figures else "-" for key in keys]
        rows.append(row)
    return lines(rows)


def rates(results: dict[str, Any], workload: str, figure: str = "rate") -> dict[str, float]:
    """Return one figure of every contestant of a workload."""
    if workload not in results["workloads"]:
        return {}
    by = results["workloads"][workload]["points"][0]["by"]
    return {name: figures[figure] for name, figures in by.items() if figure in figures}


def aims(results: dict[str, Any]) -> str:
    """Hold conduit's figures against what they are to reach."""
    found = []

    def add(workload: str, value: float, least: float, unit: str, *, most: bool = False) -> None:
        reached = value <= least if most else value >= least
        word = "at most" if most else "at least"
        found.append(
            f"{'+' if reached else '-'} {workload}: {number(value)} {unit} ({word} {number(least)})"
        )

    for workload, factor, other in AIMS:
        known = rates(results, workload)
        peers = [known[name] for name in PEERS if name in known]
        rival = max(peers, default=0.0) if other == "the best peer" else known.get(other)
        if rival and "conduit" in known:
            add(workload, known["conduit"] / rival, factor, f"x {other}")
    p50 = rates(results, "sequential", "p50")
    for name in PEERS:
        if name in p50 and "conduit" in p50:
            allowed = 1.15 if name == "picows" else 1.0
            add("sequential", p50["conduit"] / p50[name], allowed, f"x p50 of {name}", most=True)
    if "conduit" in rates(results, "connect"):
        add("connect", rates(results, "connect")["conduit"], 2500.0, "a second")
    for name, kib in (("conduit", 6.0), ("conduit-asyncio", 10.0)):
        if name in rates(results, "idle"):
            add("idle", rates(results, "idle")[name], kib, f"KiB, {name}", most=True)
    for workload, about in WORKLOADS.items():
        known = rates(results, workload)
        if (
            about.part_of != "hurt"
            and about.unit == "calls/s"
            and {"conduit", "conduit-asyncio"} <= known.keys()
        ):
            share = known["conduit-asyncio"] / known["conduit"]
            add(workload, share, 0.7, "x conduit on uvloop, stock asyncio")
    return "\n".join(found)


def page(results: dict[str, Any], part: str) -> str:
    """Return what docs/performance.md shows of a run in one of its parts; nothing if none."""
    tables = [
        table(name, workload)
        for name, workload in results["workloads"].items()
        if (WORKLOADS[name].part_of == "hurt") == (part == "hurt")
    ]
    if not tables:
        return ""
    machine, method = results["machine"], results["method"]
    pinned = "server and client pinned to a core each" if machine["pinned"] else "nothing pinned"
    cores = f"{machine['cores']} cores"
    if machine["threads_of_one_core"]:
        cores += " (the two in use are threads of one)"
    speed = f" ({machine['loop_ns']:,} ns a loop)" if "loop_ns" in machine else ""
    parts = [
        f"{machine['date']}, {machine['processor']}, {cores}, {machine['memory_gib']} GiB, "
        f"{machine['system']} {machine['kernel']}, {machine['python']}{speed}, {pinned}. "
        f"Medians of {method['rounds']} rounds of {method['seconds']:g} s."
    ]
    versions = {k: v for found in results["versions"].values() for k, v in sorted(found.items())}
    # netconduit is the name of conduit's distribution and of an earlier one.
    versions.update(results["versions"].get("conduit", {}))
    parts.append("Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + ".")
    return "\n\n".join(parts + tables)


def fill(text: str, figures: str, part: str) -> str:
    """Put figures in the place of a page that is marked for their part."""
    begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{figures}\n\n{end}{rest.split(end)[1]}"


def main(source: Path, target: Path) -> None:
    """Put a run's figures into a page, and leave the parts alone that were not measured."""
    results, text = json.loads(source.read_text()), target.read_text()
    for part in PARTS:
        if figures := page(results, part):
            text = fill(text, figures, part)
    target.write_text(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
