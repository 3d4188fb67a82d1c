import collections
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close
from torch import nn

from mim4dd import networks
from mim4dd.errors import InputError
from mim4dd.networks import ConvNet
from mim4dd.networks.blocks import InstanceNorm
from mim4dd.seeding import generator


@pytest.mark.parametrize(("channels", "side", "parameters"), [(1, 28, 317_706), (3, 32, 320_010)])
def test_convnet_has_the_published_size(channels, side, parameters):
    network = ConvNet(channels, 10, image_size=(side, side))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.feature_sizes == (128 * 16 * 16, 128 * 8 * 8, 2048)


@pytest.mark.parametrize("shape", ["1x28x28", "3x32x32"])
def test_convnet_embeds_as_the_published_one(golden, shape):
    file = golden(f"objectives_{shape}")
    channels, height, width = (int(n) for n in shape.split("x"))
    network = ConvNet(channels, 10, width=16, image_size=(height, width))
    weights = [value for name, value in file.items() if name.startswith("w.")]
    with torch.no_grad():
        for parameter, weight in zip(network.parameters(), weights, strict=True):
            parameter.copy_(weight)
        close(network.embed(file["real"][0]), file["features.real0"])


@pytest.mark.parametrize("architecture", networks.ARCHITECTURES)
@pytest.mark.parametrize("size", [8, 28, 32, 128])
def test_every_network_takes_every_size(architecture, size):
    network = networks.create(architecture, 3, 7, (size, size), width=8)
    networks.initialise(network, generator(0, "test"))
    x = torch.randn(2, 3, size, size, generator=generator(0, "x"))
    maps = network.features(x)
    assert tuple(m[0].numel() for m in maps) == network.feature_sizes
    assert torch.equal(maps[-1].flatten(1), network.embed(x))
    torch.testing.assert_close(network(x), network.classifier(network.embed(x)))
    logits = network(x)
    assert logits.shape == (2, 7)
    assert (logits[0] - logits[1]).abs().max() > 1e-3, "two images must not look the same"


def test_maps_that_are_not_wanted_take_no_memory():
    network = ConvNet(1, 10, width=8)
    x = torch.randn(4, 1, 32, 32, generator=generator(0, "x"))
    with torch.no_grad():
        maps = network.features(x, (2,))
    assert [m.shape for m in maps] == [(4, 0, 16, 16), (4, 0, 8, 8), (4, 8, 4, 4)]
    assert [m.untyped_storage().nbytes() for m in maps] == [0, 0, 4 * 4 * 8 * 4 * 4]


@pytest.mark.parametrize("architecture", networks.ARCHITECTURES)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_size_is_a_side_or_any_pair(architecture, channels):
    def shapes(size):
        with torch.device("meta"):
            direct = networks.ARCHITECTURES[architecture](channels, 5, image_size=size)
        created = networks.create(architecture, channels, 5, size, device="meta")
        return [[tuple(p.shape) for p in n.parameters()] + [*n.feature_sizes] for n in (direct, created)]

    expected = shapes((28, 28))
    for size in (28, [28, 28], torch.Size((28, 28)), np.int64(28)):
        assert shapes(size) == expected


@pytest.mark.parametrize("size", [(28,), (28, 28, 1), 28.0, "28", None, (0, 28), -28])
def test_what_is_no_image_size_is_named(size):
    for make in networks.ARCHITECTURES.values():
        with pytest.raises(InputError, match=r"image_size is .*, expected \(height, width\) or one side"):
            make(1, 10, image_size=size)
    with pytest.raises(InputError, match="image_size is"):
        networks.create("convnet", 1, 10, size)


