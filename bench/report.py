"""What pytest-benchmark wrote, as tables: bench/results/<bench>-<device>.json and .md for every bench in it.

    python -m pytest bench/test_loop.py --benchmark-enable --benchmark-json=loop.json
    python -m bench.report loop.json [MORE.json ...]

Several files are parts of one measurement: what one of them lacks another may have.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TITLES = {"losses": "The contrastive losses", "augment": "The augmentation", "loop": "The loop"}
ABOUT = {
    "losses": "M anchors, N keys, width D (a sum: layers in one call); gradients to neither side, to the "
    "anchors or to both. Times are medians. Of floor: the time for the operations at the matrix rate, or for "
    "the bytes at the copy rate if that is longer, over the time taken. Memory: the peak above the inputs.",
    "augment": "Milliseconds (median), and how many times as fast as the textbook. Copy: the time to copy as "
    "many bytes, and its share of the time of the fused, on a GPU of the op alone, both as a CUDA graph.",
    "loop": "IPC 10, 256 real images a class, ten classes of 1x28x28, width 128. Seconds of a step (median, "
    "versions in turn), and how many times as fast as the textbook.",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="what pytest-benchmark wrote")
    reports = [_read(parser, path) for path in parser.parse_args().files]
    RESULTS.mkdir(exist_ok=True)
    for (bench, _), result in results(reports).items():
        path = RESULTS / f"{bench}-{result.pop('file')}"
        page = "\n".join(markdown(bench, result)) + "\n"
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(page)
        print(page)


def _read(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        report["without_time"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(
            f"{path}: expected what --benchmark-json of a bench here writes ({error!r}); run one first"
        )
    return report


def results(reports: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """What is kept, by bench and device ("cpu" or "cuda"): the machine, times by case, and what has none."""
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        machine = report["machine_info"]
        measured = {benchmark["fullname"]: benchmark for benchmark in report["benchmarks"]}
        for name in (*measured, *report["without_time"]):
            bench, device, case = _parts(name)
            about = {**machine["devices"][device], "date": report["datetime"][:10], **machine["versions"]}
            result = kept.setdefault((bench, device), {**about, "cases": {}, "without_time": {}})
            if name not in measured:
                result["without_time"][case] = report["without_time"][name]
            elif bench == "losses":
                result["cases"][case] = _short(measured[name]["extra_info"])
            else:
                result["cases"][case] = _short(measured[name]["extra_info"]["seconds"])
    for report in reports:
        for benchmark in report["benchmarks"]:
            bench, device, case = _parts(benchmark["fullname"])
            kept[bench, device]["without_time"].pop(case, None)
    for (bench, _), result in kept.items():
        if bench == "losses":
            _add_floors(result)
    return kept


def _add_floors(result: dict[str, Any]) -> None:
    """The ceilings by dtype, the highest that were measured, and what share of each time the floor is."""
    rates = ("matrix_rate", "copy_rate")
    ceilings: dict[str, dict[str, float]] = result.setdefault("ceilings", {})
    for case in result["cases"].values():
        highest = ceilings.setdefault(case["dtype"], dict.fromkeys(rates, 0.0))
        highest |= {rate: max(highest[rate], case.pop(rate)) for rate in rates}
    for case in result["cases"].values():
        matrix_rate, copy_rate = ceilings[case["dtype"]].values()
        floor = max(case["operations"] / matrix_rate, case["bytes"] / copy_rate)
        for measured in case["variants"].values():
            measured["of_floor"] = _short(1e3 * floor / measured["milliseconds"])


def _parts(name: str) -> tuple[str, str, str]:
    """Bench, device and case of a test's name."""
    bench, case = re.search(r"test_(\w+)\.py::\w+\[(.*)\]$", name).groups()
    device, case = case.split("-", 1)
    return bench, device, case


def _short(value: Any) -> Any:
    """Four digits of every number that is measured."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def markdown(bench: str, result: dict[str, Any]) -> Iterator[str]:
    """The lines of a page."""
    versions = [f"{name} {result[name]}" for name in ("torch", "triton", "mim4dd") if result.get(name)]
    yield f"# {TITLES[bench]} on {result['device']}"
    yield ""
    yield f"{result['date']}, {', '.join(versions)}. {ABOUT[bench]}"
    yield ""
    if bench == "losses":
        yield from _losses(result["cases"], result["ceilings"])
    else:
        yield from _versions(result["cases"], 1e3 if bench == "augment" else 1)
    by_reason: dict[str, list[str]] = {}
    for case, reason in result["without_time"].items():
        by_reason.setdefault(reason, []).append(case)
    for reason, cases in by_reason.items():
        yield ""
        yield f"Not measured ({reason}): {', '.join(cases)}."


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def _table(columns: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _versions(cases: dict[str, dict[str, float]], unit: float) -> Iterator[str]:
    """A row a case; every ratio is to the textbook of the same run."""
    names = list(dict.fromkeys(name for times in cases.values() for name in times))

    def cell(times: dict[str, float], name: str) -> str:
        if name not in times:
            return ""
        ratio = f" ({times['textbook'] / times[name]:.1f}x)" if "textbook" in times else ""
        if name == "copy":
            ratio = f" ({times['copy'] / times.get('op', times['fused']):.0%})"
        return _number(unit * times[name]) + (ratio if name != "textbook" else "")

    rows = [[case, *(cell(times, name) for name in names)] for case, times in cases.items()]
    yield from _table(["case", *names], rows)


def _losses(cases: dict[str, dict[str, Any]], ceilings: dict[str, dict[str, float]]) -> Iterator[str]:
    """A row a case and variant; on a CPU without the columns of a GPU."""
    columns = {
        "ms": lambda measured: _number(measured["milliseconds"]),
        "of floor": lambda measured: f"{measured['of_floor']:.0%}",
        "extra peak MiB": lambda measured: f"{measured['extra_peak_mib']:.0f}",
    }
    if any(case["device"] == "cuda" for case in cases.values()):
        columns["launches"] = lambda measured: str(measured["launches"] or "")
        columns["as a CUDA graph, ms"] = lambda measured: (
            _number(measured["replayed_milliseconds"]) if measured["replayed_milliseconds"] else ""
        )
    rows = []
    for case in cases.values():
        size = [case["loss"], case["m"], case["n"], " + ".join(map(str, case["widths"]))]
        about = [str(value) for value in (*size, case["dtype"], case["gradients"])]
        for name, measured in case["variants"].items():
            rows.append([*about, name, *(show(measured) for show in columns.values())])
        for name, reason in case["left_out"].items():
            rows.append([*about, name, reason, *[""] * (len(columns) - 1)])
    yield from _table(["loss", "M", "N", "D", "dtype", "gradients", "variant", *columns], rows)
    for dtype, ceiling in ceilings.items():
        matrix, copy = ceiling["matrix_rate"] / 1e12, ceiling["copy_rate"] / 1e9
        yield ""
        yield f"Measured in the same run: {dtype} products at {matrix:.3g} TFLOP/s, copy at {copy:.0f} GB/s."


if __name__ == "__main__":
    main()
