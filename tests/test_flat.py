"""The weights of a network as one vector."""

import torch

from mim4dd import networks
from mim4dd.networks.flat import flatten, load, unflatten


def test_weights_come_back_by_name_as_views(generator):
    network = networks.create("convnet", 1, 3, 8, width=4)  # whose weights have the channels last
    networks.initialise(network, generator)
    flat = flatten(network.parameters())
    assert not flat.requires_grad
    found = unflatten(flat, network)
    assert [*found] == [name for name, _ in network.named_parameters()]
    for name, weight in network.named_parameters():
        assert torch.equal(found[name], weight)
    found["classifier.bias"][-1] = 7.0
    assert flat[-1] == 7.0


def test_load_is_in_place(generator):
    network = networks.create("convnet", 1, 3, 8, width=4)
    networks.initialise(network, generator)
    before = [*network.parameters()]
    flat = torch.randn(sum(weight.numel() for weight in before), generator=generator)
    load(network, flat)
    assert torch.equal(flatten(network.parameters()), flat)
    assert all(now is then for now, then in zip(network.parameters(), before, strict=True))
    assert before[0].is_contiguous(memory_format=torch.channels_last), "as it was"
