"""The add-on: `MutualInformation` over feature maps."""

import math

import pytest
import torch
import torch.nn.functional as F

import mim4dd
from mim4dd.losses import calibrated_noise_ratio
from mim4dd.objectives import MutualInformation
from mim4dd.objectives.mutual_information import layer_indices


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
    expected, other_way = [], []
    for s, r in zip(synthetic, real, strict=True):
        cosine = F.normalize(r.flatten(1)) @ F.normalize(s.flatten(1)).T
        guess = (cosine / 0.2).softmax(1) @ F.one_hot(labels[0]).float()
        expected.append(F.nll_loss(guess.log(), labels[1]))
        guess = (cosine.T / 0.2).softmax(1) @ F.one_hot(labels[1]).float()
        other_way.append(F.nll_loss(guess.log(), labels[0]))
    options = {"loss": "info_nce", "layers": "all", "temperature": 0.2, "weight": 5.0, "layer_decay": 0.5}
    one_way = 5 * (expected[1] + 0.5 * expected[0])
    torch.testing.assert_close(MutualInformation(**options)(synthetic, real, *labels), one_way)
    both = one_way + 5 * (other_way[1] + 0.5 * other_way[0])
    term = MutualInformation(symmetric=True, **options)
    torch.testing.assert_close(term(synthetic, real, *labels), both)


def test_mutual_information_is_calibrated_once_per_layer(generator):
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    first, second = ((maps(generator, 6), maps(generator, 20)) for _ in range(2))
    options = {"temperature": 0.2, "negatives": 4.0}
    term = MutualInformation(layers="all", **options)
    term(*first, *labels)
    expected = sum(
        mim4dd.nce_loss(
            s2, r2, *labels, noise_ratio=calibrated_noise_ratio(s1, r1, *labels, **options), **options
        )
        for s1, r1, s2, r2 in zip(
            *([m.flatten(1) for m in side] for batch in (first, second) for side in batch), strict=True
        )
    )
    torch.testing.assert_close(term(*second, *labels), expected)
    copy = MutualInformation(layers="all", **options)
    copy.load_state_dict(term.state_dict())
    torch.testing.assert_close(copy(*second, *labels), expected)
    copy.load_state_dict(MutualInformation(layers="all", **options).state_dict())
    copy(*second, *labels)
    assert not torch.equal(copy.noise_ratios, term.noise_ratios)
    for fixed in (MutualInformation(noise_ratio=2.0), MutualInformation(loss="info_nce")):
        fixed(*first, *labels)
        assert not fixed.state_dict()


def projected(generator, projection="random", layers="all", sizes=(36, 24)):
    return MutualInformation(
        layers=layers,
        projection=projection,
        projection_size=5,
        feature_sizes=sizes,
        generator=generator,
        noise_ratio=1.0,
    )


