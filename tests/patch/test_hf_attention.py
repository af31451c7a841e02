"""The attention function alone, on masks that no tiny model on a CPU makes: flash's and flex's."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from mmicl_kernels.ops import shifted_attention
from mmicl_kernels.patch.sites.hf_attention import attention_forward
from mmicl_kernels.testing.inputs import shifted_attention_inputs

B, H, G, D = 2, 4, 2, 8


def case(T, S):
    q, k, v, *parameters = shifted_attention_inputs(B, H, G, T, S, D, dtype=torch.float64)
    return q, k, v, parameters


def module(parameters, base, *, normalizer="visible", impl="reference", prefix=False, **attributes):
    layer = SimpleNamespace(
        base_implementation=base,
        normalizer=normalizer,
        impl=impl,
        decode=lambda *_: None,
        warn_of_padding=lambda *_: None,
        virtual_keys=lambda query: (*parameters, None, prefix),
    )
    return SimpleNamespace(mmicl_layer=layer, **attributes)


def expected(q, k, v, parameters, **options):
    return shifted_attention(q, k, v, *parameters, impl="reference", **options).transpose(1, 2)


def padding(S, hidden):
    """``[B, S]``, the first ``hidden`` keys of the last row hidden."""
    mask = torch.ones(B, S, dtype=torch.long)
    mask[-1, :hidden] = 0
    return mask


@pytest.mark.parametrize("hidden", [0, 2])
@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
@pytest.mark.parametrize("T, S", [(6, 6), (3, 9), (1, 9)])
def test_flash_is_bottom_right_and_its_padding_two_dimensional(T, S, normalizer, hidden):
    q, k, v, parameters = case(T, S)
    patched = module(parameters, "flash_attention_2", normalizer=normalizer)
    out, weights = attention_forward(patched, q, k, v, padding(S, hidden) if hidden else None)
    assert weights is None
    start = torch.tensor([0, hidden], dtype=torch.int32) if hidden else None
    assert torch.equal(out, expected(q, k, v, parameters, causal=True, kv_start=start, normalizer=normalizer))


def test_flash_window():
    q, k, v, parameters = case(6, 6)
    out, _ = attention_forward(module(parameters, "flash_attention_2"), q, k, v, None, sliding_window=3)
    assert torch.equal(out, expected(q, k, v, parameters, causal=True, window=3))


def test_sdpa_without_a_mask_fills_a_static_cache_from_the_top_left():
    q, k, v, parameters = case(4, 9)
    for normalizer in ("visible", "all_keys"):
        out, _ = attention_forward(module(parameters, "sdpa", normalizer=normalizer), q, k, v, None)
        filled = k[:, :, :4], v[:, :, :4]
        assert torch.equal(out, expected(q, *filled, parameters, causal=True, normalizer=normalizer))


def test_who_is_causal():
    q, k, v, parameters = case(5, 5)
    causal, full = (expected(q, k, v, parameters, causal=x) for x in (True, False))
    calls = [
        (module(parameters, "sdpa"), {}, causal),
        (module(parameters, "sdpa", is_causal=False), {}, full),
        (module(parameters, "sdpa", is_causal=True), {"is_causal": False}, full),
        (module(parameters, "eager"), {}, full),  # eager attends to what its mask leaves
    ]
    for patched, options, wanted in calls:
        assert torch.equal(attention_forward(patched, q, k, v, None, **options)[0], wanted)


def test_scaling_and_softcap_are_passed_on():
    q, k, v, parameters = case(5, 5)
    out, _ = attention_forward(module(parameters, "eager"), q, k, v, None, scaling=0.7, softcap=2.0)
    assert torch.equal(out, expected(q, k, v, parameters, scale=0.7, softcap=2.0))


@pytest.mark.parametrize("normalizer", ["visible", "all_keys"])
@pytest.mark.parametrize("T, S", [(6, 6), (3, 9)])
def test_flex_block_masks(T, S, normalizer):
    q, k, v, parameters = case(T, S)

    def visible(b, h, i, j):
        return (j <= i + S - T) & (j >= b)

    mask = create_block_mask(visible, B, 1, T, S, device="cpu")
    out, _ = attention_forward(module(parameters, "flex_attention", normalizer=normalizer), q, k, v, mask)
    start = torch.arange(B, dtype=torch.int32)
    assert torch.equal(out, expected(q, k, v, parameters, causal=True, kv_start=start, normalizer=normalizer))


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("T", [1, 3])
def test_all_keys_counts_the_used_rows_of_a_static_cache(T, lowest):
    """Rows 7 and 8 are not in use yet; the first two of the last batch row are padding, and count."""
    q, k, v, parameters = case(T, 9)
    k[:, :, 7:] = 1e3  # would dominate the sum if they counted
    mask = torch.ones(T, 9, dtype=torch.bool).tril(7 - T).expand(B, 1, T, 9).clone()
    mask[-1, :, :, :2] = False
    given = mask
    if lowest:
        given = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    out, _ = attention_forward(
        module(parameters, "eager" if lowest else "sdpa", normalizer="all_keys"), q, k, v, given
    )
    used = k[:, :, :7], v[:, :, :7]
    wanted = expected(q, *used, parameters, mask=mask[..., :7], normalizer="all_keys")
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_refused_calls():
    q, k, v, parameters = case(5, 5)
    with pytest.raises(ValueError, match=r"dropout is 0\.5, expected 0"):
        attention_forward(module(parameters, "sdpa"), q, k, v, None, dropout=0.5)
    with pytest.raises(RuntimeError, match=r"'mmicl' is set by mmicl_kernels\.attach"):
        attention_forward(SimpleNamespace(config=SimpleNamespace()), q, k, v, None)
    for name in ("position_bias", "cache"):
        with pytest.raises(NotImplementedError, match=f"gives its attention {name}, expected none"):
            attention_forward(module(parameters, "sdpa"), q, k, v, None, **{name: object()})
    with pytest.raises(NotImplementedError, match="gives its attention s_aux and normalizer is 'all_keys'"):
        official = module(parameters, "sdpa", normalizer="all_keys")
        attention_forward(official, q, k, v, None, s_aux=torch.zeros(H))
    with pytest.raises(ValueError, match="attention_mask has 3 dimensions, expected 2 or 4"):
        attention_forward(module(parameters, "sdpa"), q, k, v, torch.ones(B, 5, 5))
