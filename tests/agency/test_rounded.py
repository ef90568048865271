"""Sums of products on matrix units for bfloat16, against float64. Without such units the same code runs in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pruning_comparison.agency import rounded
from pruning_comparison.agency.adaptation import _Moments, ridge_towards, ridge_towards_at_once
from pruning_comparison.agency.moments import LayerMoments
from pruning_comparison.agency.rounded import add_products, gram_of, is_rounded, mirror, origin_of

FEATURES, WIDTH = 40, 24


def samples(*, sinks=0, offset=0.0, count=600):
    """X [S, F] in bfloat16 and targets [S, E] that depend on it; the first ``sinks`` rows are 1,000 times as long."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, FEATURES, generator=generator) @ torch.randn(FEATURES, FEATURES, generator=generator)
    x[:sinks] *= 1000
    x = (x + offset).bfloat16()
    targets = x.float() @ torch.randn(FEATURES, WIDTH, generator=generator) / 8
    return x, targets + torch.randn(count, WIDTH, generator=generator) + offset


def exact_products(x, targets):
    """X'X and X'T around the means, in numpy's float64."""
    x, targets = x.double().numpy(), targets.double().numpy()
    x, targets = x - x.mean(0), targets - targets.mean(0)
    return x.T @ x, x.T @ targets


def off(found, exact):
    """Relative error of a matrix."""
    exact = np.asarray(exact)
    return float(np.linalg.norm(np.asarray(found) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("block", [7, 16, 512])
@pytest.mark.parametrize("offset", [0.0, 3.0, 300.0])
@pytest.mark.parametrize("sinks", [0, 5])
def test_sums_are_those_of_float64(monkeypatch, block, sinks, offset):
    """In three batches of different sizes. A target loses at most 1/512 of itself, and what is fitted to it no more."""
    monkeypatch.setattr(rounded, "_BLOCK", block)
    x, targets = samples(sinks=sinks, offset=offset)
    assert is_rounded(x)
    moments = _Moments()
    for part in (slice(0, 256), slice(256, 300), slice(300, None)):
        moments.add(x[part], targets[part])
    gram, cross = moments.products(centred=True)
    exact_gram, exact_cross = exact_products(x, targets)
    torch.testing.assert_close(gram, gram.T, rtol=1e-12, atol=1e-6)
    # Where features are far from zero their origin is subtracted, and the numbers far from it are rounded.
    assert off(gram, exact_gram) < (1e-3 if offset == 300 else 1e-5)
    assert off(cross, exact_cross) < 1 / 512
    means = moments.means()
    np.testing.assert_allclose(means[0], x.double().mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(means[1], targets.double().mean(0), rtol=1e-5, atol=1e-5)
    weight = torch.zeros(FEATURES, WIDTH)
    found = ridge_towards(gram, cross, weight, 0.1)
    expected = ridge_towards(torch.tensor(exact_gram), torch.tensor(exact_cross), weight, 0.1)
    assert off(found, expected) < 1 / 512


def test_without_long_rows_apart_the_others_would_drown():
    """Targets of a sink, rounded to bfloat16, are further off than the targets of all other rows are long."""
    x, targets = samples()
    targets[0] = 30000 + 13 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    cross = torch.zeros(FEATURES, WIDTH, dtype=torch.float64)
    add_products(torch.zeros(FEATURES, FEATURES, dtype=torch.float64), cross, x.float(), targets.clone())
    exact = x.double().T @ targets.double()
    others = x[1:].double().T @ targets[1:].double()
    apart = cross - x[:1].double().T @ targets[:1].double()
    assert off(apart, others) < 1e-3
    coarse = x.double().T @ targets.bfloat16().double()
    assert off(coarse - exact + others, others) > 0.05


def test_products_of_rounded_numbers_lose_nothing():
    x = samples(sinks=3)[0]
    exact = x.double().T @ x.double()
    assert off(gram_of(x.float()), exact) < 1e-6


def test_features_far_from_zero_are_taken_around_a_number_that_leaves_differences_exact():
    x = samples(offset=300.0)[0]
    origin = origin_of(x)
    assert bool((origin == origin.bfloat16().float()).all())
    assert bool(((origin - 300).abs() < 30).all())
    differences = x.float() - origin
    assert torch.equal(differences, differences.bfloat16().float())
    assert bool((origin_of(samples()[0]) == 0).all())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_rows_and_silent_features_are_added_as_well(count):
    x = torch.zeros(count, 5).bfloat16()
    x[1:] = 2
    assert torch.equal(gram_of(x.float()), x.double().T @ x.double())


@pytest.mark.parametrize("block", [1, 2, 512])
def test_the_upper_triangle_is_mirrored(monkeypatch, block):
    monkeypatch.setattr(rounded, "_BLOCK", block)
    gram = torch.tensor([[1.0, 2.0, 3.0], [9.0, 4.0, 5.0], [9.0, 9.0, 6.0]])
    assert mirror(gram).tolist() == [[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_moments_of_rounded_heads_are_those_of_the_stacked_rows(batch):
    x = samples(sinks=4)[0].view(6, 100, FEATURES)
    moments = LayerMoments(tuple(range(5)), FEATURES // 5, torch.zeros(FEATURES, 1))
    for start in range(0, len(x), batch):
        moments.add(x[start : start + batch], start)
    for half in (None, 0, 1):
        stacked = (x if half is None else x[half::2]).flatten(0, 1).double().numpy()
        assert moments.count(half) == len(stacked)
        np.testing.assert_allclose(moments.mean(half), stacked.mean(0), rtol=1e-5, atol=1e-5)
        assert off(moments.gram(half), np.cov(stacked.T, bias=True) * len(stacked)) < 1e-5


def test_in_float32_nothing_is_rounded():
    x, targets = samples()
    assert not is_rounded(x.float())
    assert not is_rounded(x.double())
    moments = _Moments()
    moments.add(x.float(), targets)
    assert off(moments.products(centred=True)[1], exact_products(x, targets)[1]) < 1e-6


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
def test_both_orders_of_the_solution_are_the_same(ridge):
    x, targets = samples()
    gram, cross = (torch.tensor(product) for product in exact_products(x, targets))
    weight = torch.randn(FEATURES, WIDTH, generator=torch.Generator().manual_seed(8))
    expected = ridge_towards(gram, cross, weight, ridge)
    assert off(ridge_towards_at_once(gram.clone(), cross, weight, ridge), expected) < 1e-9


@pytest.mark.parametrize(
    "gram", [torch.zeros(4, 4), torch.full((4, 4), torch.nan), -torch.eye(4) + 2 * torch.ones(4, 4)]
)
def test_a_matrix_that_cannot_be_solved_gets_more_ridge_or_the_old_weights(gram):
    """The last has eigenvalues of -1 and 7, and a mean diagonal of 1: the ridge has to exceed 1."""
    weight = torch.ones(4, 3)
    found = ridge_towards_at_once(gram.double(), torch.zeros(4, 3, dtype=torch.float64), weight, 0.5)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, ridge_towards(gram.double(), torch.zeros(4, 3).double(), weight, 0.5))
