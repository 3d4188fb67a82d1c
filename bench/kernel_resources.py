"""What every launch configuration costs on sm_80, sm_90 and sm_100, compiled here: no GPU needed.

    python -m bench.kernel_resources            a table
    python -m bench.kernel_resources --json     the same as JSON lines

Each entry of the launch table is put first and the product's own host code is run up to its launches, so what
is compiled is what a call would launch, specialised as at run time. The kernels of layers have no table:
they are compiled for maps and images of several sizes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from unittest import mock

import torch
import triton
from mim4dd.kernels import contrast, first_block, grad_weight, launch, normalisation
from mim4dd.kernels.pairs import LOG_SUMS
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mim4dd import kernels
from mim4dd.losses.form import LossForm

# Shared memory a program may have and the number of multiprocessors: A100, H100 and B200.
DEVICES = {80: (166_912, 108), 90: (232_448, 132), 100: (232_448, 148)}
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
LOSS_OF_SUMS = {sums: loss for loss, sums in LOG_SUMS.items()}
INFO_NCE = ("info_nce", "info_nce_any")
# The forms each table is compiled with, and whether the gradients by the scales are wanted.
ALONE = [(LossForm("nce"), False), *((LossForm(name, exclude_self=True), False) for name in INFO_NCE)]
LONG = [
    (LossForm("nce", symmetric=True), True),
    *((LossForm(name, None, True, True), True) for name in INFO_NCE),
]
CALLS = {
    "DOTS": [(LossForm("nce"), True)],
    "PRODUCT": [(LossForm("nce"), True), *((LossForm(name, symmetric=True), True) for name in INFO_NCE)],
    "SUMS": [(form, False) for form, _ in LONG[1:]],
    "WIDE": ALONE,
    "LONG_WIDE": LONG,
    "NARROW_64": LONG,
    "NARROW_128": ALONE,
    "LONG_NARROW_128": LONG,
}
# Of the forms of a table, the one whose main kernel takes the most registers, on sm_90 in half precision.
HEAVIEST = {
    "DOTS": "nce",
    "PRODUCT": "info_nce",
    "SUMS": "info_nce_any",
    "WIDE": "nce",
    "LONG_WIDE": "info_nce",
    "NARROW_64": "info_nce",
    "NARROW_128": "nce",
    "LONG_NARROW_128": "info_nce",
}
# Maps of 128 channels: what fits a block, what does not, and what blocks do not just cover.
MAPS = [(size, pool) for size in (8, 16, 32, 33) for pool in (1, 2)]
# Channels, side and padding of images with 128 channels out, 32 x 32.
IMAGES = [(1, 28, 3), (3, 32, 1)]
# Sides of maps of 3 groups of 128 channels.
SMALL_MAPS = (7, 8)
LAYER_SHARED = 65_536  # bytes of shared memory that a kernel of a layer may take
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class CompileOnly:
    """Stands in for Triton's driver: says what to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # what Triton keeps its compiled kernels by

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled(capability: int) -> Iterator[dict]:
    """Collect the kernels that calls in this context would launch on a device of `capability`."""
    collected: dict[tuple, tuple[str, dict, object]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        collected[kernel.hash] = (self.__name__, options, kernel)
        return kernel

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "device_limits", return_value=DEVICES[capability]),
    ):
        driver.set_active(CompileOnly(capability))
        yield collected


def resources(kernel) -> dict:
    """Registers, spilled bytes a thread, shared memory and instruction counts of a compiled kernel."""
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The kernels have no arrays of their own: what is on the stack is spilled registers.
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", log).groups()
    return {
        "registers": int(registers),
        "spilled": int(stack),
        "shared": kernel.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"mma\.sync", ptx)),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "drops_nan": len(re.findall(r"max\.f32", ptx)),  # of a number and not-a-number it gives the number
    }


def facts(
    kernel, name: str, precision: str, tile: list, shared: int, *, loss: str | None = None, symmetric=False
) -> dict:
    """What is told of a compiled kernel."""
    return {
        "kernel": f"{kernel.src.fn.fn.__module__.rsplit('.', 1)[-1]}.{name}",
        "sm": kernel.metadata.target.arch,
        "precision": precision,
        "tile": tile,
        "loss": loss,
        "symmetric": symmetric,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "shared_estimate": shared,
        **resources(kernel),
    }


