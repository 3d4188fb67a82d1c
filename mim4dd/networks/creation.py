"""Networks by the name of their architecture, and their random initialisation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import nn

from .. import extension
from ..errors import unknown
from ..sizes import ImageSize, check_counts
from .convnet import ConvNet, depth_for
from .cross_architecture import alexnet, lenet, mlp, resnet18, vgg11
from .network import Network
from .precision import COMPUTED

ARCHITECTURES: dict[str, Callable[..., Network]] = {
    "convnet": ConvNet,
    "convnet-bn": functools.partial(ConvNet, norm="batch"),
    "mlp": mlp,
    "lenet": lenet,
    "alexnet": alexnet,
    "vgg11": vgg11,
    "resnet18": resnet18,
}


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
        device: where to keep its weights.
        precision: what its blocks compute in: "fp32", "tf32" or "bf16".

    Raises:
        InputError: an unknown architecture or precision, or something that is no number or image size.
    """
    if precision not in COMPUTED:
        raise unknown("precision", precision, COMPUTED)
    extension.warn_once()
    check_counts(channels=channels, num_classes=num_classes, width=width)
    if architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES)
    make = ARCHITECTURES[architecture]
    if architecture.startswith("convnet"):
        make = functools.partial(make, width=width, depth=depth_for(image_size))
    with torch.device("meta"):
        network = make(channels, num_classes, image_size=image_size)
    network.float().precision = precision  # whatever the default dtype is
    # Convolutions are 2 to 3 times faster on CPU with the channels last, and reach tensor cores on GPU.
    return network.to_empty(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Set every weight to PyTorch's default random initialisation, in place, drawn from `generator`.

    Raises:
        TypeError: a module of a kind that is not known here has weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in module.parameters(recurse=False):
                parameter.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d):
            module.reset_parameters()  # ones and zeros: nothing is drawn
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(
                f"mim4dd.networks.initialise: no initialisation is known for {type(module).__name__}"
            )
