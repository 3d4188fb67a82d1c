"""The augmentation's CUDA kernels, compiled for the CPU with a stand-in for CUDA, beside the reference."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from numerics import IMAGE_TOLERANCE, close_images

from mim4dd import augment, extension

ROOT = Path(__file__).parents[1]
NAMESPACE = "mim4dd_on_cpu"
# Each part alone, all that keep to whole pixels, and all.
STRATEGIES = [*augment.DSA.split("_"), "color_crop_cutout_flip", augment.DSA]
# Of 1, 3, fewer and more than 4 channels; one block and several; sides that are no multiple of anything.
SHAPES = [(5, 1, 1, 1), (30, 3, 4, 4), (5, 3, 32, 32), (2, 2, 9, 300), (3, 7, 65, 33), (2, 3, 130, 127)]

pytestmark = pytest.mark.skipif(not extension.available(), reason="the extension is not built")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The operator whose CPU kernel they are."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++ on PATH")
    folder, torch_path = tmp_path_factory.mktemp("kernels"), Path(torch.__file__).parent
    library, operator = folder / "kernels.so", folder / "ops.cpp"
    # As on a GPU, nobody looks at values before the kernels do.
    source = (ROOT / "csrc/augment/ops.cpp").read_text()
    operator.write_text(source.replace("  check_values(call);\n", ""))
    options = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-Dmim4dd={NAMESPACE}"]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT}/tests/cuda_on_cpu"]
    options += [f"-I{ROOT}/csrc/augment", f"-I{torch_path}/include"]
    options += [f"-I{torch_path}/include/torch/csrc/api/include"]
    sources = [ROOT / "tests/cuda_on_cpu/augment.cpp", operator]
    command = [compiler, *options, *sources, f"-L{torch_path}/lib", "-ltorch_cpu", "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)
    return getattr(torch.ops, NAMESPACE).augment


def expected(x, upstream, params, **options):
    leaf = x.clone().requires_grad_(x.is_floating_point())
    y = augment.apply(leaf, params, backend="reference", **options)
    return y.detach(), torch.autograd.grad(y, leaf, upstream)[0] if upstream is not None else None


def packed(params):
    """All fields in one tensor, as they are drawn on a GPU."""
    return torch.cat([field.float().reshape(len(field), -1) for field in params.fields().values()], 1)


@pytest.mark.parametrize("dtype", IMAGE_TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_images_and_gradients_equal_the_reference(kernels, strategy, shape, dtype):
    params = augment.sample(
        strategy, shape[0], shape[2:], generator=torch.Generator().manual_seed(0), mode="all"
    )
    x, upstream = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if (SHAPES.index(shape) + [*IMAGE_TOLERANCE].index(dtype)) % 2:  # strides are numbers to every kernel
        x, upstream = (t.to(memory_format=torch.channels_last) for t in (x, upstream))
    if dtype == torch.float64:
        x, upstream = (t.repeat_interleave(2, 3)[..., ::2] for t in (x, upstream))  # not dense
    fields = [*params.fields().values()]
    if dtype == torch.float32:
        fields = [packed(params)]
    if dtype == torch.bfloat16:
        fields = [packed(params).t().contiguous().t()]
    for wanted, given, adjoint in zip(
        expected(x, upstream, params), (x, upstream), (False, True), strict=True
    ):
        result, again = (kernels(given, fields, None, None, None, True, adjoint) for _ in range(2))
        close_images(result, wanted)
        assert torch.equal(result, again)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_gradients_of_pixels_that_many_outputs_sampled(kernels, channels):
    """Magnified, turned far, of a single column; a hole of one pixel in the gradient."""
    fields = augment.AugmentParams.identity(4).fields()
    fields |= {
        "scale_x": torch.tensor([0.2, 0.9, 0.0, 1.1]),
        "scale_y": torch.tensor([0.3, 0.8, 1.1, 1.0]),
        "degrees": torch.tensor([10.0, 70.0, 0.0, 5.0]),
        "cutout": torch.tensor([[5, 5, 6, 6]]).expand(4, 4),
    }
    x, upstream = torch.randn(
        2, 4, channels, 11, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    wanted = expected(x, upstream, augment.AugmentParams(**fields))[1]
    close_images(kernels(upstream, [*fields.values()], None, None, None, True, True), wanted)


def test_pixels_that_lie_too_far_apart_for_an_int(kernels):
    apart = 2**31  # in bytes, of memory that is reserved and hardly used
    random = torch.Generator().manual_seed(0)
    x = torch.empty(apart + 6, dtype=torch.uint8).as_strided((1, 3, 2, 2), (1, 2, apart, 1))
    x.copy_(torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=random))
    params = augment.sample(augment.DSA, 1, 2, generator=random, mode="all")
    fields = [*params.fields().values()]
    result = kernels(x, fields, None, None, None, True, False)
    close_images(result, kernels(x.contiguous(), fields, None, None, None, True, False))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_bytes_that_are_normalised_and_rows(kernels, channels, align_corners):
    random = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, channels, 9, 12), dtype=torch.uint8, generator=random)
    params = augment.sample(augment.DSA, 2, (9, 12), generator=random, mode="all")
    rows, mean, std = torch.tensor([0, 1, 1, 0, 0, 1]), *torch.rand(2, channels, generator=random) + 0.2
    options = {"rows": rows, "mean": mean, "std": std, "align_corners": align_corners}
    for fields in ([*params.fields().values()], [packed(params)]):
        result = kernels(x, fields, rows, mean, std, align_corners, False)
        close_images(result, expected(x, None, params, **options)[0])


def test_pixels_that_are_sampled_with_no_weight_are_not_read(kernels):
    """Not even where they are not a number."""
    x = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    x[..., 0, :] = torch.nan
    params = augment.AugmentParams.identity(1)
    fields = params.fields() | {"shift_y": torch.tensor([1])}
    result = kernels(x, [*fields.values()], None, None, None, True, False)
    assert torch.equal(result[..., :5, :], x[..., 1:, :])
    assert not result[..., 5, :].any()


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_what_is_cut_out_is_zero_whatever_else_there_is(kernels, channels):
    """Also where the image's mean, which contrast adds, is not finite."""
    x = torch.ones(1, channels, 4, 4)
    x[0, 0, 3, 3] = torch.inf
    fields = augment.AugmentParams.identity(1).fields()
    fields |= {"cutout": torch.tensor([[0, 1, 0, 1]]), "contrast": torch.tensor([0.5])}
    result = kernels(x, [*fields.values()], None, None, None, True, False)
    assert not result[..., :2, :2].any()
    assert not result[..., 2:, 2:].isfinite().any()


@pytest.mark.parametrize("size", [4, 130])
@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("adjoint", [False, True])
def test_what_is_not_finite_or_out_of_range_makes_one_image_nan(kernels, adjoint, channels, size):
    x, params = torch.ones(3, channels, size, size), packed(augment.AugmentParams.identity(3))

    def broken(params, rows=None):
        found = kernels(x, [params], rows, None, None, True, adjoint).isnan().flatten(1)
        assert torch.equal(found.any(1), found.all(1))
        return found[:, 0].tolist()

    for column in range(13):
        given = params.clone()
        given[1, column] = torch.inf if column % 2 else torch.nan
        assert broken(given) == [False, True, False]
    for rows in ([0, -1, 1], [0, 2, 1]):
        assert broken(params[:2], torch.tensor(rows)) == [False, True, False]
