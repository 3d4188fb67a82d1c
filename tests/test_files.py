"""Where files go, and that they are whole."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from mim4dd.errors import InputError
from mim4dd.files import atomic, cache_folder, exclusive, make_folder, write


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MIM4DD_CACHE": "/own", "XDG_CACHE_HOME": "/cache"}, Path("/own")),
        ({"MIM4DD_CACHE": "", "XDG_CACHE_HOME": "/cache"}, Path("/cache/mim4dd")),
        ({"XDG_CACHE_HOME": ""}, Path.home() / ".cache" / "mim4dd"),
        ({}, Path.home() / ".cache" / "mim4dd"),
    ],
)
def test_the_cache_is_where_the_user_wants_it(monkeypatch, environment, expected):
    for name in ("MIM4DD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == expected


def test_results_do_not_go_among_the_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    for dataset in (str(tmp_path / "pictures"), "~/pictures"):
        with pytest.raises(InputError, match="where it would count as a class"):
            make_folder(tmp_path / "pictures" / "run", dataset)
    assert make_folder(tmp_path / "run", "~/pictures").is_dir()


def test_many_runs_may_look_whether_a_folder_can_be_written(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(lambda _: make_folder(tmp_path, "digits"), range(200))} == {tmp_path}
    assert [*tmp_path.iterdir()] == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise RuntimeError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result.json", "old")]
    with atomic(path) as temporary:
        temporary.write_text("new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result.json", "new")]


def test_a_text_with_what_is_not_utf8_is_written(tmp_path):
    write(tmp_path / "file", "±, caf\udce9")
    assert (tmp_path / "file").read_text("utf-8") == "±, caf?"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_a_file_may_be_read_by_whom_the_user_lets(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write(tmp_path / "file", "text")
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode
        assert os.umask(mask) == mask, "which stays as it is"
    finally:
        os.umask(before)


def test_one_process_at_a_time_runs_in_a_folder(tmp_path, monkeypatch):
    with exclusive(tmp_path):
        with (
            pytest.raises(InputError, match=f"another process is running in {tmp_path}; wait"),
            exclusive(tmp_path),
        ):
            pass
        with pytest.raises(InputError), exclusive(tmp_path):  # the one that was refused has not let go of it
            pass
    assert [*tmp_path.iterdir()] == [], "nothing is left behind"
    with exclusive(tmp_path):
        pass

    def unsupported(lock):
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    with exclusive(tmp_path), exclusive(tmp_path):  # where a file system has no locks, there is none
        pass


def test_a_run_in_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def fail(lock):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", fail)
    number = errno.EROFS
    with pytest.raises(InputError, match=rf"{tmp_path} cannot be written \(Read-only"), exclusive(tmp_path):
        pass
    number = errno.ENOSPC
    with pytest.raises(OSError, match="No space left"), exclusive(tmp_path):  # told as of any other file
        pass
