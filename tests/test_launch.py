"""Launch configurations of the kernels: from the table, and searched for."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

import pairs
from conftest import FORMS
from mim4dd.kernels import autotune, launch, narrow, wide
from pairs import check, problem

from mim4dd import kernels

path = pairs.path  # a fixture
NUMBERS = torch.zeros(0)


@pytest.mark.usefixtures("path")
def test_autotune_keeps_its_choice_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("MIM4DD_AUTOTUNE", "1")
    monkeypatch.setenv("MIM4DD_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "REPEATS", 1)
    check(FORMS[4], *problem(4, 9, [16]))
    (file,) = tmp_path.glob("*.json")
    choice = json.loads(file.read_text())
    assert len(choice) == 1
    monkeypatch.setattr(autotune, "_seconds", None)  # from here on a search fails
    monkeypatch.setattr(autotune, "_known", {})  # as in a new process
    check(FORMS[4], *problem(4, 9, [16]))
    assert json.loads(file.read_text()) == choice
    monkeypatch.setattr(autotune, "_read", None)  # what has been read once is not read again
    check(FORMS[4], *problem(4, 9, [16]))


def test_autotune_searches_for_other_gradients_anew(monkeypatch, tmp_path):
    """Without gradients the table of their products is searched by the clock's noise."""
    monkeypatch.setenv("MIM4DD_CACHE", str(tmp_path))
    monkeypatch.setenv("MIM4DD_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "_seconds", lambda *_: 1.0)
    wanted = [(False, False, False), (False, True, False), (True, True, True)]
    for form in (FORMS[2], FORMS[3]):  # the second is symmetric
        for each in wanted:
            kernels.contrast(form, *problem(4, 9, [16]), each)
    (file,) = tmp_path.glob("*.json")
    assert len(json.loads(file.read_text())) == 2 * len(wanted)


def test_autotune_leaves_a_damaged_file_or_one_of_another_table_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("MIM4DD_CACHE", str(tmp_path))
    autotune.tuned("kind", [], NUMBERS, None)
    (file,) = tmp_path.glob("*.json")
    for damaged in (file.read_text()[:-5], "[]"):
        file.write_text(damaged)
        monkeypatch.setattr(autotune, "_known", {})
        autotune.tuned("kind", [], NUMBERS, None)
        assert json.loads(file.read_text()) == {"kind": {}}
    monkeypatch.setattr(launch, "TABLES", {})
    autotune.tuned("kind", [], NUMBERS, None)
    assert len([*tmp_path.glob("*.json")]) == 2


def test_autotune_keeps_what_others_write_meanwhile(monkeypatch, tmp_path):
    monkeypatch.setenv("MIM4DD_CACHE", str(tmp_path))
    read = autotune._read

    def slow(path):
        known = read(path)
        time.sleep(0.01)  # so that writers without a lock would have read the same
        return known

    monkeypatch.setattr(autotune, "_read", slow)
    kinds = [f"kind {index}" for index in range(16)]
    with ThreadPoolExecutor(4) as writers:
        [*writers.map(lambda kind: autotune.tuned(kind, [], NUMBERS, None), kinds)]
    (file,) = tmp_path.glob("*.json")
    assert sorted(json.loads(file.read_text())) == sorted(kinds)


def test_a_small_device_gets_a_small_tile():
    for name, table in launch.TABLES.items():
        for precision, tiles in table.items():
            # The narrow path keeps whole rows of 128 numbers, of four bytes each in TF32.
            room = 64 if "NARROW_128" in name and precision == "tf32" else 48
            assert tiles[-1].shared(2 if precision == "half" else 4) <= room * 1024


def test_the_first_tile_with_work_for_every_multiprocessor_wins(monkeypatch):
    monkeypatch.setattr(launch, "device_limits", lambda device: (232_448, 132))
    choose = partial(launch.choose, "WIDE", NUMBERS.half())
    first, second, last = launch.WIDE["half"]
    assert choose(lambda tile: 132) == first
    assert choose(lambda tile: 131 if tile == first else 132) == second
    assert choose(lambda tile: 131) == last


def test_autotune_chooses_the_fastest(monkeypatch, tmp_path):
    monkeypatch.setenv("MIM4DD_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "_known", {})
    fastest = launch.DOTS["ieee"][1]
    monkeypatch.setattr(autotune, "_seconds", lambda *_: 1 + (launch._forced.get()["DOTS"] != fastest))
    with autotune.tuned("kind", ["DOTS"], NUMBERS, lambda: None):
        assert launch.choose("DOTS", NUMBERS, lambda tile: 1) == fastest


def test_autotune_searches_anew_for_other_sizes_and_dtypes(monkeypatch, tmp_path):
    monkeypatch.setenv("MIM4DD_AUTOTUNE", "1")
    monkeypatch.setenv("MIM4DD_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "_seconds", lambda *_: 1.0)
    for n, width, dtype in (
        (9, 16, torch.float32),
        (90, 16, torch.float32),
        (9, 64, torch.float32),
        (9, 16, torch.float16),
    ):
        check(FORMS[0], *problem(4, n, [width], dtype))
        check(FORMS[0], *problem(4, n + 1, [width], dtype))  # within the same power of two
    (file,) = tmp_path.glob("*.json")
    assert len(json.loads(file.read_text())) == 4


@pytest.mark.parametrize(("setting", "precision"), [("tf32", "tf32"), ("ieee", "ieee")])
def test_products_are_as_precise_as_torchs_on_cuda_alone(setting, precision):
    """After which torch refuses to tell the precision of all devices."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        assert launch.precision_of(torch.float32) == precision
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("setting", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")]
)
def test_products_are_as_precise_as_torchs(setting, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert launch.precision_of(torch.float32) == launch.dot_precision(precision) == precision
        assert launch.precision_of(torch.float16) == "half"
        few, many = torch.zeros(1, 128), torch.zeros(1, 144)
        assert kernels._way(few) is (wide if precision == "ieee" else narrow)
        assert kernels._way(few.half()) is narrow
        assert kernels._way(many) is wide
    finally:
        torch.set_float32_matmul_precision(before)
