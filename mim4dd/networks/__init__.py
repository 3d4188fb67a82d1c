"""Networks whose feature maps are matched: the ConvNet of the field and the cross-architecture set.

Each is a row of blocks and a linear classifier. `features(x)` gives every block's output, `embed(x)` the last
one flattened, `forward(x)` the class logits.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from ..errors import InputError, unknown
from .blocks import InstanceNorm, OnePassBlock, Residual
from .precision import autocast

Size = tuple[int, int]
ImageSize = int | Sequence[int]  # a side, or height and width

# Images per forward pass without gradients: on CPU what keeps a map in the cache (twice as fast as 640).
CHUNK = {"cpu": 32, "cuda": 1024}


def size_of(image_size: object) -> Size:
    """Return the height and width that one side, or any sequence of the two, stands for.

    Raises:
        InputError: it is neither.
    """
    match [image_size] * 2 if isinstance(image_size, Integral) else image_size:
        case [Integral() as height, Integral() as width] if min(int(height), int(width)) > 0:
            return int(height), int(width)
    raise InputError(f"image_size is {image_size!r}, expected (height, width) or one side, in pixels")


class Network(nn.Module):
    """Blocks in a row and a linear classifier on the last block's flattened output.

    Args:
        blocks: modules; each maps the output of the one before.
        channels: channels of the images.
        num_classes: outputs of the classifier.
        image_size: (height, width) of the images, or one side.

    Attributes:
        feature_sizes: numbers of features an image has after each block.
        batch_normalised: whether in training mode an image's features depend on the others in its batch.
        precision: what the blocks compute in, see `mim4dd.networks.precision`; what they return is float32
            at least.
    """

    precision = "fp32"

    def __init__(
        self, blocks: Sequence[nn.Module], channels: int, num_classes: int, image_size: ImageSize
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        shapes = copy.deepcopy(self.blocks).to("meta")
        x = torch.empty(2, channels, *size_of(image_size), device="meta")
        self.feature_sizes = tuple((x := block(x))[0].numel() for block in shapes)
        self.classifier = nn.Linear(self.feature_sizes[-1], num_classes)
        self.batch_normalised = any(isinstance(m, nn.BatchNorm2d) for m in self.blocks.modules())

    def features(self, x: Tensor, layers: Collection[int] | None = None) -> list[Tensor]:
        """Return the output of every block, first to last, for images x [B, C, H, W].

        Of the blocks that are not in `layers`, if given, it is empty.
        """
        maps = []
        with autocast(self.precision, x.device):
            for k, block in enumerate(self.blocks):
                x = block(x)
                wanted = x if layers is None or k in layers else nothing_of(x)
                maps.append(wanted.to(torch.promote_types(x.dtype, torch.float32)))
        return maps

    def embed(self, x: Tensor) -> Tensor:
        """Return the last block's output, flattened to [B, D]."""
        return self.features(x, (len(self.blocks) - 1,))[-1].flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class logits [B, num_classes]."""
        return self.classifier(self.embed(x))


def nothing_of(x: Tensor) -> Tensor:
    """Return an empty map [B, 0, ...] in place of x [B, C, ...]."""
    return x[:, :0].clone()  # a view would keep all of x in memory


class ConvNet(Network):
    """The field's ConvNet: depth x (convolution 3x3, normalisation, activation, pooling by 2), linear.

    One-channel 28x28 images are padded to 32x32 by the first convolution. With the defaults it has 317,706
    parameters for 1x28x28 and 320,010 for 3x32x32 (10 classes), and 2,048 last features.

    Args:
        channels: channels of the images.
        num_classes: outputs of the classifier.
        width: channels of every block.
        depth: number of blocks; each halves the map when it pools.
        norm: "instance", "group" (4 groups), "layer", "batch" or "none".
        activation: "relu", "leaky_relu" or "sigmoid".
        pooling: "avg", "max" or "none".
        image_size: (height, width) of the images, or one side.

    Raises:
        InputError: an unknown name, no image size, or more blocks than the image can be halved.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        width: int = 128,
        depth: int = 3,
        norm: str = "instance",
        activation: str = "relu",
        pooling: str = "avg",
        image_size: ImageSize = (32, 32),
    ) -> None:
        make_activation = _pick("activation", activation, _ACTIVATIONS)
        make_pooling = _pick("pooling", pooling, _POOLINGS)
        make_norm = _pick("norm", norm, _NORMS)
        image_size = size_of(image_size)
        padded = channels == 1 and image_size == (28, 28)
        height, width_px = (32, 32) if padded else image_size
        if pooling != "none" and min(height, width_px) >> depth == 0:
            raise InputError(
                f"ConvNet: {depth} blocks halve {height}x{width_px} to nothing; use a smaller depth"
            )
        blocks: list[nn.Module] = []
        for k in range(depth):
            shrink = k if pooling != "none" else 0
            convolution = nn.Conv2d(
                channels if k == 0 else width, width, 3, padding=3 if padded and k == 0 else 1
            )
            if (norm, activation, pooling) == ("instance", "relu", "avg"):
                blocks.append(OnePassBlock(convolution, InstanceNorm(width, relu=True, pool=2)))
            else:
                size = (height >> shrink, width_px >> shrink)
                blocks.append(
                    nn.Sequential(convolution, make_norm(width, size), make_activation(), make_pooling())
                )
        super().__init__(blocks, channels, num_classes, image_size)


