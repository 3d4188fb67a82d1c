import dataclasses
import math

import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st

from mim4dd import augment, extension
from mim4dd.augment import AugmentParams

BACKENDS = ["reference", "fused"]
SHAPES = ["1x28x28", "3x32x32"]
PARTS = augment.DSA.split("_")


def params_with(batch: int, **fields: torch.Tensor) -> AugmentParams:
    return dataclasses.replace(AugmentParams.identity(batch), **fields)


def golden_params(case: str, golden: dict[str, torch.Tensor]) -> AugmentParams:
    """Translate the golden file's parameters of one op."""
    op = case.split("_")[0]
    given = {key.split(".")[1]: value for key, value in golden.items() if key.startswith(f"{case}.")}
    fields = {
        "brightness": lambda: {"brightness": given["shift"]},
        "saturation": lambda: {"saturation": given["factor"]},
        "contrast": lambda: {"contrast": given["factor"]},
        "color": lambda: {
            "brightness": given["shift"],
            "saturation": given["saturation"],
            "contrast": given["contrast"],
        },
        "crop": lambda: {"shift_y": given["dy"], "shift_x": given["dx"]},
        "cutout": lambda: {"cutout": torch.stack([given[edge] for edge in ("y0", "y1", "x0", "x1")], 1)},
        "flip": lambda: {"flip": given["flip"]},
        "scale": lambda: {"scale_x": given["sx"], "scale_y": given["sy"]},
        "rotate": lambda: {"degrees": given["degrees"]},
    }[op]()
    return params_with(6, **fields)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "case",
    [
        *("brightness", "saturation", "contrast", "color", "crop", "cutout", "flip"),
        *("scale_align", "scale_noalign", "rotate_align", "rotate_noalign"),
    ],
)
def test_every_op_equals_the_published_one(golden, shape, case, backend):
    file = golden(f"augment_{shape}")
    y = augment.apply(
        file["x"], golden_params(case, file), align_corners=not case.endswith("_noalign"), backend=backend
    )
    close(y, file[f"{case}.y"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_colour_gradient_equals_the_published_one(golden, shape, backend):
    file = golden(f"augment_{shape}")
    x = file["x"].requires_grad_()
    y = augment.apply(x, golden_params("color", file), backend=backend)
    (gradient,) = torch.autograd.grad(y, x, file["color.grad_y"])
    close(gradient, file["color.grad_x"])


def random_params(batch: int, size: tuple[int, int], seed: int = 0) -> AugmentParams:
    return augment.sample(augment.DSA, batch, size, generator=torch.Generator().manual_seed(seed), mode="all")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [True, False])
def test_gradcheck_with_every_part_at_once(generator, backend, align_corners):
    x = torch.randn(3, 3, 5, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    params = random_params(3, (5, 6))
    assert torch.autograd.gradcheck(
        lambda x: augment.apply(x, params, align_corners=align_corners, backend=backend), x
    )


@given(
    batch=st.integers(0, 5),
    channels=st.sampled_from([1, 3, 7]),
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_compiled_equals_reference(batch, channels, height, width, dtype, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, dtype=dtype, generator=generator)
    if strided:
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    upstream = torch.randn(x.shape, dtype=dtype, generator=generator)
    params = random_params(batch, (height, width), seed)
    results = []
    for backend in BACKENDS:
        leaf = x.clone().requires_grad_()
        y = augment.apply(leaf, params, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaf, upstream)))
    for compiled, reference in zip(results[1], results[0], strict=True):
        assert compiled.dtype == reference.dtype == dtype
        torch.testing.assert_close(compiled, reference, rtol=1e-4, atol=1e-5)


def test_compiled_op_is_well_registered(generator):
    x = torch.randn(2, 3, 4, 5, generator=generator, requires_grad=True)
    p = random_params(2, (4, 5))
    torch.library.opcheck(torch.ops.mim4dd.colour, (x, p.brightness, p.saturation, p.contrast))
    with pytest.raises(RuntimeError, match="one value per image"):
        torch.ops.mim4dd.colour(x, p.brightness[:1], p.saturation, p.contrast)
    with pytest.raises(RuntimeError, match="floating dtype"):
        torch.ops.mim4dd.colour(x.int(), p.brightness, p.saturation, p.contrast)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(generator, dtype, backend):
    x = torch.randn(4, 3, 8, 8, generator=generator)
    params = random_params(4, (8, 8))
    y = augment.apply(x.to(dtype), params, backend=backend)
    assert y.dtype == dtype
    close(y.float(), augment.apply(x, params), tolerance=3e-2)


def test_identity_changes_nothing_bit_for_bit(generator):
    x = torch.randn(3, 3, 9, 12, generator=generator)
    assert torch.equal(augment._resample(x, AugmentParams.identity(3), True), x)
    torch.testing.assert_close(augment.apply(x, AugmentParams.identity(3)), x)


def test_shift_and_flip_are_exact(generator):
    x = torch.randn(1, 2, 6, 6, generator=generator)
    shifted = augment._resample(
        x, params_with(1, shift_y=torch.tensor([2]), shift_x=torch.tensor([-1])), True
    )
    assert torch.equal(shifted[:, :, :4, 1:], x[:, :, 2:, :5])
    assert not shifted[:, :, 4:].any()
    assert not shifted[:, :, :, 0].any()
    flipped = augment._resample(x, params_with(1, flip=torch.tensor([True])), True)
    assert torch.equal(flipped, x.flip(3))


def test_all_parts_compose_as_shift_after_flip_after_scale_after_rotate(generator):
    """A quarter turn, a flip and a shift of one pixel, followed by hand."""
    x = torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    params = params_with(
        1,
        degrees=torch.tensor([90.0]),
        flip=torch.tensor([True]),
        shift_x=torch.tensor([1]),
        cutout=torch.tensor([[0, 1, 2, 3]]),
    )
    by_hand = torch.zeros_like(x)
    by_hand[..., :7] = x[..., 1:]  # shifted
    by_hand = by_hand.flip(3).rot90(1, (2, 3))
    by_hand[..., 0:2, 2:4] = 0
    close(augment.apply(x, params), by_hand, tolerance=1e-6)


def test_single_mode_draws_one_part_per_call(generator):
    identity = vars(AugmentParams.identity(32))
    changed_by = {
        "color": {"brightness", "saturation", "contrast"},
        "crop": {"shift_y", "shift_x"},
        "cutout": {"cutout"},
        "flip": {"flip"},
        "scale": {"scale_x", "scale_y"},
        "rotate": {"degrees"},
    }
    seen = set()
    for _ in range(100):
        params = augment.sample(augment.DSA, 32, 16, generator=generator)
        changed = {name for name, value in vars(params).items() if not torch.equal(value, identity[name])}
        assert changed in changed_by.values()
        seen.add(next(part for part, fields in changed_by.items() if fields == changed))
    assert seen == set(PARTS)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (9, 32)])
