"""The compiled pass that makes parameters of uniform numbers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mim4dd import augment, extension
from mim4dd.augment import at_once

DEVICES = ["cpu", *(["cuda"] if extension.available("cuda") and torch.cuda.is_available() else [])]
PARTS = augment.DSA.split("_")

pytestmark = pytest.mark.skipif(not extension.available(), reason="the extension is not built")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("together", [0, 1, 5, 300])
@pytest.mark.parametrize("parts", [("color",), ("cutout", "flip"), ("crop", "scale", "rotate"), (*PARTS,)])
def test_it_equals_the_reference(parts, together, device):
    """Also of the numbers at both ends of what `torch.rand` draws."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(12, 300, generator=generator)
    uniform[:, ::5] = torch.randint(2, (12, 60), generator=generator) * (1 - 2.0**-24)
    for size in [(28, 28), (9, 64), (1, 1)]:
        compiled, expected = (
            at_once.from_uniform(uniform.to(place), parts, size, together, backend=backend)
            for place, backend in ((device, "fused"), ("cpu", "reference"))
        )
        for ours, theirs in zip(compiled, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-6)
            assert ours.is_contiguous()


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_what_it_keeps_is_plain_wherever_it_was_first_wanted(backend):
    """Inside transforms, in inference mode and under fake tensors; then used in all of them."""
    uniform = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))

    def drawn(uniform, size):
        return at_once.from_uniform(uniform, ("color", "cutout"), size, 0, backend=backend)[0]

    def in_two_transforms(size):
        def inner(weight):
            return (drawn(uniform, size).sum() * weight).sum()

        return torch.func.grad(lambda weight: torch.func.grad(inner)(weight).sum() + inner(weight))(uniform)

    def in_inference_mode(size):
        with torch.inference_mode():
            return drawn(uniform, size)

    def fake(size):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return drawn(mode.from_tensor(uniform), size)

    def compiled(size):
        function = torch.compile(lambda uniform: drawn(uniform, size) * 1, fullgraph=True, backend="eager")
        return function(uniform)

    ways = (in_two_transforms, in_inference_mode, fake, compiled)
    for first, way in enumerate(ways):
        size = (11 + first, len(backend))  # that no other test has
        for later in (way, *ways):
            later(size)
        table = at_once._table(("color", "cutout"), size, torch.device("cpu"))
        assert type(table) is torch.Tensor
        assert not table.is_inference()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(table)
        assert torch.equal(drawn(uniform, size), compiled(size))


def test_it_is_registered_as_torch_wants_it():
    uniform = torch.rand(12, 7)
    table = at_once._table((*PARTS,), (28, 28), torch.device("cpu"))
    torch.library.opcheck(torch.ops.mim4dd.draw, (uniform, table, 6, 1))


@pytest.mark.parametrize(
    ("uniform", "table", "parts", "named"),
    [
        (torch.rand(11, 4), torch.zeros(11, 6), 6, "uniform"),
        (torch.rand(4, 12).t(), torch.zeros(11, 6), 6, "uniform"),
        (torch.rand(12, 4).double(), torch.zeros(11, 6), 6, "uniform"),
        (torch.rand(12, 4), torch.zeros(6, 11), 6, "table"),
        (torch.rand(12, 4), torch.zeros(11, 6), 0, "parts"),
    ],
)
def test_it_refuses_what_it_would_misread(uniform, table, parts, named):
    with pytest.raises(ValueError, match=f"mim4dd.augment.sample: {named}"):
        torch.ops.mim4dd.draw(uniform, table, parts, 1)