def mlp(channels: int, num_classes: int, image_size: ImageSize) -> Network:
    """Two hidden layers of 128."""
    pixels = channels * math.prod(size_of(image_size))
    blocks = [
        nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 128), nn.ReLU()),
    ]
    return Network(blocks, channels, num_classes, image_size)


def lenet(channels: int, num_classes: int, image_size: ImageSize) -> Network:
    """LeNet-5 with ReLU and max pooling; the 5x5 map before the linear layers holds for any image size."""
    blocks = [
        nn.Sequential(nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.AdaptiveMaxPool2d(5)),
        nn.Sequential(nn.Flatten(), nn.Linear(400, 120), nn.ReLU()),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
    ]
    return Network(blocks, channels, num_classes, image_size)


def alexnet(channels: int, num_classes: int, image_size: ImageSize) -> Network:
    """AlexNet in its small-image form: five convolutions, three poolings."""
    blocks = [
        nn.Sequential(nn.Conv2d(channels, 128, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(128, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(192, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 192, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(192, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    ]
    return Network(blocks, channels, num_classes, image_size)


def vgg11(channels: int, num_classes: int, image_size: ImageSize) -> Network:
    """VGG-11 with instance normalisation, pooled to 1x1 at the end."""
    widths = (64, 128, 256, 256, 512, 512, 512, 512)
    pooled = (True, True, False, True, False, True, False, False)
    blocks = []
    side = min(size_of(image_size))
    for k, (wide, pool) in enumerate(zip(widths, pooled, strict=True)):
        convolution = nn.Conv2d(widths[k - 1] if k else channels, wide, 3, padding=1)
        layers = [convolution, InstanceNorm(wide), nn.ReLU()]
        if pool and side >= 4:  # a 1x1 map would leave instance normalisation nothing to normalise
            layers.append(nn.MaxPool2d(2))
            side //= 2
        blocks.append(nn.Sequential(*layers))
    blocks[-1].append(nn.AdaptiveMaxPool2d(1))
    return Network(blocks, channels, num_classes, image_size)


def resnet18(channels: int, num_classes: int, image_size: ImageSize) -> Network:
    """ResNet-18 for small images (3x3 stem, no first pooling) with instance normalisation."""
    blocks: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1, bias=False), InstanceNorm(64), nn.ReLU())
    ]
    side, before = min(size_of(image_size)), 64
    for wide, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        if side < 4:
            stride = 1  # as in vgg11: no 1x1 maps
        blocks.append(nn.Sequential(Residual(before, wide, stride), Residual(wide, wide, 1)))
        side, before = -(-side // stride), wide
    blocks.append(nn.AdaptiveAvgPool2d(1))
    return Network(blocks, channels, num_classes, image_size)


_NORMS: dict[str, Callable[[int, Size], nn.Module]] = {
    "instance": lambda channels, _: InstanceNorm(channels),
    "group": lambda channels, _: nn.GroupNorm(4, channels),
    "layer": lambda channels, size: nn.LayerNorm((channels, *size)),
    "batch": lambda channels, _: nn.BatchNorm2d(channels),
    "none": lambda *_: nn.Identity(),
}
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
    "sigmoid": nn.Sigmoid,
}
_POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "avg": lambda: nn.AvgPool2d(2),
    "max": lambda: nn.MaxPool2d(2),
    "none": nn.Identity,
}
ARCHITECTURES: dict[str, Callable[..., Network]] = {
    "convnet": ConvNet,
    "convnet-bn": functools.partial(ConvNet, norm="batch"),
    "mlp": mlp,
    "lenet": lenet,
    "alexnet": alexnet,
    "vgg11": vgg11,
    "resnet18": resnet18,
}


def _pick(kind: str, name: str, table: dict[str, Callable]) -> Callable:
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]


def depth_for(image_size: ImageSize) -> int:
    """Return the ConvNet depth the field uses at a size: 2 at 8x8, 3 from 16 to 63, 4 at 64, 5 at 128."""
    halvings = min(size_of(image_size)).bit_length() - 1
    return max(halvings - 2, min(halvings - 1, 3))


def create(
    architecture: str,
    channels: int,
    num_classes: int,
    image_size: ImageSize,
    *,
    width: int = 128,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Network:
    """Build a network with its weights left unset: no random number is drawn. See `initialise`.

    Args:
        architecture: one of `ARCHITECTURES`; the ConvNet's depth follows the image size (`depth_for`).
        channels: channels of the images.
        num_classes: outputs of the classifier.
        image_size: (height, width) of the images, or one side; at least 8.
        width: channels of the ConvNet's blocks; the others have one width.
        device: where its weights are to live.
        precision: what its blocks compute in: "fp32", "tf32" or "bf16".

    Raises:
        InputError: no such architecture, or no image size.
    """
    make = _pick("architecture", architecture, ARCHITECTURES)
    if architecture.startswith("convnet"):
        make = functools.partial(make, width=width, depth=depth_for(image_size))
    with torch.device("meta"):
        network = make(channels, num_classes, image_size=image_size)
    network.precision = precision
    # Convolutions are 2 to 3 times faster on CPU with the channels last, and reach tensor cores on GPU.
    return network.to_empty(device=device).to(memory_format=torch.channels_last)


@torch.no_grad()
def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Set every weight to PyTorch's default random initialisation, in place, drawn from `generator`.

    Raises:
        TypeError: a module with weights of a kind that is not known here.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in module.parameters(recurse=False):
                parameter.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d):
            module.reset_parameters()  # ones and zeros: nothing is drawn
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"mim4dd.networks.initialise: does not know how {type(module).__name__} starts")
