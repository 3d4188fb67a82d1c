"""The distances of distribution, gradient and trajectory matching: published values, by hand, gradients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import close

from mim4dd import networks
from mim4dd.networks import ConvNet
from mim4dd.networks.flat import flatten
from mim4dd.objectives import distribution_distance, gradient_distance, student, trajectory_distance
from mim4dd.objectives.student import follow

SHAPES = ["1x28x28", "3x32x32"]


def golden_network(shape, file):
    """The golden file's network, and its weights by the network's names."""
    channels, height, width = (int(n) for n in shape.split("x"))
    network = ConvNet(channels, 10, width=16, image_size=(height, width))
    names = [name for name, _ in network.named_parameters()]

    def weights(prefix):
        values = [value for name, value in file.items() if name.startswith(prefix)]
        return dict(zip(names, values, strict=True))

    network.load_state_dict(weights("w."))
    return network, weights


@pytest.mark.parametrize("shape", SHAPES)
def test_distribution_matching_equals_the_published_one(golden, shape):
    file = golden(f"objectives_{shape}")
    network, _ = golden_network(shape, file)
    synthetic = file["synthetic"].requires_grad_()
    distance = distribution_distance(
        network.embed(file["real"].flatten(0, 1)),
        network.embed(synthetic),
        torch.arange(3).repeat_interleave(5),
        torch.arange(3).repeat_interleave(2),
    )
    close(distance, file["dm.loss"])
    close(torch.autograd.grad(distance, synthetic)[0], file["dm.grad"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("metric", "name"), [("rowwise", "ours"), ("mse", "mse"), ("cosine", "cos")])
def test_gradient_matching_equals_the_published_one(golden, shape, metric, name):
    file = golden(f"objectives_{shape}")
    network, _ = golden_network(shape, file)
    synthetic = file["synthetic"].requires_grad_()

    def gradients(images, label, **options):
        loss = F.cross_entropy(network(images), torch.full((len(images),), label))
        return torch.autograd.grad(loss, [*network.parameters()], **options)

    distance = sum(
        gradient_distance(
            gradients(synthetic[2 * c : 2 * c + 2], c, create_graph=True), gradients(real, c), metric
        )
        for c, real in enumerate(file["real"])
    )
    close(distance, file[f"dc_{name}.loss"])
    close(torch.autograd.grad(distance, synthetic)[0], file[f"dc_{name}.grad"])


def test_gradient_distance_by_hand():
    one = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([5.0])]
    other = [torch.tensor([[0.0, 3.0], [0.0, 4.0]]), torch.tensor([-5.0])]
    assert gradient_distance(one, other).item() == pytest.approx(1, abs=1e-5), "vectors count for nothing"
    assert gradient_distance(one, other, "mse").item() == 1 + 9 + 4 + 100
    dot, norms = 8 - 25, ((1 + 4 + 25) * (9 + 16 + 25)) ** 0.5
    assert gradient_distance(one, other, "cosine").item() == pytest.approx(1 - dot / norms, abs=1e-5)
    assert gradient_distance(one[1:], other[1:]).item() == 0


@pytest.mark.parametrize("metric", ["rowwise", "mse", "cosine"])
def test_gradient_distance_gradcheck(generator, metric):
    synthetic, real = (
        [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((2, 3), (4,), (2, 1, 2, 2))]
        for _ in range(2)
    )
    for g in (*synthetic, *real):
        g.requires_grad_()
    assert torch.autograd.gradcheck(lambda *s: gradient_distance(s, real, metric), synthetic)
    assert torch.autograd.grad(gradient_distance(synthetic, real, metric), real, allow_unused=True) == (
        None,
        None,
        None,
    )


def test_gradient_distance_names_bad_input():
    with pytest.raises(ValueError, match=r"shapes \[\(2,\)\] and real_grads \[\(3,\)\]"):
        gradient_distance([torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="metric is 'l2'"):
        gradient_distance([], [], "l2")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", ["constant", "unrolled"])
def test_trajectory_matching_equals_the_published_one(golden, shape, memory):
    file = golden(f"objectives_{shape}")
    network, weights = golden_network(shape, file)
    synthetic = file["synthetic"].requires_grad_()
    step_size = file["mtt.lr"].float().requires_grad_()
    distance = trajectory_distance(
        network,
        weights("w."),
        weights("target."),
        synthetic,
        torch.arange(3).repeat_interleave(2),
        steps=int(file["mtt.steps"]),
        step_size=step_size,
        memory=memory,
    )
    close(distance, file["mtt.loss"])
    by_images, by_step = torch.autograd.grad(distance, [synthetic, step_size])
    close(by_images, file["mtt.grad"])
    close(by_step, file["mtt.grad_lr"])


@pytest.mark.parametrize("steps", [1, 5])
def test_constant_memory_is_exact(generator, steps):
    """In float64 with large steps, where the terms across steps matter, the two forms agree to 1e-10."""
    network = ConvNet(1, 3, width=4, depth=1, image_size=(8, 8)).double()
    start, target = (
        {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in network.named_parameters()}
        for _ in range(2)
    )
    labels = torch.tensor([0, 1, 2, 0])
    results = []
    for memory in ("constant", "unrolled"):
        x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        inputs = [x.requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)]
        distance = trajectory_distance(
            network, start, target, x, labels, steps=steps, step_size=inputs[1], memory=memory
        )
        gradients = torch.autograd.grad(3 * distance, inputs)
        results.append((distance, *gradients))
    for constant, unrolled in zip(*results, strict=True):
        torch.testing.assert_close(constant, unrolled, rtol=1e-10, atol=1e-12)
    assert not any(value.requires_grad for value in start.values()), "the caller's weights stay as they are"


@pytest.mark.parametrize("soft", [False, True])
def test_kept_graphs_save_passes_and_change_nothing(generator, soft, monkeypatch):
    """Also where the gradient is asked for twice, though a graph is kept for one time only."""
    network = ConvNet(1, 3, width=4, depth=1, image_size=(8, 8))
    networks.initialise(network, generator)
    start = flatten(network.parameters())
    passes, forward = [], ConvNet.forward
    monkeypatch.setattr(ConvNet, "forward", lambda self, x: passes.append(1) or forward(self, x))
    batches = [lambda images, targets, k=k: (images[k:], targets[k:]) for k in range(4)]
    x = torch.randn(6, 1, 8, 8, generator=generator, requires_grad=True)
    targets = torch.eye(3).repeat(2, 1).requires_grad_() if soft else torch.arange(6) % 3
    step = torch.tensor(0.5, requires_grad=True)
    inputs = [x, step, targets] if soft else [x, step]
    results = []
    for kept, options in ((0, {}), *((kept, {"kept": kept}) for kept in (1, 3, 9))):
        passes.clear()
        end = follow(network, start, batches, x, targets, step, **options)
        first = torch.autograd.grad(end.square().sum(), inputs, retain_graph=True)
        assert len(passes) == 4 + max(4 - kept, 0)
        results += [(end, *first), (end, *torch.autograd.grad(end.square().sum(), inputs))]
        assert len(passes) == 4 + max(4 - kept, 0) + 4
    for other in results[1:]:
        assert all(torch.equal(one, wanted) for one, wanted in zip(other, results[0], strict=True))


def test_no_graphs_are_kept_where_no_gradient_is_wanted(generator, monkeypatch):
    network = ConvNet(1, 3, width=4, depth=1, image_size=(8, 8))
    networks.initialise(network, generator)
    monkeypatch.setattr(student, "_graph", None)
    start, x = flatten(network.parameters()).detach(), torch.zeros(3, 1, 8, 8)
    end = follow(network, start, [lambda *data: data], x, torch.arange(3), torch.tensor(0.5), kept=9)
    assert not torch.equal(end, start)


@pytest.mark.parametrize("memory", ["constant", "unrolled"])
def test_batch_normalisation_is_that_of_the_images(generator, memory):
    """In training mode; the network's own statistics are neither used nor written."""
    network = networks.create("convnet-bn", 1, 3, (8, 8), width=4).train()
    networks.initialise(network, generator)
    start = {name: weight.detach() for name, weight in network.named_parameters()}
    target = {name: weight + 0.1 for name, weight in start.items()}
    images = torch.randn(6, 1, 8, 8, generator=generator, requires_grad=True)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def distance():
        options = {"steps": 2, "step_size": 0.1, "memory": memory}
        return trajectory_distance(network, start, target, images, torch.arange(6) % 3, **options)

    distance().backward()
    assert images.grad.abs().max() > 0
    assert before.keys() == dict(network.named_buffers()).keys() != set()
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


