"""Fused tokens on an accelerator: through the working set, and without a synchronisation in the hook."""

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.testing.tiny_models import tiny_inputs, tiny_model
from tests.patch.test_bank import collate_for, demonstrations
from tests.patch.test_splice import CHOSEN, attached, longer, ordinary_tokens
from tests.support.published import logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_cuda(inputs):
    return {name: x.cuda() for name, x in inputs.items()}


@pytest.mark.parametrize("name", ["llava-llama", "qwen2_5_vl", "gemma3"])
def test_forward_equals_ordinary_tokens(name):
    model = tiny_model(name)
    inputs, tokens = tiny_inputs(model, padding="left"), ordinary_tokens(model)
    prompts = longer(inputs, CHOSEN)
    model = model.cuda()
    expected = logits(model, on_cuda(prompts))
    with attached(model) as handle:
        on_device = FusedTokens(tokens.rows.cuda(), tokens.offsets.cuda(), None)
        spliced = handle.splice(on_cuda(inputs), CHOSEN, tokens=on_device)
        assert torch.equal(logits(model, spliced), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_working_set(dtype, tmp_path):
    model = tiny_model("llava-llama").cuda()
    adapter = mk.create(model, mk.AIMConfig())
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter, dtype=dtype)
    collate = collate_for(model, [])

    def on_device(batch):
        inputs, positions = collate(batch)
        return on_cuda(inputs), positions

    inputs = on_cuda(tiny_inputs(model, padding="left"))
    with mk.attach(model, adapter, bank=bank, bank_bytes=2**14) as handle:
        handle.add_demonstrations(demonstrations(8), on_device, progress=False)
        for chosen in ([[4, 0], [2]], [[7, 7], []], [[1], [6, 5]], [[0, 4], [3]]):
            found = logits(model, handle.splice(inputs, chosen))
            rows = torch.cat([bank.tokens(k).float() for k in range(8)]).cuda()
            offsets = torch.tensor([0, *bank.lengths.tolist()]).cumsum(0).cuda()
            tokens = FusedTokens(rows, offsets, None)
            assert torch.equal(found, logits(model, handle.splice(inputs, chosen, tokens=tokens)))


def test_the_hook_does_not_synchronise():
    model = tiny_model("llava-llama")
    tokens = ordinary_tokens(model)
    model = model.cuda()
    embedding = model.get_input_embeddings()
    with attached(model) as handle, torch.no_grad():
        on_device = FusedTokens(tokens.rows.cuda(), tokens.offsets.cuda(), None)
        spliced = handle.splice(on_cuda(tiny_inputs(model)), CHOSEN, tokens=on_device)
        embedding(spliced["input_ids"])  # compiles the kernel
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            embedding(spliced["input_ids"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
