"""Networks trained as one are those trained one by one."""

import pytest
import torch
from conftest import digits_problem

from mim4dd import augment, evaluation, networks, stacked
from mim4dd.data import load
from mim4dd.networks.flat import flatten, unflatten, unflatten_all
from mim4dd.networks.memory import per_image
from mim4dd.seeding import generator
from mim4dd.stacked import Stack

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("soft", [False, True])
def test_a_stack_is_trained_as_its_networks_are_alone(soft, device):
    """Six epochs of a batch of 16 and one of 4, each network on images of its own, in float64."""
    problem, _ = digits_problem(ipc=2)
    real, labels = problem.real.to(device), problem.labels.to(device)
    targets = torch.nn.functional.one_hot(labels, 10) * 0.8 + 0.02 if soft else labels
    sets = [
        (real.batch(real.sample(2, generator(k, "images", device)).flatten()).double(), targets)
        for k in range(3)
    ]
    network = networks.create("convnet", 1, 10, (8, 8), width=8, device=device).double()
    protocol = evaluation.Protocol(epochs=6, augmentation=augment.DSA, batch=16)

    def trained(group):
        stack = Stack.initialised(network, [generator(0, f"network/{k}", device) for k in group])
        before = stack.rows()
        evaluation.train(stack, [sets[k] for k in group], protocol)
        changed = unflatten((stack.rows() != before).all(0), network)
        assert all(weight.any() for name, weight in changed.items() if "weight" in name)
        return stack.rows()

    alone = torch.cat([trained([k]) for k in range(3)])
    torch.testing.assert_close(trained(range(3)), alone, rtol=1e-9, atol=1e-12)
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("architecture", ["mlp", "lenet", "alexnet", "vgg11", "resnet18"])
def test_any_architecture_is_trained_in_a_stack(architecture):
    """An epoch of two batches, in float64."""
    network = networks.create(architecture, 1, 10, (8, 8)).double()
    random = generator(0, "images")
    sets = [(torch.randn(12, 1, 8, 8, dtype=torch.float64, generator=random), torch.arange(12) % 10)] * 2
    rows = []
    for group in ([0], [1], [0, 1]):
        stack = Stack.initialised(network, [generator(0, f"network/{k}") for k in group])
        evaluation.train(stack, [sets[k] for k in group], evaluation.Protocol(1, "none", batch=8))
        rows.append(stack.rows())
    torch.testing.assert_close(rows[2], torch.cat(rows[:2]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("architecture", ["convnet", "convnet-bn"])
def test_the_score_does_not_depend_on_how_many_are_trained_at_once(architecture, monkeypatch):
    real, test = load("digits")
    pairs = [
        (real.batch(index := real.sample(1, generator(k, "x")).flatten()), real.labels[index])
        for k in range(3)
    ]
    protocol = evaluation.Protocol(epochs=5, augmentation=augment.DSA, architecture=architecture, width=8)
    sizes = []
    train = evaluation._train
    monkeypatch.setattr(
        evaluation, "_train", lambda stack, *a: sizes.append(len(stack.random)) or train(stack, *a)
    )

    def score():
        sizes.clear()
        return evaluation.evaluate(pairs.__getitem__, test, protocol, num_networks=3, seed=0).accuracies

    alone = score()
    assert sizes == [1, 1, 1]
    monkeypatch.setitem(stacked.LARGEST_STACK, "cpu", 2)
    # Within an image or two: sums are in another order.
    assert score() == pytest.approx(alone, abs=2.5 / len(test))
    # Batch normalisation counts statistics for one network only.
    assert sizes == ([1, 1, 1] if architecture == "convnet-bn" else [2, 1])


def test_as_many_are_trained_at_once_as_fit_in_memory(monkeypatch):
    network = networks.create("convnet", 1, 10, (8, 8), width=8)
    batch = 256 * per_image(network, (1, 8, 8), gradients=True)
    monkeypatch.setitem(stacked.LARGEST_STACK, "cpu", 10)
    for free, count in ((batch - 1, 1), (3 * batch, 3), (100 * batch, 10), (None, 10)):
        monkeypatch.setattr(stacked, "budget", lambda *_, free=free: free)
        assert stacked.stack_size(network, (1, 8, 8), 256, torch.device("cpu")) == count


def test_a_stack_of_a_network_trains_that_network():
    problem, start = digits_problem()
    random = generator(0, "training")
    network = problem.network()
    networks.initialise(network, random)
    before = network.classifier.weight.clone()
    stack = Stack.of(network, random)
    evaluation.train(stack, [(start.images, problem.labels)], evaluation.Protocol(1, "none"))
    assert not torch.equal(network.classifier.weight, before)
    assert [*stack.unstack()] == [network]
    assert torch.equal(flatten(network.parameters()), stack.weights)


@pytest.mark.parametrize(("count", "pieces"), [(318, 1), (317_706, 45), (1_588_530, 48), (3_177_060, 48)])
def test_an_update_is_cut_into_aligned_pieces_of_the_weights(count, pieces, monkeypatch):
    """On a GPU, of which a whole vector would keep a few processors busy only."""
    monkeypatch.setattr(stacked, "FUSED", {"cpu"})
    weights = torch.zeros(count)
    optimizer = Stack(networks.create("mlp", 1, 10, (8, 8)), weights, [generator(0, "")]).sgd(0.1)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == pieces
    assert all(piece.storage_offset() * 4 % 16 == 0 for piece in group["params"])
    for piece in group["params"]:
        piece.grad = torch.ones(len(piece))
    optimizer.step()
    assert torch.equal(weights, torch.full((count,), -0.1))


@pytest.mark.parametrize("fused", [False, True])
def test_updates_are_as_their_settings_say(fused, monkeypatch):
    """In one kernel only where that is asked for: on a CPU it would change the bits of published runs."""
    if fused:
        monkeypatch.setattr(stacked, "FUSED", {"cpu"})
    weights = torch.zeros(3000)
    stack = Stack(networks.create("mlp", 1, 10, (8, 8)), weights, [generator(0, "")])
    optimizer = stack.sgd(0.1, momentum=0.5, weight_decay=0.25)
    assert optimizer.param_groups[0]["fused"] is fused
    expected = change = 0.0
    for lr in (0.1, 0.03):
        stacked.set_lr(optimizer, lr)
        for piece in optimizer.param_groups[0]["params"]:
            piece.grad = torch.ones(len(piece))
        optimizer.step()
        change = 0.5 * change + 1 + 0.25 * expected
        expected -= lr * change
    torch.testing.assert_close(weights, torch.full((3000,), expected))


def test_the_order_of_a_single_batch_is_drawn_on_a_cpu_only(monkeypatch):
    """Where the draws of published runs are to stay."""
    random, same = (generator(0, "order") for _ in range(2))
    stack = Stack(networks.create("mlp", 1, 10, (8, 8)), torch.zeros(2), [random, random])
    drawn = [torch.randperm(10, generator=same) for _ in range(4)]
    (batch,) = stack.epoch(10, 10)
    assert torch.equal(batch, torch.stack(drawn[:2]))
    assert stacked.one_unordered_batch(10, 10, torch.device("cuda"))
    monkeypatch.setattr(stacked, "ORDERED", set())
    (batch,) = stack.epoch(10, 12)
    assert torch.equal(batch, torch.arange(10).repeat(2, 1))
    first, second = stack.epoch(10, 6)
    assert torch.equal(torch.cat([first, second], 1), torch.stack(drawn[2:])), "of several it is"


def test_each_weight_of_a_stack_is_one_tensor():
    network = networks.create("convnet", 1, 10, (8, 8), width=8)
    random = generator(0, "weights")
    stack = Stack.initialised(network, [random, random])
    first, second = (unflatten(row, network) for row in stack.rows())
    for name, weight in unflatten_all(stack.weights, network, 2).items():
        assert torch.equal(weight, torch.stack([first[name], second[name]]))
        assert weight.untyped_storage().data_ptr() == stack.weights.untyped_storage().data_ptr()
        assert weight.ndim == 5 or weight.is_contiguous()
    for loaded, row in zip(stack.unstack(), stack.rows(), strict=True):
        assert torch.equal(flatten(loaded.parameters()), row)
