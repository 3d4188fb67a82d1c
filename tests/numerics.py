"""How results are compared, at what precision, and what must not change them: unset memory, threads."""

import pytest
import torch

# Of augmented images and their gradients. In half precision one rounding may come out differently.
IMAGE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4, floor: float = 0.0) -> None:
    """Assert a relative error in the largest norm of at most `tolerance`.

    It is relative to the largest expected number and `floor`, which is as large as terms that may cancel.
    """
    assert actual.shape == expected.shape
    if expected.numel():
        scale = (expected.double().abs().max() + floor).clamp_min(1e-12)
        error = (actual.double() - expected.double()).abs().max() / scale
        assert error <= tolerance, f"relative error {error:.2e}"


def close_images(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that augmented images, or gradients by them, are equal up to the roundings of their dtype."""
    tolerance = IMAGE_TOLERANCE[expected.dtype]
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance * scale, rtol=tolerance)


@pytest.fixture(autouse=True)  # in the files that name it
def exact(monkeypatch):
    """float32 products of convolutions are in float32, also on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)  # in the files that name it
def poisoned(monkeypatch):
    """Uninitialised memory is NaN: a value that is read without having been written shows.

    Returns shape and dtype of whatever was made so.
    """
    empty, new_empty, made = torch.empty, torch.Tensor.new_empty, []

    @torch.no_grad()  # torch's own checkpoints make leaves this way
    def poison(value):
        made.append((tuple(value.shape), value.dtype))
        return value.fill_(float("nan")) if value.is_floating_point() else value.fill_(-(1 << 20))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    return made


def same_on_any_threads(function) -> None:
    """Assert that the tensors `function` returns are the same to the bit on one, two and three threads."""
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(function())
    finally:
        torch.set_num_threads(before)
    for tensors in zip(*found, strict=True):
        assert all(torch.equal(tensors[0], other) for other in tensors[1:])