@pytest.mark.parametrize("projection", ["random", "trained"])
def test_projection_embeds_every_layer(generator, projection):
    synthetic, real = maps(generator, 6), maps(generator, 20)
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    term = projected(generator, projection)
    shapes = [tuple(p.shape) for p in term.projections.values()]
    assert shapes == [(36, 5), (24, 5)]
    assert all(p.requires_grad == (projection == "trained") for p in term.parameters())
    expected = sum(
        mim4dd.nce_loss(s.flatten(1) @ p, r.flatten(1) @ p, *labels)
        for s, r, p in zip(synthetic, real, term.projections.values(), strict=True)
    )
    torch.testing.assert_close(term(synthetic, real, *labels), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_projection_takes_maps_of_any_dtype(generator, dtype):
    synthetic, real = maps(generator, 6), maps(generator, 20)
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    term = projected(generator, "trained")
    cast = [[m.to(dtype) for m in side] for side in (synthetic, real)]
    loss = term(*cast, *labels)
    torch.testing.assert_close(loss.float(), term(synthetic, real, *labels), rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(loss, [*term.parameters()])
    assert all(g.dtype == torch.float32 and g.any() for g in gradients)


def test_maps_that_are_not_those_of_the_projection_are_refused(generator):
    synthetic, real = maps(generator, 6), maps(generator, 20)
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    for layers in ("all", "last", [0]):
        with pytest.raises(ValueError, match="there are 2 maps, but feature_sizes has 1; expected one size"):
            projected(generator, layers=layers, sizes=[36])(synthetic, real, *labels)
    with pytest.raises(ValueError, match="synthetic map 1 has 24 features per image, expected 25"):
        projected(generator, sizes=(36, 25))(synthetic, real, *labels)
    with pytest.raises(ValueError, match="real map 0 has 27 features per image, expected 36"):
        projected(generator)(synthetic, [real[0][:, :3], real[1]], *labels)
    projected(generator, layers="last", sizes=(1, 24))(synthetic, real, *labels)


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
    with pytest.raises(ValueError, match=r"there is no layer 0\.5"):
        layer_indices([0.5], 3)
    for layers in (0, None):
        with pytest.raises(
            ValueError, match=f"layers is {layers}, expected 'all', 'last' or a list of indices"
        ):
            layer_indices(layers, 3)


def test_mutual_information_names_bad_input(generator):
    with pytest.raises(ValueError, match="noise_ratio is 'auto'"):
        MutualInformation(noise_ratio="auto")
    with pytest.raises(ValueError, match="projection is 'learned'"):
        MutualInformation(projection="learned")
    with pytest.raises(ValueError, match="loss is 'supcon', expected 'nce' or 'info_nce'"):
        MutualInformation(loss="supcon")
    for name, value in (("negatives", 5.0), ("noise_ratio", 2.0)):
        with pytest.raises(ValueError, match=f"{name} is {value}, but loss is 'info_nce'; leave it out"):
            MutualInformation(loss="info_nce", **{name: value})
    with pytest.raises(ValueError, match="needs feature_sizes and a generator"):
        MutualInformation(projection="random")
    labels = torch.arange(2)
    with pytest.raises(ValueError, match="2 synthetic maps, but 1 real ones"):
        MutualInformation()(maps(generator, 2), maps(generator, 2)[:1], labels, labels)
    for name in ("temperature", "noise_ratio"):
        for value in (0.0, -1.0, torch.tensor(-1.0)):
            with pytest.raises(
                ValueError, match=f"MutualInformation: {name} is .*, expected a positive number"
            ):
                MutualInformation(**{name: value})
    for name in ("weight", "layer_decay"):
        for value in (math.inf, -math.inf, math.nan, "2"):
            with pytest.raises(ValueError, match=f"{name} is {value!r}, expected a finite number"):
                MutualInformation(**{name: value})
    rows = torch.randn(2, 3, generator=generator)
    with pytest.raises(ValueError, match="layers is 0, expected 'all', 'last' or a list of indices"):
        MutualInformation(layers=0)(rows, rows, labels, labels)
    for wrong, message in (
        (rows[:, 0], r"map 0 is \[2\], expected \[rows, ...\]"),
        (rows[0, 0], r"map 0 is \[\], expected \[rows, ...\]"),
        (rows.to(torch.float8_e5m2), "map 0 has dtype torch.float8_e5m2, expected a tensor of float16"),
        ([rows.numpy()], "map 0 is of type ndarray, expected a tensor of float16"),
    ):
        with pytest.raises(ValueError, match=f"synthetic {message}"):
            MutualInformation()(wrong, rows, labels, labels)
        with pytest.raises(ValueError, match=f"real {message}"):
            MutualInformation()(rows, wrong, labels, labels)


@pytest.mark.parametrize("loss", ["nce", "info_nce"])
def test_a_map_that_is_not_there_is_refused(generator, loss):
    synthetic, real = maps(generator, 6), maps(generator, 20)
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    empty = [[m[0][:, :0], m[1]] for m in (synthetic, real)]
    with pytest.raises(ValueError, match="map 0 is empty: add 0 to Problem.layers"):
        MutualInformation(loss=loss, layers="all")(*empty, *labels)
    MutualInformation(loss=loss, layers="last")(*empty, *labels)
    for layers, given in (("all", ([], [])), ("last", ([], [])), ([], (synthetic, real))):
        with pytest.raises(ValueError, match="there is no map to compare, expected at least one"):
            MutualInformation(loss=loss, layers=layers)(*given, *labels)


@pytest.mark.parametrize("loss", ["nce", "info_nce"])
def test_maps_and_labels_that_do_not_fit_are_named_as_the_caller_does(generator, loss):
    synthetic, real = maps(generator, 6), maps(generator, 20)
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    term = MutualInformation(loss=loss, layers="all")
    with pytest.raises(
        ValueError, match="map 1 has 24 features per image in synthetic_features and 12 in real_features"
    ):
        term(synthetic, [real[0], real[1][:, :3]], *labels)
    with pytest.raises(ValueError, match=r"synthetic_labels is \[20\], and synthetic map 0 \[6, 4, 3, 3\]"):
        term(synthetic, real, *reversed(labels))
    with pytest.raises(ValueError, match=r"real_labels is \[20\], and real map 1 \[9, 6, 2, 2\]"):
        term(synthetic, [real[0], real[1][:9]], *labels)
    with pytest.raises(ValueError, match="real_labels is of type NoneType, expected a tensor of int32"):
        term(synthetic, real, labels[0], None)


def test_another_number_of_layers_than_was_calibrated_is_named(generator):
    labels = torch.arange(6) % 3, torch.arange(20) % 3
    synthetic, real = maps(generator, 6), maps(generator, 20)
    term = MutualInformation(layers="all")
    term(synthetic, real, *labels)
    with pytest.raises(ValueError, match="noise_ratios has 2 layers, but 1 are compared"):
        term(synthetic[1], real[1], *labels)
