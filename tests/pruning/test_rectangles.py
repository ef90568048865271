"""Rectangles against every set of heads there is, on grids small enough to try them all."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_comparison.pruning.rectangles import (
    Rectangle,
    cheapest_rectangles,
    heads_kept,
    is_rectangle,
    keep_mask,
    nearest_number_leaving,
    numbers_leaving,
    rectangles_by_score,
)
from pruning_comparison.pruning.selection import expected_heads_pruned, leaving_of_level, select_heads


def is_even(kept, size):
    """Whether a set of heads has as many of each group of ``size`` that it has any of."""
    return len({sum(head // size == group for head in kept) for group in {head // size for head in kept}}) <= 1


def all_rectangles(heads, size):
    subsets = itertools.chain.from_iterable(itertools.combinations(range(heads), k) for k in range(heads + 1))
    return [kept for kept in subsets if is_even(kept, size)]


@pytest.mark.parametrize(("heads", "size"), [(6, 2), (6, 3), (9, 3), (8, 2), (4, 1), (4, 4)])
def test_the_numbers_that_can_stay_are_those_of_all_even_sets(heads, size):
    assert heads_kept(heads, size) == tuple(sorted({len(kept) for kept in all_rectangles(heads, size)}))


def test_the_count_of_a_level_by_hand():
    """A layer of 3 groups of 3 keeps 9, 6, 4, 3, 2, 1 or 0: it loses 0, 3, 5, 6, 7, 8 or 9. Two layers lose every sum of two
    of these: 1, 2 and 4 are not among them, 3 + 0, 5 + 0, 3 + 3, 7 + 0 ... are."""
    assert numbers_leaving(1, 9, 3) == (0, 3, 5, 6, 7, 8, 9)
    assert numbers_leaving(2, 9, 3) == (0, 3, *range(5, 19))
    assert nearest_number_leaving(1, 2, 9, 3) == 0
    assert nearest_number_leaving(2, 2, 9, 3) == 3
    assert nearest_number_leaving(4, 2, 9, 3) == 3  # as near as 5: fewer leave
    assert [expected_heads_pruned(level, 2, 9, "model", rectangle=3) for level in (0, 5, 10, 15, 20, 25, 50, 99)] == [
        0, 0, 3, 3, 3, 3, 9, 18,
    ]  # of round(0, 0.9, 1.8, 2.7, 3.6, 4.5, 9, 17.82) = 0, 1, 2, 3, 4, 4, 9, 18  # fmt: skip
    # Within a layer, round(0.4 * 9) = 4 is as near to 3 as to 5; round(0.6 * 9) = 5.
    assert leaving_of_level(40, 2, 9, "layer", rectangle=3) == [3, 3]
    assert leaving_of_level(60, 2, 9, "layer", rectangle=3) == [5, 5]
    assert expected_heads_pruned(60, 2, 9, "layer", rectangle=3) == 10


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(2, 6, 2), (2, 6, 3), (3, 4, 2), (2, 8, 2)]),
    st.floats(0, 99),
    st.sampled_from(["model", "layer"]),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_no_even_sets_of_a_levels_number_keep_more_score(shape, level, scope, seed, ties):
    layers, heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (layers, heads), generator=generator).double()
    if not ties:
        scores = torch.randn(layers, heads, generator=generator).double()
    leaving = leaving_of_level(level, layers, heads, scope, rectangle=size)
    best = -float("inf")
    for sets in itertools.product(all_rectangles(heads, size), repeat=layers):
        lost = [heads - len(kept) for kept in sets]
        if lost == leaving or sum(lost) == leaving:
            best = max(best, sum(float(scores[layer, list(kept)].sum()) for layer, kept in enumerate(sets)))
    keep = select_heads(scores, level, scope, rectangle=size)
    assert is_rectangle(keep, size)
    lost = (~keep).sum(1).tolist()
    assert lost == leaving or sum(lost) == leaving
    assert float(scores[keep].sum()) == pytest.approx(best, abs=1e-9)
    # A constant added to all scores is the same for every choice of as many heads.
    assert torch.equal(select_heads(4 * scores + 32, level, scope, rectangle=size), keep)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([(6, 1), (6, 6), (1, 1)]),
    st.floats(0, 99),
    st.sampled_from(["model", "layer"]),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_where_every_number_is_a_rectangle_heads_are_chosen_freely(layers, shape, level, scope, seed, ties):
    """Groups of one head, or one group: ties included, the same heads as without rectangles."""
    heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layers, heads, generator=generator)
    if ties:
        scores = torch.randint(0, 3, (layers, heads), generator=generator) / 10
    assert torch.equal(select_heads(scores, level, scope, rectangle=size), select_heads(scores, level, scope))


def test_equal_scores_leave_the_first_layers_and_the_first_groups_first():
    """Three layers of 2 groups of 2; 6 of 12 leave: all of the first layer, and of two ways to keep half of the second, one
    group of two takes less cache than two of one."""
    keep = select_heads(torch.full((3, 4), 0.3), 50, rectangle=2)
    assert keep.tolist() == [[False] * 4, [False, False, True, True], [True] * 4]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(2, 6, 2), (2, 6, 3), (3, 4, 2)]), st.integers(0, 10**6), st.data())
def test_no_choice_of_given_options_costs_less(shape, seed, data):
    """Against all combinations, with heads that are gone: first the fewest that come back, then the least cost."""
    layers, heads, size = shape
    generator = torch.Generator().manual_seed(seed)
    every = all_rectangles(heads, size)
    options = [
        [
            Rectangle(kept, len({head // size for head in kept}), float(torch.rand(1, generator=generator)))
            for kept in every
        ]
        for _ in range(layers)
    ]
    gone = torch.rand(layers, heads, generator=generator) < 0.4
    leaving = data.draw(st.sampled_from(numbers_leaving(layers, heads, size)))
    tried = []
    for sets in itertools.product(*options):
        if sum(heads - len(one.kept) for one in sets) == leaving:
            returned = sum(int(gone[layer, list(one.kept)].sum()) for layer, one in enumerate(sets))
            tried.append((returned, sum(one.cost for one in sets)))
    chosen = cheapest_rectangles(options, leaving, heads, gone)
    keep = keep_mask(chosen, heads)
    assert int((~keep).sum()) == leaving
    returned, cost = min(tried)
    assert int((keep & gone).sum()) == returned
    assert sum(one.cost for one in chosen) == pytest.approx(cost)


def test_heads_come_back_only_where_the_number_cannot_be_met_without_them():
    """2 heads are left of either group of 3. 2 of them can stay, but not 3: one comes back, of the better group."""
    gone = torch.tensor([[False, False, True, False, False, True]])
    scores = torch.tensor([[5.0, 6, 9, 1, 2, 9]])
    two = select_heads(scores, 60, gone=gone, rectangle=3)  # round(3.6) = 4 leave
    assert two.tolist() == [[True, True, False, False, False, False]]
    three = select_heads(scores, 50, gone=gone, rectangle=3)  # 3 leave
    assert three.tolist() == [[True, True, True, False, False, False]]


def test_numbers_that_no_rectangles_have_are_refused():
    options = rectangles_by_score(torch.rand(2, 9), 3)
    with pytest.raises(ValueError, match="no rectangles of 2 layers of 9 heads lose 4 heads together"):
        cheapest_rectangles(options, 4, 9)
    with pytest.raises(ValueError, match="no rectangles of 1 layers of 9 heads lose 2"):
        cheapest_rectangles(options, [3, 2], 9)


def test_a_large_model_takes_seconds():
    """80 layers of 8 groups of 8 heads, counted in operations: the programme's tables have 80 x 65 x 2,561 entries."""
    scores = torch.rand(80, 64, generator=torch.Generator().manual_seed(0))
    keep = select_heads(scores, 50, rectangle=8)
    assert int((~keep).sum()) == 2560
    assert is_rectangle(keep, 8)
    assert torch.equal(keep, select_heads(scores, 50, rectangle=8))
