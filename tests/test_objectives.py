import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import close, digits_problem

import mim4dd
from mim4dd import augment, seeding
from mim4dd.losses import calibrated_noise_ratio
from mim4dd.networks import ConvNet
from mim4dd.objectives import (
    METHODS,
    DistributionMatching,
    GradientMatching,
    MutualInformation,
    distribution_distance,
    gradient_distance,
    trajectory_distance,
)
from mim4dd.objectives.gradient import loops
from mim4dd.objectives.mutual_information import layer_indices

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


def test_constant_memory_refuses_a_second_derivative(generator):
    network = ConvNet(1, 2, width=2, depth=1, image_size=(8, 8))
    weights = dict(network.named_parameters())
    target = {name: value + 1 for name, value in weights.items()}
    x = torch.randn(2, 1, 8, 8, generator=generator, requires_grad=True)
    distance = trajectory_distance(network, weights, target, x, torch.tensor([0, 1]), steps=1, step_size=0.1)
    (gradient,) = torch.autograd.grad(distance, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_trajectory_distance_names_bad_input(generator):
    network = ConvNet(1, 2, width=2, depth=1, image_size=(8, 8))
    weights = dict(network.named_parameters())
    x, labels = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="target does not fit the network, see weight 'blocks"):
        trajectory_distance(network, weights, {}, x, labels, steps=1, step_size=0.1)
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
        distribution_distance(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1), torch.zeros(2))


@pytest.mark.parametrize("method", METHODS)
def test_an_objective_repeats_itself_and_only_itself(method):
    problem, start = digits_problem()
    images = start.images
    draws = []
    for seed in (0, 0, 1):
        objective = METHODS[method].objective(dataclasses.replace(problem, seed=seed))
        x = images.clone().requires_grad_()
        losses = [objective(x, problem.labels).loss for _ in range(2)]
        draws.append((torch.stack(losses).detach(), torch.autograd.grad(losses[1], x)[0]))
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert draws[0][0][0] != draws[0][0][1], "every iteration draws anew"


def test_chunked_real_features_are_those_of_one_pass():
    problem, start = digits_problem(ipc=7)  # 70 images: two chunks of 32 and a rest
    images = start.images
    problem = dataclasses.replace(problem, layers=(0,))
    objective = DistributionMatching(problem)
    objective(images, problem.labels)
    first, last = problem.real_features(objective.network, images)
    whole = objective.network.features(images)
    torch.testing.assert_close(first, whole[0])
    torch.testing.assert_close(last, whole[1])
    unneeded, _ = dataclasses.replace(problem, layers=()).real_features(objective.network, images)
    assert not unneeded.numel()


@pytest.mark.parametrize("augmentation", ["none", "color_crop"])
def test_gradient_matching_sums_over_the_classes(augmentation):
    """Against a plain loop over classes with the same draws."""
    problem, start = digits_problem(ipc=2)
    images = start.images
    problem = dataclasses.replace(problem, augmentation=augmentation, layers=(1,))
    x = images.clone().requires_grad_()
    objective = GradientMatching(problem)
    matched = objective(x, problem.labels)

    real, network = problem.real, objective.network.network
    parameters = [*network.requires_grad_().parameters()]
    index = real.sample(problem.real_batch, seeding.generator(0, "dc/real"))
    params = augment.sample(augmentation, 10, (8, 8), generator=seeding.generator(0, "dc/augmentation"))
    expected = 0
    for c in range(10):
        grads = []
        for batch in (x[2 * c : 2 * c + 2], real.batch(index[c])):
            labels = torch.full((len(batch),), c)
            loss = F.cross_entropy(network(augment.apply(batch, params[labels])), labels)
            grads.append(torch.autograd.grad(loss, parameters, create_graph=True))
        expected = expected + gradient_distance(*grads)
    close(matched.loss, expected)
    close(*(torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (matched.loss, expected)))
    spread = params[matched.synthetic_labels]
    close(matched.synthetic_features[1], network.features(augment.apply(images, spread))[1])
    assert not matched.synthetic_features[0].numel(), "a map that the add-on does not ask for"
    assert not matched.real_features[1].requires_grad


def test_gradient_matching_loops_are_the_published_ones():
    published = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert {ipc: loops(ipc) for ipc in published} == published
    assert all(1 <= outer <= 50 and inner >= 10 for outer, inner in map(loops, range(2, 200)))


def test_gradient_matching_trains_its_network_between_image_steps():
    problem, start = digits_problem(ipc=2)
    images = start.images
    objective = GradientMatching(problem)
    assert objective.outer == 2

    def weights():
        return torch.cat([p.flatten() for p in objective.network.parameters()]).clone()

    def loss():
        return F.cross_entropy(objective.network.network(images), problem.labels)

    objective(images, problem.labels)
    first, first_loss = weights(), loss()
    objective(images, problem.labels)
    assert loss() < first_loss
    objective(images, problem.labels)
    third = weights()
    assert not torch.equal(third, first), "a new network"
    assert third.abs().max() <= first.abs().max() * 1.01, "that is not trained yet"


def maps(generator, rows, sizes=((4, 3, 3), (6, 2, 2))):
    return [torch.randn(rows, *size, generator=generator) for size in sizes]


