"""``Visibility`` against a loop over every (row, query, key)."""

import itertools

import pytest
import torch

from mmicl_kernels.ops.shifted_attention.options import Visibility
from mmicl_kernels.ops.shifted_attention.reference import masked_softmax
from mmicl_kernels.testing.inputs import ints

B = 2
BOUNDS = ((None, None), (ints(0, 2), None), (None, ints(5, 3)), (ints(3, 0), ints(2, 4)))
POSITIONS = (None, 0, 2, -3, 100, ints(1, -2))
MASK = torch.rand(B, 3, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.3


def loop(v: Visibility, T: int, S: int) -> torch.Tensor:
    keep = torch.zeros(B, T, S, dtype=torch.bool)
    for b, i, j in itertools.product(range(B), range(T), range(S)):
        start = 0 if v.kv_start is None else int(v.kv_start[b])
        end = S if v.kv_end is None else int(v.kv_end[b])
        if v.q_start is None:
            first = end - T
        else:
            first = int(v.q_start[b]) if isinstance(v.q_start, torch.Tensor) else v.q_start
        seen = start <= j < end
        if v.causal:
            seen = seen and j <= first + i
        if v.window is not None:
            seen = seen and j > first + i - v.window
        keep[b, i, j] = seen
    return keep


def cases():
    for T, S in ((4, 5), (1, 5), (5, 4), (3, 0), (0, 3)):
        for causal, window, q_start, (kv_start, kv_end) in itertools.product(
            (False, True), (None, 1, 3, 9), POSITIONS, BOUNDS
        ):
            ends = None if kv_end is None else kv_end.clamp(max=S)
            yield T, S, Visibility(causal, window, q_start, kv_start, ends)


def kept(v, T, S):
    keep = v.keep(T, S, torch.device("cpu"))
    return torch.ones(B, T, S, dtype=torch.bool) if keep is None else keep.expand(B, 1, T, S)[:, 0]


def test_keep():
    for T, S, v in cases():
        assert torch.equal(kept(v, T, S), loop(v, T, S)), (T, S, v)


def test_keep_applies_a_bool_mask():
    v = Visibility(causal=True, kv_start=ints(1, 0), mask=MASK)
    expected = loop(v, 4, 5)[:, None] & MASK
    assert torch.equal(v.keep(4, 5, torch.device("cpu")), expected)


def test_additive_masks_are_left_to_the_scores():
    additive = Visibility(mask=torch.zeros(1, 1, 4, 5))
    assert additive.keep(4, 5, torch.device("cpu")) is None
    assert additive.additive_mask() is additive.mask
    assert Visibility(mask=MASK).additive_mask() is None


def test_simplified_hides_the_same():
    for T, S, v in cases():
        simple = v.simplified(T, S)
        assert torch.equal(kept(simple, T, S), loop(v, T, S)), (T, S, v)
        if simple.is_top_left_causal():
            lower = torch.ones(T, S, dtype=torch.bool).tril().expand(B, T, S)
            assert torch.equal(loop(v, T, S), lower), (T, S, v)
        if v.kv_end is None and simple.is_all_keys():
            assert loop(v, T, S).all(), (T, S, v)


def test_reachable_keys_hide_nothing_that_is_seen():
    fewer = 0
    for T, S, v in cases():
        simple = v.simplified(T, S)
        n = simple.reachable_keys(T, S)
        fewer += n < S
        expected = loop(v, T, S)
        assert 0 <= n <= S and not expected[:, :, n:].any(), (T, S, v)
        if n < S and T > 0:
            assert torch.equal(kept(simple.first_keys(n), T, n), expected[:, :, :n]), (T, S, v)
    assert fewer > 0


def test_all_keys_respects_kv_end_alone():
    v = Visibility(True, 2, 1, ints(1, 1), ints(5, 3), MASK).all_keys()
    assert torch.equal(kept(v, 4, 5), loop(Visibility(kv_end=ints(5, 3)), 4, 5))


@pytest.mark.parametrize("top", (0.0, -1e9, torch.finfo(torch.float32).min))
def test_masked_softmax_of_a_low_row(top):
    """Probabilities sum to 1 and the gradient of lse is the probabilities, at any level of the scores."""
    scores = torch.full((1, 1, 2, 5), top, requires_grad=True)
    probabilities, lse = masked_softmax(scores, None, None)
    torch.testing.assert_close(probabilities, torch.full_like(scores, 0.2))
    (dscores,) = torch.autograd.grad(lse.sum(), scores)
    torch.testing.assert_close(dscores, torch.full_like(scores, 0.2))
