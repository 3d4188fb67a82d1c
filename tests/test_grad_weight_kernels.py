"""The kernels of a weight's gradient against torch's in float64; without a GPU in Triton's interpreter."""

import numerics
import pytest
import torch

pytest.importorskip("triton")

from mim4dd.kernels import launch
from mim4dd.kernels.grad_weight import TILES, grad_weight

exact, poisoned = numerics.exact, numerics.poisoned  # fixtures
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative errors by dtype: half precision is that of the same rounded maps, rounded; the interpreter cuts off
# what bfloat16 does not hold.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Images, groups, channels out and in of each, height and width: multiples of no block, one of each, maps of a
# single row, column or pixel, several tiles of channels, and large maps.
SHAPES = [
    (3, 2, 20, 10, 5, 7),
    (1, 1, 1, 1, 1, 1),
    (5, 3, 1, 17, 1, 9),
    (70, 2, 16, 1, 1, 1),
    (2, 3, 16, 32, 6, 1),
    (4, 2, 130, 70, 2, 3),
    (1, 1, 8, 8, 19, 20),
    (9, 2, 16, 16, 8, 4),
]


@pytest.fixture
def wide_gpu(monkeypatch):
    """A GPU for which the images are split into several parts."""
    monkeypatch.setattr(launch, "device_limits", lambda device: (232_448, 36))


def maps(shape, dtype=torch.float32):
    """grad_y and x."""
    batch, groups, out, channels, height, width = shape
    g = torch.Generator().manual_seed(0)
    sizes = ((batch, groups * own, height, width) for own in (out, channels))
    return tuple(torch.randn(size, generator=g).to(DEVICE, dtype) for size in sizes)


def check(grad_y, x, groups, tolerance=None):
    found = grad_weight(grad_y, x, groups)
    assert found.dtype == x.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    shape = grad_y.shape[1], x.shape[1] // groups, 3, 3
    expected = torch.nn.grad.conv2d_weight(x.double(), shape, grad_y.double(), padding=1, groups=groups)
    numerics.close(found, expected, tolerance or TOLERANCE[x.dtype])
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype):
    check(*maps(shape, dtype), shape[1])


@pytest.mark.usefixtures("wide_gpu")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[7]], ids=str)
def test_the_sums_of_parts_are_added(shape, dtype):
    check(*maps(shape, dtype), shape[1])


@pytest.mark.parametrize(("dtype", "multiprocessors"), [(torch.float32, 9), (torch.float16, 12)])
def test_the_sums_of_two_parts_are_kept_in_float32(dtype, multiprocessors, monkeypatch, poisoned):
    monkeypatch.setattr(launch, "device_limits", lambda device: (232_448, multiprocessors))
    check(*maps(SHAPES[0], dtype), 2)
    assert ((2, 40 * 10 * 9), torch.float32) in poisoned


def test_tensor_float(monkeypatch):
    """Wherever the library's convolutions have it."""
    monkeypatch.delitem(TILES, "ieee")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for shape in (SHAPES[0], SHAPES[5]):
        check(*maps(shape), shape[1], tolerance=5e-3)


@pytest.mark.usefixtures("wide_gpu")
def test_bits_do_not_depend_on_the_layout_of_the_maps_or_on_the_run():
    grad_y, x = maps(SHAPES[0], torch.bfloat16)
    expected = check(grad_y, x, 2)
    wider = [torch.stack([value, torch.full_like(value, torch.nan)], 4).flatten(3) for value in (grad_y, x)]
    last = [value.contiguous(memory_format=torch.channels_last) for value in (grad_y, x)]
    transposed = [value.transpose(0, 1).contiguous().transpose(0, 1) for value in (grad_y, x)]
    for given in ([value[..., ::2] for value in wider], last, last, transposed):
        assert torch.equal(grad_weight(*given, 2), expected)
    check(grad_y[:1, :1, :1, :1].expand(grad_y.shape), x[:1].expand(x.shape), 2)


@pytest.mark.usefixtures("wide_gpu")
def test_not_a_number_stays_in_its_channel():
    grad_y, x = maps(SHAPES[0])
    x[2, 13, 0, 3] = torch.nan
    grad_y[0, 5, 4, 6] = torch.nan
    found = grad_weight(grad_y, x, 2).isnan()
    expected = torch.zeros_like(found)
    expected[20:, 3] = True
    expected[20:, 3, 2] = False  # the first row of pixels is not seen from below
    expected[5] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_images(dtype):
    found = grad_weight(*maps((0, 2, 20, 10, 5, 7), dtype), 2)
    assert found.shape == (40, 10, 3, 3)
    assert not found.any()
