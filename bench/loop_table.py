"""The results of bench/test_loop.py as one table: bench/results/loop-<device>.json and .md.

python -m pytest bench/test_loop.py --benchmark-enable --benchmark-json=loop.json
python -m bench.loop_table loop.json [MORE.json ...]
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="what pytest-benchmark wrote")
    reports = [json.loads(path.read_text()) for path in parser.parse_args().files]
    seconds: dict[str, dict[str, dict[str, float]]] = {}
    facts = {}
    for report in reports:
        for benchmark in report["benchmarks"]:
            device, step, name = (benchmark["params"][key] for key in ("device", "step", "name"))
            seconds.setdefault(device, {}).setdefault(step, {})[name] = benchmark["stats"]["median"]
            facts[device] = benchmark["extra_info"]
    processor = reports[0]["machine_info"]["cpu"].get("brand_raw", platform.machine())
    for device, steps in seconds.items():
        about = facts[device]
        name = about["device"] if device != "cpu" else f"{platform.machine()}-cpu-{about['threads']}-threads"
        result = {
            "device": about["device"] if device != "cpu" else f"{processor}, {about['threads']} threads",
            "date": reports[0]["datetime"][:10],
            "torch": about["torch"],
            "seconds": steps,
        }
        path = RESULTS / f"loop-{name.replace(' ', '-')}"
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(result))
        print(table(result))


def table(result: dict) -> str:
    """One row a step; times are medians, and every ratio is to the textbook loop of the same run."""
    names = list(dict.fromkeys(name for times in result["seconds"].values() for name in times))
    lines = [
        f"# The loop on {result['device']}",
        "",
        f"{result['date']}, torch {result['torch']}, IPC 10, 256 real images a class, ten classes "
        "of 1x28x28, width 128. Seconds of a step (median), and how many times as fast as the textbook.",
        "",
        f"| step | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for step, times in result["seconds"].items():
        cells = [
            f"{times[name]:.3f}"
            + (f" ({times['textbook'] / times[name]:.1f}x)" if name != "textbook" else "")
            for name in names
        ]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
