"""Named sets that are not found are fetched, once and whole, from a server that stands for the network."""

import functools
import hashlib
import http.server
import threading

import numpy as np
import pytest
import torch
from idx_files import STEMS, write_idx

from mim4dd.data import load, named
from mim4dd.errors import InputError


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The folder that stands for the network: kmnist's addresses point to it, the cache lies in tmp_path."""
    folder = tmp_path / "served"
    write_idx(folder)
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        sums = [hashlib.md5((folder / f"{stem}-ubyte.gz").read_bytes()).hexdigest() for stem in STEMS]
        files = named._idx(f"http://127.0.0.1:{server.server_port}", *sums)
        fake = named.Named(named.SETS["kmnist"].read, files)
        monkeypatch.setitem(named.SETS, "kmnist", fake)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(named, "DEBIAN", tmp_path / "debian")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    unsent = ""  # a header that this server keeps to itself

    def log_message(self, *args):
        pass

    def send_header(self, keyword, value):
        if keyword != self.unsent:
            super().send_header(keyword, value)


def test_fetching_fills_the_cache_once(server, tmp_path):
    fetched, _ = load("kmnist")
    cache = tmp_path / "cache" / "mim4dd" / "kmnist"
    assert sorted(f.name for f in cache.iterdir()) == sorted(f"{stem}-ubyte.gz" for stem in STEMS)
    for file in server.iterdir():
        file.unlink()
    assert torch.equal(load("kmnist")[0].images, fetched.images)


def test_fetching_says_so_in_a_line_for_each_file(server, tmp_path, capsys):
    load("kmnist")
    printed = capsys.readouterr()
    folder = tmp_path / "cache" / "mim4dd" / "kmnist"
    assert printed.out == ""
    for line, stem in zip(printed.err.splitlines(), STEMS, strict=True):
        assert line.startswith("fetching http://127.0.0.1:")
        assert line.endswith(f"/{stem}-ubyte.gz into {folder}")
    load("kmnist")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unsent", ["", "Content-Length"])
def test_a_terminal_shows_how_far_fetching_is(server, monkeypatch, capsys, unsent):
    monkeypatch.setattr(QuietHandler, "unsent", unsent)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    load("kmnist")
    done = (server / "train-images-idx3-ubyte.gz").stat().st_size / 1000
    assert f"{done:.1f}/{'?' if unsent else f'{done:.1f}'} kB" in capsys.readouterr().err


def test_wrong_sum_leaves_nothing_behind(server, tmp_path):
    file = server / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes() + b"0")
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\.gz: md5 .* expected"):
        load("kmnist")
    left = sorted(f.name for f in (tmp_path / "cache" / "mim4dd" / "kmnist").iterdir())
    assert left == sorted(f"{stem}-ubyte.gz" for stem in STEMS[:3])


def test_no_such_address(server, tmp_path):
    (server / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(
        InputError, match=r"train-images-idx3-ubyte\.gz cannot be fetched \(HTTP Error 404.*--data-dir"
    ):
        load("kmnist")
    assert not list((tmp_path / "cache" / "mim4dd" / "kmnist").iterdir())


def test_data_dir_is_never_filled_from_the_network(server, tmp_path):
    with pytest.raises(InputError, match="not found in"):
        load("kmnist", tmp_path / "empty")
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "empty").exists()


def test_debian_folder(server, tmp_path):
    images, *_ = write_idx(tmp_path / "debian" / "kmnist")
    assert np.array_equal(load("kmnist")[0].images[:, 0], images)
    assert not (tmp_path / "cache").exists()