def test_parameters_stay_in_the_published_ranges(size):
    params = random_params(4000, size)
    height, width = size
    assert params.brightness.abs().max() <= 0.5
    assert params.saturation.min() >= 0
    assert params.saturation.max() < 2
    assert params.contrast.min() >= 0.5
    assert params.contrast.max() < 1.5
    assert params.shift_y.unique().tolist() == list(range(-reach(height), reach(height) + 1))
    assert params.shift_x.unique().tolist() == list(range(-reach(width), reach(width) + 1))
    assert params.scale_x.min() >= 1 / 1.2 - 1e-6
    assert params.scale_y.max() < 1.2
    assert not torch.equal(params.scale_x, params.scale_y)
    assert 14 < params.degrees.abs().max() <= 15
    assert 0.4 < params.flip.float().mean() < 0.6
    y0, y1, x0, x1 = params.cutout.T
    for low, high, side in ((y0, y1, height), (x0, x1, width)):
        box = int(side * 0.5 + 0.5)
        assert low.min() == 0
        assert high.max() == side - 1
        assert (high - low + 1).max() == box
        assert (high - low + 1).min() == box // 2 if box % 2 == 0 else math.ceil(box / 2)


def reach(side: int) -> int:
    return int(side * 0.125 + 0.5)


def test_siamese_rows_are_one_row_repeated(generator):
    params = augment.sample(augment.DSA, 5, 16, generator=generator, siamese=True, mode="all")
    assert len(params) == 5
    for field in vars(params).values():
        assert (field == field[:1]).all()


def test_rows_can_be_spread_over_images(generator):
    per_class = random_params(3, (8, 8))
    labels = torch.tensor([2, 0, 1, 2])
    x = torch.randn(4, 1, 8, 8, generator=generator)
    together = augment.apply(x, per_class[labels])
    alone = [augment.apply(x[i : i + 1], per_class[labels[i : i + 1]]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_same_seed_same_parameters():
    first, second, other = (random_params(8, (16, 16), seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    assert not torch.equal(first.brightness, other.brightness)


@pytest.mark.parametrize("strategy", ["", "none"])
def test_no_strategy_is_the_identity(generator, strategy):
    params = augment.sample(strategy, 4, 8, generator=generator)
    identity = AugmentParams.identity(4)
    assert all(torch.equal(a, b) for a, b in zip(vars(params).values(), vars(identity).values(), strict=True))


def test_bad_input_is_named(generator):
    x, params = torch.zeros(2, 1, 8, 8), AugmentParams.identity(2)
    with pytest.raises(ValueError, match="unknown part 'shear'"):
        augment.sample("color_shear", 2, 8, generator=generator)
    with pytest.raises(ValueError, match="mode is 'both'"):
        augment.sample("color", 2, 8, generator=generator, mode="both")
    with pytest.raises(ValueError, match=r"images is \[1, 8, 8\]"):
        augment.apply(x[0], params)
    with pytest.raises(ValueError, match="torch.uint8, expected floating"):
        augment.apply(x.byte(), params)
    with pytest.raises(ValueError, match=r"params.flip is \[3\], expected \[2\]"):
        augment.apply(x, params_with(2, flip=torch.zeros(3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="params.degrees is on meta"):
        augment.apply(x, params_with(2, degrees=torch.zeros(2, device="meta")))
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        augment.apply(x, params, backend="gpu")


def test_fused_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(extension, "_C", None)
    with pytest.raises(RuntimeError, match="not built"):
        augment.apply(torch.zeros(1, 1, 8, 8), AugmentParams.identity(1), backend="fused")
    augment.apply(torch.zeros(1, 1, 8, 8), AugmentParams.identity(1))