def test_constant_memory_refuses_a_second_derivative(generator):
    network = ConvNet(1, 2, width=2, depth=1, image_size=(8, 8))
    weights = dict(network.named_parameters())
    target = {name: value + 1 for name, value in weights.items()}
    x = torch.randn(2, 1, 8, 8, generator=generator, requires_grad=True)
    distance = trajectory_distance(network, weights, target, x, torch.tensor([0, 1]), steps=1, step_size=0.1)
    (gradient,) = torch.autograd.grad(distance, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_trajectory_distance_names_bad_input(generator):
    network = ConvNet(1, 2, width=2, depth=1, image_size=(8, 8))
    weights = dict(network.named_parameters())
    x, labels = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="target does not fit the network, see weight 'blocks"):
        trajectory_distance(network, weights, {}, x, labels, steps=1, step_size=0.1)
    other = {name: value[..., None] for name, value in weights.items()}
    with pytest.raises(ValueError, match="start has weights of other shapes than the network"):
        trajectory_distance(network, other, weights, x, labels, steps=1, step_size=0.1)
    with pytest.raises(ValueError, match="steps is -1, expected a whole number from 0"):
        trajectory_distance(network, weights, weights, x, labels, steps=-1, step_size=0.1)
    with pytest.raises(ValueError, match=r"steps is 1\.5, expected a whole number from 0"):
        trajectory_distance(network, weights, weights, x, labels, steps=1.5, step_size=0.1)
    for size in (-0.1, float("nan"), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="trajectory_distance: step_size is .*, expected a positive"):
            trajectory_distance(network, weights, weights, x, labels, steps=1, step_size=size)
    with pytest.raises(ValueError, match="memory is 'none', expected 'constant' or 'unrolled'"):
        trajectory_distance(network, weights, weights, x, labels, steps=1, step_size=0.1, memory="none")


