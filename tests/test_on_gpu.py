"""The layers as a GPU has them: put together from kernels and convolutions, alone and under vmap.

Without a GPU what is put together runs on the CPU, its kernels in Triton's interpreter.
"""

import numerics
import pytest
import torch
import torch.nn.functional as F
from numerics import close
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from mim4dd import extension, networks
from mim4dd.networks import batching, convolution
from mim4dd.networks.blocks import Classifier
from mim4dd.networks.convolution import conv2d
from mim4dd.networks.first_block import first_block
from mim4dd.networks.normalisation import instance_norm, reference

pytest.importorskip("triton")

from mim4dd.kernels import first_block as first_block_kernels

from mim4dd.networks import by_torch, on_gpu

pytestmark = pytest.mark.skipif(not extension.available(), reason="the extension is not built")

exact = numerics.exact  # a fixture
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def random(*sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g).to(DEVICE) for size in sizes]


def agree(actual, expected, tolerance=1e-4):
    close(actual, expected, tolerance, floor=1e-6 / tolerance)


@pytest.mark.parametrize("size", [(5, 7), (9, 8)], ids=str)  # the kernel, and the library
@pytest.mark.parametrize("groups", [1, 3])
def test_convolutions_by_groups(groups, size):
    x, grad_y, weight = random((2, 4 * groups, *size), (2, 8 * groups, *size), (8 * groups, 4, 3, 3))
    x.requires_grad_()
    weight.requires_grad_()
    y = F.conv2d(x, weight, padding=1, groups=groups)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad_y)
    agree(by_torch.convolve(x, weight, False, groups), y)
    agree(by_torch.convolve(grad_y, weight, True, groups), grad_x)
    for dtype in (torch.float32, torch.float64):  # the kernel has no float64
        found = on_gpu._convolve_grad_weight(grad_y.to(dtype), x.to(dtype), groups)
        assert found.dtype == dtype
        agree(found, grad_weight)
    x, weight, grad_y = (t.to("meta") for t in (x, weight, grad_y))
    assert torch.ops.mim4dd.convolve(x, weight, False, groups).shape == grad_y.shape
    assert torch.ops.mim4dd.convolve(grad_y, weight, True, groups).shape == x.shape
    assert torch.ops.mim4dd.convolve_grad_weight(grad_y, x, groups).shape == weight.shape


@pytest.mark.parametrize(
    ("size", "groups", "taken"), [((8, 8), 3, True), ((5, 13), 3, False), ((8, 8), 1, False)], ids=str
)
def test_the_kernel_takes_groups_of_small_maps(size, groups, taken):
    x, grad_y = random((2, 4 * groups, *size), (2, 8 * groups, *size))
    with Operators() as operators:
        on_gpu._convolve_grad_weight(grad_y, x, groups)
    assert ("convolution_backward" in [name for name, *_ in operators.called]) is not taken