@pytest.mark.parametrize("architecture", ["convnet", "convnet-bn", "alexnet"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_images_of_another_size_are_named_where_the_classifier_cannot_take_them(architecture, device):
    network = networks.create(architecture, 3, 10, 32, width=8, device=device)
    x = torch.zeros(2, 3, 20, 24, device=device)
    with pytest.raises(
        InputError, match=r"images are \[2, 3, 20, 24\], expected \[batch, channels, 32, 32\]"
    ):
        network(x)
    assert network.embed(x).shape[0] == 2, "features are of images of any size"


def test_an_mlp_names_images_of_another_size_also_for_its_features():
    network = networks.mlp(3, 10, 32)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    for look in (network, network.features, network.embed):
        with pytest.raises(InputError, match=r"images are \[2, 3, 20, 24\], expected \[batch, 3, 32, 32\]"):
            look(torch.zeros(2, 3, 20, 24))


def test_networks_pooled_to_one_size_take_images_of_any():
    network = networks.create("resnet18", 3, 10, 32, device="meta")
    assert network(torch.zeros(2, 3, 20, 24, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("architecture", ["convnet", "convnet-bn", "lenet", "resnet18"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_can_be_converted(architecture, dtype):
    network = networks.create(architecture, 3, 5, 8, width=8)
    networks.initialise(network, generator(0, "test"))
    x = torch.randn(2, 3, 8, 8, generator=generator(0, "x"))
    expected = network(x)
    network.to(dtype)
    logits = network(x.to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05)
    logits.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in network.parameters())


def test_a_stack_of_converted_networks_runs():
    network = ConvNet(3, 5, width=8, image_size=16).to(torch.bfloat16)
    stacked = {name: torch.stack([p.detach()] * 2) for name, p in network.named_parameters()}
    x = torch.randn(2, 3, 16, 16, generator=generator(0, "x")).to(torch.bfloat16)
    logits = torch.func.vmap(lambda weights: torch.func.functional_call(network, weights, (x,)))(stacked)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, network(x).expand(2, -1, -1), rtol=0.02, atol=0.02)


def test_autocast_decides_what_the_classifier_computes_in():
    network = ConvNet(3, 5, width=8, image_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.zeros(2, 3, 16, 16))
    assert logits.dtype == torch.bfloat16


def test_the_classifier_can_be_replaced():
    network = ConvNet(3, 5, width=8, image_size=16)
    x = torch.randn(2, 3, 24, 16, generator=generator(0, "x"))
    network.classifier = torch.nn.Identity()
    assert torch.equal(network(x), network.embed(x))
    network.classifier = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(8 * 3 * 2, 7))
    assert network.bfloat16()(x.bfloat16()).shape == (2, 7)


def test_depth_follows_the_size():
    depths = {side: networks.depth_for((side, side)) for side in (8, 16, 28, 32, 64, 128)}
    assert depths == {8: 2, 16: 3, 28: 3, 32: 3, 64: 4, 128: 5}


@pytest.mark.parametrize("architecture", networks.ARCHITECTURES)
def test_initialisation_is_pytorchs_and_draws_from_the_generator_only(architecture):
    network = networks.create(architecture, 1, 10, (32, 32), width=64)
    state = torch.random.get_rng_state()
    networks.initialise(network, generator(3, "test"))
    assert torch.equal(torch.random.get_rng_state(), state)
    first = [p.clone() for p in network.parameters()]
    networks.initialise(network, generator(3, "test"))
    assert all(torch.equal(a, b) for a, b in zip(first, network.parameters(), strict=True))
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if module.weight.numel() > 5000:
            theirs = type(module)(
                *(
                    (module.in_channels, module.out_channels, module.kernel_size)
                    if isinstance(module, nn.Conv2d)
                    else (module.in_features, module.out_features)
                )
            ).weight
            assert module.weight.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
            assert module.weight.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)
        if module.bias is not None and len(module.bias) >= 64:
            bound = module.weight[0].numel() ** -0.5
            assert 0.8 * bound < -module.bias.min() <= bound
            assert 0.8 * bound < module.bias.max() <= bound


@pytest.mark.parametrize("size", [1, 4, 16, 32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fast_instance_norm_is_group_norm(size, memory_format):
    norm = InstanceNorm(6)
    torch.nn.init.uniform_(norm.weight, generator=generator(0, "w"))
    torch.nn.init.uniform_(norm.bias, generator=generator(0, "b"))
    x = torch.randn(3, 6, size, size, generator=generator(0, "x"), dtype=torch.float64)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    norm = norm.double()
    upstream = torch.randn(x.shape, generator=generator(0, "g"), dtype=torch.float64)
    expected = torch.nn.functional.group_norm(x, 6, norm.weight, norm.bias)
    wanted = torch.autograd.grad(expected, [x, norm.weight, norm.bias], upstream)
    actual = norm(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, [x, norm.weight, norm.bias], upstream), wanted)


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"unknown norm 'instanc', did you mean instance"):
        ConvNet(1, 10, norm="instanc")
    with pytest.raises(InputError, match="4 blocks halve 8x8 to nothing"):
        ConvNet(1, 10, depth=4, image_size=(8, 8))
    with pytest.raises(InputError, match=r"unknown architecture 'vgg', did you mean vgg11"):
        networks.create("vgg", 1, 10, (32, 32))
    with pytest.raises(InputError, match=r"unknown precision 'fp8'"):
        networks.create("convnet", 1, 10, (32, 32), precision="fp8")
    with pytest.raises(InputError, match="width is 0, expected a whole number of at least 1"):
        networks.create("convnet", 1, 10, (32, 32), width=0)
    with pytest.raises(InputError, match="channels is '3', expected a whole number"):
        networks.create("lenet", "3", 10, (32, 32))
    for make in networks.ARCHITECTURES.values():
        with pytest.raises(InputError, match="channels is '3', expected a whole number"):
            make("3", 10, image_size=32)
        with pytest.raises(InputError, match="num_classes is 0, expected a whole number of at least 1"):
            make(3, 0, image_size=32)
    counts = {"channels": 3, "num_classes": 10, "width": 8, "depth": 3}
    for name, value in [("channels", "3"), ("num_classes", 0), ("width", 0), ("width", 8.0), ("depth", 0)]:
        with pytest.raises(InputError, match=f"{name} is {value!r}, expected a whole number of at least 1"):
            ConvNet(**counts | {name: value})
    with pytest.raises(TypeError, match="no initialisation is known for Bilinear"):
        networks.initialise(torch.nn.Bilinear(1, 1, 1), generator(0, "test"))


PUBLISHED = {  # for 3x32x32: weights, features of each block, convolutions, linear layers, ReLUs, poolings
    "mlp": (411_146, (128, 128), 0, 3, 2, {}),
    "lenet": (62_006, (1536, 400, 120, 84), 2, 3, 4, {"MaxPool2d": 1, "AdaptiveMaxPool2d": 1}),
    "alexnet": (1_872_202, (32768, 12288, 16384, 12288, 3072), 5, 1, 5, {"MaxPool2d": 3}),
    "vgg11": (
        9_231_114,
        (16384, 8192, 16384, 4096, 8192, 2048, 2048, 512),
        *(8, 1, 8, {"MaxPool2d": 4, "AdaptiveMaxPool2d": 1}),
    ),
    "resnet18": (
        11_173_962,
        (65536, 65536, 32768, 16384, 8192, 512),
        *(20, 1, 9, {"AdaptiveAvgPool2d": 1}),  # and eight ReLUs after the sums
    ),
}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_other_architectures_are_the_published_ones(architecture):
    weights, features, convolutions, linear, relus, poolings = PUBLISHED[architecture]
    network = networks.create(architecture, 3, 10, (32, 32))
    assert sum(p.numel() for p in network.parameters()) == weights
    assert network.feature_sizes == features
    kinds = collections.Counter(type(module).__name__ for module in network.modules())
    kinds["Linear"] += kinds["Classifier"]
    assert (kinds["Conv2d"], kinds["Linear"], kinds["ReLU"]) == (convolutions, linear, relus)
    assert {kind: count for kind, count in kinds.items() if "Pool" in kind} == poolings
    networks.initialise(network, generator(0, "w"))
    maps = network.features(torch.randn(2, 3, 32, 32, generator=generator(0, "x")))
    assert all((m >= 0).all() for m in maps), "rectified"


def test_small_images_keep_maps_that_can_be_normalised():
    sizes = {name: networks.create(name, 3, 10, (8, 8)).feature_sizes for name in ("vgg11", "resnet18")}
    assert sizes["vgg11"] == (1024, 512, 1024, 1024, 2048, 2048, 2048, 512)  # 2x2 from the second block on
    assert sizes["resnet18"] == (4096, 4096, 2048, 1024, 2048, 512)


NORMS = {
    "instance": F.instance_norm,
    "group": lambda y: F.group_norm(y, 4),
    "layer": lambda y: F.layer_norm(y, y.shape[1:]),
    "batch": lambda y: F.batch_norm(y, None, None, training=True),
    "none": lambda y: y,
}
ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.01),
    "sigmoid": torch.sigmoid,
}
POOLINGS = {
    "avg": partial(F.avg_pool2d, kernel_size=2),
    "max": partial(F.max_pool2d, kernel_size=2),
    "none": lambda y: y,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_convnet_variants_are_what_they_are_called_and_train(norm, activation, pooling):
    options = {"norm": norm, "activation": activation, "pooling": pooling}
    network = ConvNet(3, 5, width=8, depth=2, image_size=(12, 12), **options)
    networks.initialise(network, generator(0, "w"))
    x = y = torch.randn(4, 3, 12, 12, generator=generator(0, "x"), requires_grad=True)
    for k in range(2):
        convolution = next(m for m in network.blocks[k].modules() if isinstance(m, nn.Conv2d))
        y = F.conv2d(y, convolution.weight, convolution.bias, padding=1)
        y = POOLINGS[pooling](ACTIVATIONS[activation](NORMS[norm](y)))
        close(network.features(x)[k], y)
    network(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_only_grey_images_of_28_pixels_are_padded():
    assert ConvNet(3, 10, width=4, image_size=(28, 28)).feature_sizes == (4 * 14 * 14, 4 * 7 * 7, 4 * 3 * 3)


def test_as_deep_as_the_image_can_be_halved():
    assert ConvNet(1, 10, width=4, depth=3, image_size=8).feature_sizes == (64, 16, 4)