def test_mutual_information_is_the_weighted_sum_over_layers(generator):
    synthetic, real = maps(generator, 6), maps(generator, 20)
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    losses = [
        mim4dd.nce_loss(s.flatten(1), r.flatten(1), *labels, temperature=0.2, noise_ratio=3.0, symmetric=True)
        for s, r in zip(synthetic, real, strict=True)
    ]
    options = {"temperature": 0.2, "noise_ratio": 3.0, "symmetric": True, "weight": 5.0, "layer_decay": 0.5}
    for layers, expected in [
        ("last", 5 * losses[1]),
        ("all", 5 * (losses[1] + 0.5 * losses[0])),
        ([-2], 5 * 0.5 * losses[0]),
    ]:
        term = MutualInformation(layers=layers, **options)
        torch.testing.assert_close(term(synthetic, real, *labels), expected)
    single = MutualInformation(**options)(synthetic[1], real[1], *labels)
    torch.testing.assert_close(single, 5 * losses[1])


def test_real_images_find_their_class_among_the_synthetic(generator):
    synthetic, real = maps(generator, 6), maps(generator, 20)
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    expected = []
    for s, r in zip(synthetic, real, strict=True):
        cosine = F.normalize(r.flatten(1)) @ F.normalize(s.flatten(1)).T
        guess = (cosine / 0.2).softmax(1) @ F.one_hot(labels[0]).float()
        expected.append(F.nll_loss(guess.log(), labels[1]))
    term = MutualInformation(loss="info_nce", layers="all", temperature=0.2, weight=5.0, layer_decay=0.5)
    torch.testing.assert_close(term(synthetic, real, *labels), 5 * (expected[1] + 0.5 * expected[0]))


def test_mutual_information_is_calibrated_once_per_layer(generator):
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    first, second = ((maps(generator, 6), maps(generator, 20)) for _ in range(2))
    term = MutualInformation(layers="all")
    term(*first, *labels)
    expected = sum(
        mim4dd.nce_loss(s2, r2, *labels, noise_ratio=calibrated_noise_ratio(s1, r1, *labels))
        for s1, r1, s2, r2 in zip(
            *([m.flatten(1) for m in side] for batch in (first, second) for side in batch), strict=True
        )
    )
    torch.testing.assert_close(term(*second, *labels), expected)
    copy = MutualInformation(layers="all")
    copy.load_state_dict(term.state_dict())
    torch.testing.assert_close(copy(*second, *labels), expected)


@pytest.mark.parametrize("projection", ["random", "trained"])
def test_projection_embeds_every_layer(generator, projection):
    synthetic, real = maps(generator, 6), maps(generator, 20)
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    term = MutualInformation(
        layers="all",
        projection=projection,
        projection_size=5,
        feature_sizes=(36, 24),
        generator=generator,
        noise_ratio=1.0,
    )
    shapes = [tuple(p.shape) for p in term.projections.values()]
    assert shapes == [(36, 5), (24, 5)]
    assert all(p.requires_grad == (projection == "trained") for p in term.parameters())
    expected = sum(
        mim4dd.nce_loss(s.flatten(1) @ p, r.flatten(1) @ p, *labels)
        for s, r, p in zip(synthetic, real, term.projections.values(), strict=True)
    )
    torch.testing.assert_close(term(synthetic, real, *labels), expected)


def test_mutual_information_pulls_images_to_their_class(generator):
    """Descending on the term makes an anchor's nearest keys those of its label."""
    centres = torch.randn(3, 16, generator=generator)
    labels = torch.arange(30) % 3
    real = centres[labels] + 0.3 * torch.randn(30, 16, generator=generator)
    anchors = torch.randn(3, 16, generator=generator).requires_grad_()
    term = MutualInformation()
    optimizer = torch.optim.SGD([anchors], lr=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        term(anchors, real, torch.arange(3), labels).backward()
        optimizer.step()
    cosine = torch.nn.functional.cosine_similarity(anchors[:, None], real[None], dim=2)
    assert torch.equal(labels[cosine.argmax(1)], torch.arange(3))
    assert cosine[torch.arange(3)[:, None] == labels].min() > cosine[torch.arange(3)[:, None] != labels].max()


def test_layer_indices():
    assert layer_indices("all", 3) == [0, 1, 2]
    assert layer_indices("last", 3) == [2]
    assert layer_indices([-1, 0, 2], 3) == [0, 2]
    with pytest.raises(ValueError, match="there is no layer 3, the network has 3"):
        layer_indices([3], 3)
    with pytest.raises(ValueError, match="layers is 'first'"):
        layer_indices("first", 3)


def test_mutual_information_names_bad_input(generator):
    with pytest.raises(ValueError, match="noise_ratio is 'auto'"):
        MutualInformation(noise_ratio="auto")
    with pytest.raises(ValueError, match="projection is 'learned'"):
        MutualInformation(projection="learned")
    with pytest.raises(ValueError, match="loss is 'supcon', expected 'nce' or 'info_nce'"):
        MutualInformation(loss="supcon")
    with pytest.raises(ValueError, match="needs feature_sizes and a generator"):
        MutualInformation(projection="random")
    labels = torch.arange(2)
    with pytest.raises(ValueError, match="2 synthetic maps, but 1 real ones"):
        MutualInformation()(maps(generator, 2), maps(generator, 2)[:1], labels, labels)
