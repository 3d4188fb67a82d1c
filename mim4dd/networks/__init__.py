"""Networks whose feature maps are matched: the ConvNet of the field and the cross-architecture set.

Each is a row of blocks and a linear classifier. `features(x)` gives every block's output, `embed(x)` the last
one flattened, `forward(x)` the class logits.
"""

from .convnet import ConvNet, depth_for
from .creation import ARCHITECTURES, create, initialise
from .cross_architecture import alexnet, lenet, mlp, resnet18, vgg11
from .memory import CHUNK
from .network import Network

__all__ = [
    "ARCHITECTURES",
    "CHUNK",
    "ConvNet",
    "Network",
    "alexnet",
    "create",
    "depth_for",
    "initialise",
    "lenet",
    "mlp",
    "resnet18",
    "vgg11",
]
