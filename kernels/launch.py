"""How a kernel is launched: on which device, and with which tile.

The tiles of a kernel are a small table, from which precision, shared memory and grid size choose. The first
entry that fits the device and still gives every multiprocessor a program wins; if none does, the last that
fits. `bench/kernel_resources.py` compiles every entry, `tests/test_kernels_compiled.py` most of them for
sm_90: no spills, within its shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Return the context to launch kernels in: on the tensor's GPU, where Triton takes the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a program's block product, and how it is run."""

    m: int
    n: int
    d: int
    warps: int
    stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory the operands take at most: a stage each, or two layouts of one stage."""
        return max(2, self.stages) * (self.m + self.n) * self.d * itemsize


# Keyed by how products are formed: "half" (bfloat16, float16), "tf32", "ieee" (float32 without tensor cores).
Table = dict[str, tuple[Tile, ...]]

DOTS: Table = {
    "half": (
        Tile(128, 64, 64, 8, 3),
        Tile(64, 64, 64, 4, 3),
        Tile(16, 64, 128, 4, 3),
        Tile(16, 64, 64, 4, 2),
    ),
    "tf32": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(16, 64, 64, 4, 3), Tile(16, 64, 32, 4, 2)),
    "ieee": (Tile(64, 64, 32, 4, 3), Tile(16, 64, 64, 4, 3), Tile(16, 32, 32, 4, 2)),
}
# m x d is the tile of the gradient, n the depth of the sum over pairs.
PRODUCT: Table = {
    "half": (Tile(64, 32, 128, 4, 3), Tile(64, 32, 64, 4, 3), Tile(16, 32, 64, 4, 3)),
    "tf32": (Tile(64, 32, 64, 4, 3), Tile(16, 32, 64, 4, 3), Tile(16, 32, 32, 4, 2)),
    "ieee": (Tile(32, 32, 64, 4, 3), Tile(16, 32, 64, 4, 3), Tile(16, 32, 32, 4, 2)),
}
WIDE: Table = {
    "half": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 64, 32, 4, 2)),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 2)),
    "ieee": (Tile(64, 64, 32, 4, 3),),
}
# Where more is computed of each pair (symmetric, or gradients by the scales), 128 x 128 takes 255 registers
# and spills 270 bytes.
LONG_WIDE: Table = {
    "half": (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 64, 32, 4, 2)),
    "tf32": (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 2)),
    "ieee": WIDE["ieee"],
}
SUMS: Table = WIDE
# d is the largest width. A program also keeps its m x d gradient, so tiles are small: two or more programs
# run on a multiprocessor, one computing exponentials while the other multiplies.
NARROW_64: Table = {
    "half": (Tile(64, 32, 64, 4, 2),),
    "tf32": (Tile(64, 32, 64, 4, 1),),
}
NARROW_128: Table = {
    "half": (Tile(64, 64, 128, 4, 2), Tile(64, 32, 128, 4, 2)),
    "tf32": (Tile(32, 32, 128, 4, 2),),
}
LONG_NARROW_128: Table = {
    "half": (Tile(64, 32, 128, 4, 2),),
    "tf32": NARROW_128["tf32"],
}

TABLES = {
    "DOTS": DOTS,
    "PRODUCT": PRODUCT,
    "SUMS": SUMS,
    "WIDE": WIDE,
    "LONG_WIDE": LONG_WIDE,
    "NARROW_64": NARROW_64,
    "NARROW_128": NARROW_128,
    "LONG_NARROW_128": LONG_NARROW_128,
}
_forced: ContextVar[dict[str, Tile]] = ContextVar("forced", default={})  # noqa: B039 (never changed in place)


@contextmanager
def forced(tiles: dict[str, Tile]) -> Iterator[None]:
    """Use these tiles, by the name of their table, in place of what the table would choose."""
    token = _forced.set(tiles)
    try:
        yield
    finally:
        _forced.reset(token)


@lru_cache(maxsize=64)
def device_limits(device: torch.device) -> tuple[int, int]:
    """Shared memory a program may have, in bytes, and the number of multiprocessors."""
    if device.type == "cpu":  # the interpreter: a small GPU, so that small tests meet several programs
        return 101_376, 4
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(device.index or 0)
    return properties["max_shared_mem"], properties["multiprocessor_count"]


def fitting(table: str, features: Tensor) -> list[Tile]:
    """The entries for these features that fit their device's shared memory."""
    shared, _ = device_limits(features.device)
    tiles = TABLES[table][precision_of(features.dtype)]
    return [tile for tile in tiles if tile.shared(features.element_size()) <= shared]


def choose(table: str, features: Tensor, programs: Callable[[Tile], int]) -> Tile:
    """Return the entry for a call on these features that would start `programs(tile)` programs."""
    if table in _forced.get():
        return _forced.get()[table]
    _, multiprocessors = device_limits(features.device)
    tiles = fitting(table, features)
    return next((tile for tile in tiles if programs(tile) >= multiprocessors), tiles[-1])


def precision_of(dtype: torch.dtype) -> str:
    """How products of `dtype` are formed: float32 as torch's on CUDA."""
    if dtype != torch.float32:
        return "half"
    # Not `get_float32_matmul_precision`, which raises where a program has set that of CUDA alone.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def precision_of_convolutions(dtype: torch.dtype) -> str:
    """The same for convolutions."""
    if dtype != torch.float32:
        return "half"
    # Likewise not `allow_tf32`.
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]


def dot_precision(precision: str) -> str:
    """The `input_precision` of the products (ignored for half precision operands)."""
    return "ieee" if precision == "ieee" else "tf32"
