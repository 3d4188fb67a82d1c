"""Problems for the fused kernels, and the plain formula in float64 to check them by."""

import pytest
import torch
from conftest import FORMS
from mim4dd.kernels import narrow, sides
from numerics import close

from mim4dd import kernels
from mim4dd.losses import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE_OF_EACH = FORMS[1], FORMS[2], FORMS[5]
# Relative errors by dtype; half precision against the formula on the same rounded features.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(params=["skinny", "narrow", "wide"])
def path(request, monkeypatch):
    """Send calls of the fused losses, of any size, through one path, in blocks of at most 64 x 64 pairs."""
    monkeypatch.setattr(kernels, "SKINNY_PAIRS", 1 << 62 if request.param == "skinny" else 0)
    monkeypatch.setattr(narrow, "WIDEST", 128 if request.param == "narrow" else 0)
    monkeypatch.setattr(sides, "BLOCK", 64)
    precision = torch.get_float32_matmul_precision()
    # "highest" float32 does not go through `narrow`; the interpreter's products are exact in either case.
    torch.set_float32_matmul_precision("high" if request.param == "narrow" and DEVICE == "cpu" else precision)
    yield request.param
    torch.set_float32_matmul_precision(precision)


def problem(m, n, widths, dtype=torch.float32, label_dtype=torch.int64, classes=3):
    g = torch.Generator().manual_seed(0)
    anchors = [torch.randn(m, width, generator=g).to(DEVICE, dtype) for width in widths]
    keys = [torch.randn(n, width, generator=g).to(DEVICE, dtype) for width in widths]
    labels = [torch.randint(classes, (size,), generator=g).to(DEVICE, label_dtype) for size in (m, n)]
    scales = torch.tensor([[0.3] * len(widths), [1.0 + i for i in range(len(widths))]], device=DEVICE)
    return scales, *labels, anchors, keys


def agree(actual, expected, tolerance):
    # Where the true gradient is 0, as with one feature or one pair, what is left is the rounding of terms
    # that cancel, which are as large as 1 / (temperature * norm).
    close(actual, expected, tolerance, floor=0.01 if expected.abs().max() > 1e-9 else 0.1)


def check(form, scales, anchor_labels, key_labels, anchors, keys, wanted=(True, True, True)):
    dtype, layers = anchors[0].dtype, len(anchors)
    losses, grad_scales, *grad_features = kernels.contrast(
        form, scales, anchor_labels, key_labels, anchors, keys, wanted
    )
    for i in range(layers):
        leaves = [value.detach().double().requires_grad_() for value in (scales[:, i], anchors[i], keys[i])]
        loss = reference.plain(form, leaves[0], anchor_labels, key_labels, *leaves[1:])
        expected = torch.autograd.grad(loss, leaves)
        agree(losses[i], loss.detach(), 2e-5)
        actual = (
            grad_scales[:, i] if wanted[0] else grad_scales,
            grad_features[i],
            grad_features[layers + i],
        )
        for value, wish, want in zip(actual, expected, wanted, strict=True):
            if want:
                agree(value, wish, TOLERANCE[dtype])
            else:
                assert value.numel() == 0