def test_distribution_distance_by_hand_with_missing_classes():
    real = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
    synthetic = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
    # class 0: means (2, 3) and (1, 1); class 1 has no synthetic image, class 2 no real one
    distance = distribution_distance(real, synthetic, torch.tensor([0, 0, 1]), torch.tensor([0, 2]))
    assert distance.item() == 1 + 4
    assert distribution_distance(real, synthetic[:0], torch.tensor([0, 0, 1]), torch.tensor([])) == 0


def test_distribution_distance_gradcheck(generator):
    real = torch.randn(5, 2, 3, dtype=torch.float64, generator=generator)
    synthetic = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([1, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda s: distribution_distance(real, s, *labels), synthetic)


def test_distribution_distance_names_bad_input():
    with pytest.raises(ValueError, match="real_features have width 3 and synthetic_features 4"):
        distribution_distance(torch.zeros(1, 3), torch.zeros(1, 4), torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"synthetic_labels is \[2\], expected \[1\]"):
        distribution_distance(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1).long(), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(generator, dtype):
    """Sums of these are beyond float16, and means of so many beyond the precision of bfloat16."""
    real, synthetic = (300 * torch.rand(n, 40, generator=generator).to(dtype) for n in (600, 20))
    labels = torch.arange(2).repeat_interleave(300), torch.arange(2).repeat_interleave(10)
    distance = distribution_distance(real, synthetic, *labels)
    close(distance, distribution_distance(real.float(), synthetic.float(), *labels))
    for metric in ("rowwise", "mse", "cosine"):
        distance = gradient_distance([real[:20]], [synthetic], metric)
        close(distance, gradient_distance([real[:20].float()], [synthetic.float()], metric))


def test_distances_take_integer_labels_of_any_dtype(generator):
    rows = torch.randn(6, 4, generator=generator), torch.randn(5, 4, generator=generator)
    labels = torch.tensor([0, 1, 1, 0, 2, 2]), torch.tensor([0, 1, 2, 0, 1])
    expected = distribution_distance(*rows, *labels)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(distribution_distance(*rows, *(of.to(dtype) for of in labels)), expected)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match="distribution_distance: synthetic_labels is of torch"):
            distribution_distance(*rows, labels[0], labels[1].to(dtype))


@pytest.mark.parametrize("metric", ["rowwise", "mse", "cosine"])
def test_gradients_may_come_from_generators(generator, metric):
    ours, theirs = ([torch.randn(3, 4, generator=generator) for _ in range(2)] for _ in range(2))
    distance = gradient_distance((g for g in ours), (g for g in theirs), metric)
    assert distance > 0
    assert torch.equal(distance, gradient_distance(ours, theirs, metric))
