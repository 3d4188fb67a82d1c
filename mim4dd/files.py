"""Where files go, and writing them so that nobody ever sees half of one."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk or a quota
LOCK = ".lock"  # in the folder of a run for as long as it lasts, and after one that was killed


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place when the block ends without an error."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    except FileNotFoundError as error:  # it names the temporary file
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(path.parent)) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files that only their owner may read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; text as UTF-8, with ? for parts of a path that are not."""
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


def expanded(path: str | Path) -> Path:
    """Return a path with a ~ or ~user that it begins with expanded.

    Raises:
        InputError: nobody knows where that user's home is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no such user, or none with a home folder") from error


def cache_folder() -> Path:
    """Return where data, experts and launch configurations are kept: $MIM4DD_CACHE, or the user's cache."""
    own = os.environ.get("MIM4DD_CACHE")
    if own:
        return expanded(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mim4dd"


def make_folder(folder: Path, dataset: str) -> Path:
    """Create the folder of --out, if it is not there yet, and return it.

    Raises:
        InputError: it cannot be written, is not UTF-8, or lies among the pictures of the data set.
    """
    data = expanded(dataset)
    if data.is_dir() and folder.resolve().is_relative_to(data.resolve()):
        raise InputError(
            f"--out {folder} lies in {dataset}, where it would count as a class from now on; give another"
        )
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"--out {folder} is not UTF-8; give another") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror}); give another") from error
    return folder


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes from running in `folder` for as long as the block lasts.

    Raises:
        InputError: another process is running there, or it cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another process is running in {folder}; wait for it or give another --out"
        ) from error
    except NotImplementedError:  # a file system without locks, as some of clusters are
        yield
        return
    except OSError as error:
        if error.errno in FULL:
            raise
        raise InputError(f"{folder} cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
