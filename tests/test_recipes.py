"""The recipes of docs/losses.md against the losses written out as their authors define them."""

import math

import pytest
import torch
import torch.nn.functional as F

import mim4dd


@pytest.fixture
def features():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(12, 10, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]


LABELS = torch.arange(12) % 4


def same(actual, expected, *inputs):
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))


def test_supervised_contrastive_across_views(features):
    # Khosla et al. 2020, the form that averages outside the logarithm, from each view to the other.
    z = F.normalize(features[0]) @ F.normalize(features[1]).T / 0.1
    positive = (LABELS[:, None] == LABELS).double()
    directions = []
    for logits in (z, z.T):
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        directions.append(-((positive * log_p).sum(1) / positive.sum(1)).mean())
    loss = mim4dd.info_nce_loss(*features, LABELS, LABELS, temperature=0.1, symmetric=True) / 2
    same(loss, sum(directions) / 2, *features)


def test_supervised_contrastive_within_and_across_views(features):
    # The same as their code computes it: all features are contrasted, but none with itself; their loss is
    # scaled by the temperature over a base temperature, here equal.
    views = torch.cat(features)
    labels = LABELS.repeat(2)
    others = 1 - torch.eye(24, dtype=torch.float64)
    logits = F.normalize(views) @ F.normalize(views).T / 0.07
    log_p = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    positive = (labels[:, None] == labels).double() * others
    expected = -((positive * log_p).sum(1) / positive.sum(1)).mean()
    loss = mim4dd.info_nce_loss(views, views, labels, labels, temperature=0.07, exclude_self=True)
    same(loss, expected, *features)


def test_neighbourhood_components(features):
    # Goldberger et al. 2004: neighbours by the softmax of minus the squared distances, not oneself; the
    # logarithm of the probability of a neighbour of one's own class.
    units = F.normalize(features[0])
    distances = (units[:, None] - units).square().sum(2)
    p = (-distances).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf).softmax(1)
    expected = -(p * (LABELS[:, None] == LABELS)).sum(1).log().mean()
    loss = mim4dd.info_nce_loss(
        features[0], features[0], LABELS, LABELS, temperature=0.5, positives="any", exclude_self=True
    )
    same(loss, expected, features[0])


def test_simclr(features):
    # Chen et al. 2020 (NT-Xent): the positive of a feature is the other view of its image.
    views = torch.cat(features)
    logits = F.normalize(views) @ F.normalize(views).T / 0.5
    logits = logits.masked_fill(torch.eye(24, dtype=torch.bool), -torch.inf)
    expected = F.cross_entropy(logits, (torch.arange(24) + 12) % 24)
    image = torch.arange(12).repeat(2)
    loss = mim4dd.info_nce_loss(views, views, image, image, temperature=0.5, exclude_self=True)
    same(loss, expected, *features)


def test_moco(features):
    # He et al. 2020: cross-entropy over one's own key and the queue; here over the keys of the batch as well.
    queries, keys = features[0], features[1].detach()
    queue = torch.randn(30, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    index = torch.arange(12)
    logits = F.normalize(queries) @ F.normalize(torch.cat([keys, queue])).T / 0.07
    key_labels = torch.cat([index, index.new_full((len(queue),), -1)])
    loss = mim4dd.info_nce_loss(queries, torch.cat([keys, queue]), index, key_labels, temperature=0.07)
    queue[:12] = keys  # before the backward pass
    same(loss, F.cross_entropy(logits, index), queries)


def test_crd(features):
    # Tian et al. 2020: P / (P + m Pn) on positives, m Pn / (P + m Pn) on negatives, P = exp(cosine / T) / Z.
    student, teacher = features
    z_constant, nu, n = 3.0, 6.0, 50.0
    p = (F.normalize(student) @ F.normalize(teacher).T / 0.07).exp() / z_constant
    prior = nu / n
    positive = LABELS[:, None] == LABELS
    on_positive = -(p / (p + prior)).log()
    on_negative = -(prior / (p + prior)).log()
    rows = (on_positive * positive).sum(1) / positive.sum(1)
    rows = rows + nu * (on_negative * ~positive).sum(1) / (~positive).sum(1)
    ratio = z_constant * nu / n
    loss = mim4dd.nce_loss(
        student, teacher, LABELS, LABELS, temperature=0.07, noise_ratio=ratio, negatives=nu
    )
    same(loss, rows.mean(), *features)


def test_siglip(features):
    # Zhai et al. 2023: - mean_i sum_j log sigmoid(y_ij (t x_i y_j + b)), y = 1 on the diagonal, -1 elsewhere.
    images, texts = features
    log_t = torch.tensor(math.log(10.0), dtype=torch.float64, requires_grad=True)
    b = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    logits = F.normalize(images) @ F.normalize(texts).T * log_t.exp() + b
    sign = 2 * torch.eye(12, dtype=torch.float64) - 1
    expected = -F.logsigmoid(sign * logits).sum() / 12
    index = torch.arange(12)
    loss = mim4dd.nce_loss(
        images, texts, index, index, temperature=1 / log_t.exp(), noise_ratio=torch.exp(-b)
    )
    same(loss, expected, images, texts, log_t, b)


def test_clip(features):
    # Radford et al. 2021: the mean of two cross-entropies with the diagonal as target.
    images, texts = features
    logit_scale = torch.tensor(14.3, dtype=torch.float64).log().requires_grad_()
    logits = logit_scale.exp() * F.normalize(images) @ F.normalize(texts).T
    target = torch.arange(12)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss = mim4dd.info_nce_loss(images, texts, temperature=torch.exp(-logit_scale), symmetric=True) / 2
    same(loss, expected, images, texts, logit_scale)


def test_the_positives_within_the_logarithm(features):
    # Khosla et al. 2020, L_in: with 1 / |P(i)| within the logarithm, which is a constant more.
    views, labels = torch.cat(features), LABELS.repeat(2)
    others = 1 - torch.eye(24, dtype=torch.float64)
    p = (F.normalize(views) @ F.normalize(views).T / 0.2).exp() * others
    positive = (labels[:, None] == labels).double() * others
    l_in = -((p * positive).sum(1) / p.sum(1) / positive.sum(1)).log().mean()
    loss = mim4dd.info_nce_loss(
        views, views, labels, labels, temperature=0.2, positives="any", exclude_self=True
    )
    same(loss + positive.sum(1).log().mean(), l_in, *features)