class Operators(TorchDispatchMode):
    """Notes the operators that write, as (name, tensors given, tensor made)."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.called.append((func.overloadpacket.__name__, args, result))
        return result


@pytest.mark.parametrize("groups", [1, 3])
def test_a_weight_is_turned_by_one_launch(groups):
    (weight,) = random((8 * groups, 4, 3, 3))
    weight = weight.to(memory_format=torch.channels_last)
    with Operators() as operators:
        turned = by_torch.turned_round(weight, groups)
    assert [name for name, *_ in operators.called] == ["stack"]
    assert turned.is_contiguous(memory_format=torch.channels_last)
    own = [part.transpose(0, 1).flip(2, 3) for part in weight.chunk(groups)]
    assert torch.equal(turned, torch.cat(own))


def test_gradients_of_channels_are_made_whole_by_one_copy():
    """Of their gradients, which are the same for all images."""
    x, scale, bias, grad_grad = random((2, 8, 4, 4), (8,), (8,), (8,))
    leaves = [t.requires_grad_() for t in (x, scale, bias)]
    first = torch.autograd.grad(instance_norm(*leaves, EPS).square().sum(), leaves, create_graph=True)
    with Operators() as operators:
        torch.autograd.grad(first[1:], leaves, [grad_grad, grad_grad], allow_unused=True)
    (given,) = (given for name, given, _ in operators.called if name == "instance_norm_backward_twice")
    copies = [made for name, _, made in operators.called if name in ("stack", "clone")]
    assert given[1].data_ptr() == copies[0].data_ptr()
    assert given[2].data_ptr() == copies[0][1].data_ptr()


@pytest.mark.parametrize("groups", [1, 2])
def test_products_of_the_first_block_have_aligned_rows(groups):
    """Of multiples of 8 numbers, or in bfloat16 the library takes slow kernels."""
    x, taps, scale, bias, grad_y, grad_grad_taps = random(
        (2, groups, 8, 8), (9, 32 * groups), (32 * groups,), (32 * groups,), (2, 32 * groups, 4, 4),
        (32 * groups, 9),
    )  # fmt: skip
    x, grad_y = x.bfloat16(), grad_y.bfloat16()
    _, *moments = first_block_kernels.forward(x, taps, scale, bias, EPS, 1, True, 2)
    given = (grad_y, x, taps, scale, bias, *moments, 1, True, 2)
    with Operators() as operators:
        once = on_gpu._first_block_backward(*given, True, True)
        twice = on_gpu._first_block_backward_twice(x, grad_grad_taps.t(), scale, bias, *given)
    for maps, of_taps in (once[:2], twice[1:3]):
        assert (maps.dtype, of_taps.dtype) == (torch.bfloat16, torch.float32)
    products = [(*given, made) for name, given, made in operators.called if name == "bmm"]
    assert len(products) == 2 + 7
    for tensors in products:
        for strides in (sorted(tensor.stride()[1:]) for tensor in tensors):
            assert strides[0] == 1
            assert strides[1] % 8 == 0


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_the_first_block(groups, used):
    """Against those of the plain formula; every ReLU is open, for roundings may open one on one side only.

    Also where nobody used the gradient of the images.
    """
    batch, channels, out, padding = 2, 2, 32 * groups, 1
    x, weight, scale, bias, grad_y, grad_grad_x, grad_grad_weight, grad_grad_scale, grad_grad_bias = random(
        (batch, channels * groups, 6, 9),
        (out, channels, 3, 3),
        (out,),
        (out,),
        (batch, out, 3, 4),
        (batch, channels * groups, 6, 9),
        (out, channels, 3, 3),
        (out,),
        (out,),
    )
    bias += 30

    def taps(weight):
        return weight.flatten(1).t()

    leaves = [t.double().requires_grad_() for t in (grad_y, x, weight, scale, bias)]

    def plain(x, weight, scale, bias):
        convolved = F.conv2d(x, weight, padding=padding, groups=groups)
        return reference(convolved, scale, bias, EPS, True, 2)

    first = torch.autograd.grad(plain(*leaves[1:]), leaves[1:], leaves[0], create_graph=True)
    upstream = grad_grad_x * used, grad_grad_weight, grad_grad_scale, grad_grad_bias
    mixture = sum((one * other.double()).sum() for one, other in zip(first, upstream, strict=True))
    twice = torch.autograd.grad(mixture, leaves[:4])

    _, mean, rstd = first_block_kernels.forward(x, taps(weight), scale, bias, EPS, padding, True, 2)
    given = (grad_y, x, taps(weight), scale, bias, mean, rstd, padding, True, 2)
    grad_x, grad_taps, grad_scale, grad_bias = on_gpu._first_block_backward(*given, True, True)
    agree(grad_x, first[0])
    agree(grad_taps.sum(0), taps(first[1].flatten(1).unflatten(1, weight.shape[1:])))
    agree(grad_scale.sum(0), first[2])
    agree(grad_bias.sum(0), first[3])

    for want_x, want_taps in ((True, False), (False, True), (False, False)):
        some = on_gpu._first_block_backward(*given, want_x, want_taps)
        assert [part.numel() > 0 for part in some] == [want_x, want_taps, True, True]
        agree(some[2].sum(0), first[2])
        agree(some[3].sum(0), first[3])

    grad_grad_y, grad_x, grad_taps, grad_scale = on_gpu._first_block_backward_twice(
        grad_grad_x if used else grad_grad_x.new_empty(0),
        taps(grad_grad_weight),
        grad_grad_scale,
        grad_grad_bias,
        *given,
    )
    agree(grad_grad_y, twice[0])
    agree(grad_x, twice[1])
    agree(grad_taps.sum(0), taps(twice[2]))
    agree(grad_scale.sum(0), twice[3])


@pytest.mark.parametrize("own_weights", [False, True])
def test_layers_batched_by_vmap(own_weights):
    """A gradient of the weights for each of three batches, of one set of weights or of three."""
    sizes = (3, 2, 2, 12, 12), (3, 32, 2, 3, 3), (3, 32, 32, 3, 3), (3, 32), (3, 32)
    x, *weights = random(*sizes)
    weights[3] += 30  # every ReLU is open
    if not own_weights:
        weights = [w[0] for w in weights]

    def ours(x, taps, weight, scale, bias):
        y = first_block(x, taps, scale, bias, EPS, padding=1, relu=True, pool=2)
        y = conv2d(y, weight, (1, 1))
        return instance_norm(y, scale, bias, EPS, relu=True, pool=2).square().sum()

    def plain(x, taps, weight, scale, bias):
        y = reference(F.conv2d(x, taps, padding=1), scale, bias, EPS, True, 2)
        return reference(F.conv2d(y, weight, padding=1), scale, bias, EPS, True, 2).square().sum()

    of = (1, 2, 3, 4)
    dims = (0, *[0 if own_weights else None] * 4)
    found = vmap(grad(ours, of), dims)(x, *weights)
    for k in range(3):
        own = [w[k] if own_weights else w for w in weights]
        leaves = [t.double().requires_grad_() for t in own]
        expected = torch.autograd.grad(plain(x[k].double(), *leaves), leaves)
        for one, wanted in zip(found, expected, strict=True):
            agree(one[k], wanted, 1e-3)


@pytest.mark.parametrize("copied", [False, True])
def test_joined_channels_of_maps_come_last(copied):
    (maps,) = random((2, 15, 4, 6))
    if copied:
        maps = maps.unflatten(1, (3, 5)).transpose(0, 1).contiguous()  # one network's after the other's
        joined = batching.fold(maps, 0, 1, 3)
        maps = maps.transpose(0, 1).flatten(1, 2)
    else:
        maps = maps.contiguous(memory_format=torch.channels_last)
        joined = batching.fold(maps.unflatten(1, (3, 5)), 1, 1, 3)
        assert joined.data_ptr() == maps.data_ptr()
    assert joined.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(joined, maps)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_product_for_each_pixel_is_that_of_the_flattened_maps(stacked):
    """With first and second derivatives, and no sum over more than the channels."""
    classifier = Classifier(8 * 3 * 2, 5).double().to(DEVICE)
    maps, weight, bias = (t.double() for t in random((3, 4, 8, 3, 2), (3, 5, 48), (3, 5)))
    if not stacked:
        maps, weight, bias = maps[0], weight[0], bias[0]

    def by_pixels(maps, weight, bias):
        return functional_call(classifier, {"weight": weight, "bias": bias}, (maps,))

    def plain(maps, weight, bias):
        return F.linear(maps.flatten(1), weight, bias)

    def gradient(logits):
        def loss(*given):
            return logits(*given).exp().sum()

        return grad(lambda *given: sum(g.square().sum() for g in grad(loss, (0, 1, 2))(*given)), (0, 1, 2))

    for derivative in (lambda logits: logits, gradient):
        with Operators() as operators:
            found = (vmap if stacked else lambda call: call)(derivative(by_pixels))(maps, weight, bias)
        expected = (vmap if stacked else lambda call: call)(derivative(plain))(maps, weight, bias)
        torch.testing.assert_close(found, expected)
        products = [given for name, given, _ in operators.called if name == "bmm"]
        assert products
        assert all(first.shape[2] <= 8 for first, _ in products)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_classifier_sums_in_float32_pixel_by_pixel(precision, monkeypatch):
    network = networks.create("convnet", 1, 10, (8, 8), width=8, precision=precision, device=DEVICE)
    networks.initialise(network, torch.Generator(DEVICE).manual_seed(0))
    (images,) = random((4, 1, 8, 8))
    maps = network.features(images)[-1]
    expected = F.linear(maps.flatten(1), network.classifier.weight, network.classifier.bias)
    agree(network.classifier(maps), expected, 1e-6)
    monkeypatch.setattr(networks.Network, "classify", lambda self, last: self.classifier(last))
    assert torch.equal(network(images), network.classifier(maps)), "what it is given on a GPU"


def test_a_classifier_may_lack_a_bias_and_be_of_another_type_than_maps():
    classifier = Classifier(8 * 3 * 2, 5, bias=False).to(DEVICE)
    (maps,) = random((4, 8, 3, 2))
    expected = F.linear(maps.flatten(1), classifier.weight)
    agree(classifier(maps), expected, 1e-6)
    agree(classifier.bfloat16()(maps), expected, 0.03)


class Batch:
    """What a rule is told of the batch."""

    batch_size = 3


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (None, 2), (1, None)], ids=str)
def test_convolutions_of_a_batch_join_the_channels(dims, groups, turned, monkeypatch):
    """The rules of a GPU, with what it runs in place of the operators; groups are of a batch of batches."""
    monkeypatch.setattr(batching, "takes_groups", lambda device: True)
    monkeypatch.setattr(torch.ops.mim4dd, "convolve", by_torch.convolve)
    channels = 8 * groups if turned else 4 * groups
    x, weight = random((3, 2, channels, 5, 7), (3, 8 * groups, 4, 3, 3))
    x, weight = (t[0] if dim is None else t for t, dim in zip((x, weight), dims, strict=True))
    moved = [t if dim is None else t.movedim(0, dim) for t, dim in zip((x, weight), dims, strict=True)]
    out, axis = convolution._batched(Batch, (*dims, None, None), *moved, turned, groups)
    for k in range(3):
        own = [t if dim is None else t[k] for t, dim in zip((x, weight), dims, strict=True)]
        agree(out.select(axis, k), by_torch.convolve(*own, turned, groups))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_gradients_of_a_batch_of_weights_join_the_channels(dim, groups, monkeypatch):
    monkeypatch.setattr(batching, "takes_groups", lambda device: True)
    monkeypatch.setattr(torch.ops.mim4dd, "convolve_grad_weight", on_gpu._convolve_grad_weight)
    x, y = random((3, 2, 4 * groups, 5, 7), (3, 2, 8 * groups, 5, 7))
    moved = x[0] if dim is None else x.movedim(0, dim)
    found, axis = convolution._batched_grad_weight(Batch, (1, dim, None), y.movedim(0, 1), moved, groups)
    for k in range(3):
        own = x[0] if dim is None else x[k]
        agree(found.select(axis, k), on_gpu._convolve_grad_weight(y[k], own, groups))


@pytest.mark.parametrize("dims", [(0, 0), (1, 1), (None, 0), (0, None)], ids=str)
def test_first_blocks_of_a_batch_join_the_channels(dims, monkeypatch):
    monkeypatch.setattr(batching, "takes_groups", lambda device: True)
    x, taps, scale, bias, grad = random((3, 2, 2, 6, 8), (3, 18, 32), (32,), (3, 32), (3, 2, 32, 3, 4))
    x, taps = (t[0] if dim is None else t for t, dim in zip((x, taps), dims, strict=True))
    moved = [t if dim is None else t.movedim(0, dim) for t, dim in zip((x, taps), dims, strict=True)]
    block, kept = ("map", "taps", "channel", "channel"), ("value", "value")
    forward = batching.rule(first_block_kernels.forward, block, ("map", *kept), grouped=False)
    options = (1, True, 2)
    given_dims = (*dims, None, 0)
    outs, axes = forward(Batch, (*given_dims, *[None] * 4), *moved, scale, bias, EPS, *options)
    gradients = ("taps of images", *kept)
    backward = batching.rule(first_block_kernels.backward, ("map", *block, *kept), gradients, grouped=False)
    dims_of_all = (0, *given_dims, *axes[1:], *[None] * 3)
    grads, grad_axes = backward(Batch, dims_of_all, grad, *moved, scale, bias, *outs[1:], *options)
    for k in range(3):
        own = [t if dim is None else t[k] for t, dim in zip((x, taps), dims, strict=True)]
        expected = first_block_kernels.forward(*own, scale, bias[k], EPS, *options)
        for out, axis, wanted in zip(outs, axes, expected, strict=True):
            agree(out.select(axis, k), wanted)
        expected = first_block_kernels.backward(grad[k], *own, scale, bias[k], *expected[1:], *options)
        for grad_found, axis, wanted in zip(grads, grad_axes, expected, strict=True):
            agree(grad_found.select(axis, k), wanted)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 28), (3, 32)], ids=str)
def test_a_network_and_its_gradients_are_those_on_the_cpu(shape, precision):
    """Logits, gradients of weights and images, and the gradient of a gradient, as trajectories need it."""
    channels, side = shape
    network = networks.create("convnet", channels, 10, (side, side), width=64)
    networks.initialise(network, torch.Generator().manual_seed(0))
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.constant_(module.bias, 6.0)  # every ReLU is open
    images = torch.randn(6, channels, side, side, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6)

    def derivatives(device, dtype, precision):
        options = {"width": 64, "device": device, "precision": precision}
        moved = networks.create("convnet", channels, 10, (side, side), **options)
        moved.load_state_dict(network.state_dict())
        moved = moved.to(dtype)
        x = images.to(device, dtype).requires_grad_()
        loss = F.cross_entropy(moved(x), labels.to(device))
        grad_weights = torch.autograd.grad(loss, [*moved.parameters()], create_graph=True)
        (grad_images,) = torch.autograd.grad(loss, x, retain_graph=True)
        product = sum((g * g.detach()).sum() for g in grad_weights)
        second = torch.autograd.grad(product, [x, *moved.parameters()][:-1])
        return [loss, grad_images, *grad_weights, *second]

    found = derivatives(DEVICE, torch.float32, precision)
    expected = derivatives("cpu", torch.float64, "fp32")
    tolerance = 1e-3 if precision == "fp32" else 0.1
    for one, wanted in zip(found, expected, strict=True):
        if wanted.abs().max() > 1e-9:  # the convolutions' biases have none
            agree(one.cpu(), wanted, tolerance)


@needs_gpu
def test_a_stack_has_the_gradients_of_its_networks_in_float32():
    network = networks.create("convnet", 1, 10, (28, 28), width=64, device=DEVICE)
    stacked = {name: torch.randn(3, *p.shape, device=DEVICE) / 10 for name, p in network.named_parameters()}
    for name, value in stacked.items():
        if name.endswith("1.bias"):
            value += 6
    (images,) = random((3, 5, 1, 28, 28))
    labels = torch.arange(5, device=DEVICE)

    def loss(weights, images):
        return F.cross_entropy(functional_call(network, weights, (images,)), labels)

    together = vmap(grad(loss))(stacked, images)
    for k in range(3):
        alone = grad(loss)({name: value[k] for name, value in stacked.items()}, images[k])
        for name, expected in alone.items():
            agree(together[name][k], expected, 1e-3)
