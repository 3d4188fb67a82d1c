"""The compiled operators under AddressSanitizer (`make asan`): hostile parameters, sizes of every kind."""

import importlib.util
import random
import sys

import torch

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
assert spec is not None
assert spec.loader is not None
spec.loader.exec_module(importlib.util.module_from_spec(spec))

CALLS = 1500
SIZES = 150
FLOATS = [0.0, 1.0, -1.0, 0.7, 1e-38, 1e38, -1e38, 45.0, 1e9]
INTEGERS = [0, 1, -1, 7, 2**31, -(2**31), 2**62, -(2**63), 2**63 - 1]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8]


def draw(rows: int, values: list, dtype: torch.dtype, *rest: int) -> torch.Tensor:
    count = rows * (rest[0] if rest else 1)
    return torch.tensor([random.choice(values) for _ in range(count)], dtype=dtype).reshape(rows, *rest)


def augmentation() -> int:
    """Returns how many calls were refused."""
    refused = 0
    for _ in range(CALLS):
        rows, batch = random.randint(1, 4), random.randint(0, 4)
        floats = [*FLOATS, *random.choice([[], [], [float("nan"), float("inf")]])]
        wide = random.choice([torch.float32, torch.float64])
        params = [draw(rows, floats, wide) for _ in range(3)]
        params += [draw(rows, INTEGERS, torch.int64) for _ in range(2)]
        params += [draw(rows, INTEGERS, torch.int64, 4), draw(rows, [0, 1], torch.bool)]
        params += [draw(rows, floats, wide) for _ in range(3)]
        if random.random() < 0.2:  # as they are drawn together
            params = [draw(rows, floats, torch.float32, 13)]
        index = torch.randint(-1 if random.random() < 0.1 else 0, rows, (batch,))
        dtype = random.choice(DTYPES)
        shape = (batch, random.choice([1, 3, 5]), random.randint(1, 19), random.randint(1, 19))
        images = torch.randint(0, 256, shape).to(dtype)
        if random.random() < 0.5:
            images = images.to(memory_format=torch.channels_last)
        if random.random() < 0.2:  # neighbours that do not lie side by side
            images = images.repeat_interleave(2, 3)[..., 1::2]
        normal = [torch.rand(shape[1]) for _ in range(2)] if random.random() < 0.3 else [None, None]
        adjoint = dtype != torch.uint8 and random.random() < 0.5
        try:
            torch.ops.mim4dd.augment(images, params, index, *normal, random.random() < 0.5, adjoint)
        except ValueError:
            refused += 1
    return refused


def drawing() -> None:
    """Uniform numbers at their ends as well, and more rows that share a part than there are."""
    uniform = draw(12, [0.0, 0.5, 1 - 2.0**-24], torch.float32, rows := random.randint(0, 9))
    table = torch.randint(-40, 40, (11, 6)).float()
    torch.ops.mim4dd.draw(uniform, table, random.randint(1, 11), random.choice([0, 1, rows, 100]))


def layers(padding: int, relu: bool, pool: int) -> None:
    """The convolutions and normalisations of a network's blocks, with their first and second derivatives."""
    batch, few, channels, out = random.randint(1, 3), random.randint(1, 4), 32, random.choice([32, 64, 96])
    height, width = random.randint(3, 19), random.randint(10, 19)
    op = torch.ops.mim4dd

    x, weight, grad_y = (
        torch.randn(*size)
        for size in ((batch, channels, height, width), (out, channels, 3, 3), (batch, out, height, width))
    )
    op.winograd(x, weight, False)
    op.winograd(grad_y, weight, True)
    op.winograd_grad_weight(grad_y, x)

    scale, bias = torch.randn(2, out)
    y, *moments = op.instance_norm(grad_y, scale, bias, 1e-5, relu, pool)
    grads = op.instance_norm_backward(torch.randn_like(y), grad_y, scale, bias, *moments, relu, pool)
    op.instance_norm_backward_twice(*grads, torch.randn_like(y), grad_y, scale, bias, *moments, relu, pool)

    images = torch.randn(batch, few, height, width).to(random.choice([torch.float32, torch.bfloat16]))
    inputs = images, torch.randn(9 * few, out), scale, bias
    y, *moments = op.first_block(*inputs, 1e-5, padding, relu, pool)
    for wanted in ((True, True), (True, False), (False, True)):
        op.first_block_backward(torch.randn_like(y), *inputs, *moments, padding, relu, pool, *wanted)
    grad_grads = [torch.randn_like(value) for value in inputs]
    op.first_block_backward_twice(*grad_grads, torch.randn_like(y), *inputs, *moments, padding, relu, pool)


def main() -> None:
    random.seed(0)
    torch.manual_seed(0)
    refused = augmentation()
    for _ in range(SIZES):
        drawing()
        layers(random.randint(0, 3), random.random() < 0.5, random.randint(1, 2))
    sys.stdout.write(
        f"{CALLS} hostile calls survived, {refused} of them refused, and draws and layers of {SIZES} sizes\n"
    )


main()