def rows(capability: int, precision: str, tables: Sequence[str], largest: bool = False) -> Iterator[dict]:
    """Compile every entry of these tables, or the first and largest with the heaviest loss, with gradients to
    both sides.
    """
    dtype = DTYPES[precision]
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    labels = torch.zeros(64, dtype=torch.int64)
    scales = torch.ones(2, 1)
    seen = set()
    for table_name in tables:
        table, calls = launch.TABLES[table_name], CALLS[table_name]
        if largest:
            calls = [call for call in calls if call[0].name == HEAVIEST[table_name]]
        pairs = 1 << 62 if table_name in ("DOTS", "PRODUCT") else 0
        for tile in table.get(precision, ())[: 1 if largest else None]:
            features = torch.ones(64, tile.d if "NARROW" in table_name else 256, dtype=dtype)
            with (
                mock.patch.dict(table, {precision: (tile,)}),
                mock.patch.object(kernels, "SKINNY_PAIRS", pairs),
                compiled(capability) as collected,
            ):
                for form, grad_scales in calls:
                    wanted = (grad_scales, True, True)
                    contrast(form, scales, labels, labels, [features], [features], wanted)
            for key, (name, options, kernel) in collected.items():
                if key in seen:
                    continue
                seen.add(key)
                sides = options.get("BY_OWN", 0) + options.get("BY_OTHER", 0)
                yield facts(
                    kernel,
                    name,
                    precision,
                    [
                        options.get("BLOCK_M", options.get("OWN")),
                        options.get("BLOCK_N"),
                        options.get("BLOCK_D"),
                    ],
                    tile.shared(features.element_size()),
                    loss=options.get("LOSS") or LOSS_OF_SUMS.get(options.get("NUM_SUMS")),
                    symmetric=options.get("SYMMETRIC", sides > 1),
                )


def layer_rows(capability: int, precision: str, largest: bool = False) -> Iterator[dict]:
    """Compile the kernels of normalisation for every size of `MAPS`, of the first block for `IMAGES`, and of
    the gradient of a weight for `SMALL_MAPS`, or for the last and largest of each.
    """
    sizes = slice(-1, None) if largest else slice(None)
    for size, pool in MAPS[sizes]:
        x, out = (torch.zeros(1, 128, side, side, dtype=DTYPES[precision]) for side in (size, size // pool))
        per_image = torch.zeros(1, 128)
        affine = per_image[0], per_image[0]
        saved = x, *affine, per_image, per_image, True, pool
        with compiled(capability) as collected:
            normalisation.forward(x, *affine, 1e-5, True, pool)
            normalisation.backward(out, *saved)
            normalisation.backward_twice(x, per_image, per_image, out, *saved)
        yield from _layer_rows(precision, collected)
    for channels, size, padding in IMAGES[sizes]:
        x = torch.zeros(1, channels, size, size, dtype=DTYPES[precision])
        out = torch.zeros(1, 128, 16, 16, dtype=x.dtype)
        per_image = torch.zeros(1, 128)
        block = x, torch.zeros(9 * channels, 128), per_image[0], per_image[0]
        rounded = torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32")
        with rounded, compiled(capability) as collected:
            first_block.forward(*block, 1e-5, padding, True, 2)
            first_block.backward(out, *block, per_image, per_image, padding, True, 2)
        yield from _layer_rows(precision, collected)
    tile = grad_weight.TILES[precision]
    for size in SMALL_MAPS[sizes]:
        x = torch.zeros(100, 3 * 128, size, size, dtype=DTYPES[precision])
        rounded = torch.backends.cudnn.flags(enabled=True, allow_tf32=precision == "tf32")
        with rounded, compiled(capability) as collected:
            grad_weight.grad_weight(x, x, 3)
        shared = tile.stages * (tile.out + tile.taps * tile.channels) * tile.pixels * x.element_size()
        yield from _layer_rows(precision, collected, shared)


def _layer_rows(precision: str, collected: dict, shared: int = LAYER_SHARED) -> Iterator[dict]:
    for name, options, kernel in collected.values():
        tile = [options.get("BLOCK", options.get("BLOCK_P")), options.get("BLOCK_C"), None]
        if name == "sums_kernel":
            tile = [options["BLOCK_O"], options["BLOCK_C"], options["BLOCK_P"]]
        yield facts(kernel, name, precision, tile, shared)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sm", type=int, nargs="+", default=[*DEVICES], choices=[*DEVICES])
    parser.add_argument("--precision", nargs="+", default=[*DTYPES], choices=[*DTYPES])
    parser.add_argument(
        "--tables", nargs="+", choices=[*CALLS], help="of the losses; default: all, and the layers"
    )
    parser.add_argument("--largest", action="store_true", help="of each table, the largest with one loss")
    arguments = parser.parse_args()
    header = True
    for capability in arguments.sm:
        for precision in arguments.precision:
            losses = rows(capability, precision, arguments.tables or [*CALLS], arguments.largest)
            layers = iter(()) if arguments.tables else layer_rows(capability, precision, arguments.largest)
            for row in chain(losses, layers):
                if arguments.json:
                    print(json.dumps(row), flush=True)
                    continue
                if header:
                    print(" | ".join(row))
                    header = False
                print(" | ".join(str(value) for value in row.values()), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.stderr.write("bench.kernel_resources compiles: unset TRITON_INTERPRET\n")
        sys.exit(2)
    main()
