"""How a command ends: its exit code, and a message instead of a traceback where the user can fix it."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from .. import extras
from ..distill import DivergenceError
from ..errors import InputError
from ..files import FULL
from .console import complain


def guarded(command: Callable[[], int | None]) -> int:
    """Run a command line; return its exit code.

    1: diverged, or no room in memory or on the disk; 2: the user's mistake, or a missing package;
    130: interrupted or terminated; 141: nobody reads the output any more.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding without "±" must not end a run
            stream.reconfigure(errors="replace")
    try:
        try:
            with _termination_interrupts():
                return command() or 0
        finally:
            if sys.stdout:  # which may be closed
                sys.stdout.flush()  # now, not when Python ends and can only complain
    except BrokenPipeError:  # as after `| head`: what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except InputError as error:
        complain(str(error))
        return 2
    except ModuleNotFoundError as error:
        if error.name not in extras.LATER:
            raise
        complain(extras.missing(error.name))
        return 2
    except DivergenceError as error:
        complain(str(error))
        return 1
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # of any option with a path
            complain(str(error))
            return 2
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        complain(f"a file could not be written ({error}); free some space: files saved earlier are unchanged")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        complain(
            f"out of memory ({reason}); lower --memory-budget (on a GPU), "
            "--real-batch, --width, --ipc or --image-size"
        )
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: a cluster sends it when the time is up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only that one gets signals
        return

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: another would interrupt the saving
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _out_of_memory(error: Exception) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    # The second is torch's message for more than 2^63 bytes.
    said = ("DefaultCPUAllocator: can't allocate", "Storage size calculation overflowed")
    return isinstance(error, kinds) or any(text in str(error) for text in said)
