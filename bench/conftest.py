"""What the JSON of every bench holds beside its times: the machine, and the cases without a time and why."""

from __future__ import annotations

import importlib.metadata
import platform
import signal
from typing import Any

import pytest
import torch

_without_time: dict[str, str] = {}


def pytest_configure() -> None:
    # What `timeout` sends ends a run as Ctrl-C does: what was measured by then is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            _without_time[item.nodeid] = "the time was up"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.nodeid not in _without_time and not report.failed:
        return
    if report.skipped:
        _without_time[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        _without_time[report.nodeid] = "failed"
    elif report.when == "call":
        del _without_time[report.nodeid]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    threads = torch.get_num_threads()
    processor = machine_info["cpu"].get("brand_raw", platform.machine())
    names = {
        "cpu": {
            "device": f"{processor}, {threads} threads",
            "file": f"{platform.machine()}-cpu-{threads}-threads",
        }
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        names["cuda"] = {"device": gpu, "file": gpu.replace(" ", "-").replace("/", "-")}
    machine_info["versions"] = {name: _version(name) for name in ("torch", "triton", "mim4dd")}
    machine_info["devices"] = names


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    # A case that was cut off has some of its rounds in there.
    output_json["benchmarks"] = [b for b in output_json["benchmarks"] if b["fullname"] not in _without_time]
    output_json["without_time"] = _without_time
