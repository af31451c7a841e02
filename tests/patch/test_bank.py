"""A bank behind a model: filled once, named by id, checked to be the adapter's own."""

import pytest
import torch

import mmicl_kernels as mk
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.testing.tiny_models import IMAGE_SIZE, TINY_MODELS, tiny_inputs, tiny_model
from tests.support.published import logits

SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
DTYPES = [torch.float32, torch.int8]


def demonstrations(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *SHAPE, generator=generator)
    return [mk.Demonstration((image.numpy().tobytes(),), f"{k}", "") for k, image in enumerate(images)]


@pytest.fixture
def made(tmp_path):
    """A model, an adapter and an empty bank of it."""
    model = tiny_model("llava-llama")
    adapter = mk.create(model, mk.AIMConfig())
    return model, adapter, mk.DemonstrationBank.create(tmp_path / "bank", adapter)


def collate_for(model, seen):
    """Prompts of different lengths, by the text; every one that is made is noted in ``seen``."""

    def collate(batch):
        seen.extend(x.text for x in batch)
        inputs = tiny_inputs(model, batch=len(batch), length=14)
        for row, x in enumerate(batch):
            inputs["input_ids"][row, -4:] = torch.tensor([7, 8, 9, 10]) + int(x.text)
            keep = 14 - int(x.text) % 3
            inputs["attention_mask"][row, keep:] = 0
        return inputs, None

    return collate


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in TINY_MODELS), *(("llava-llama", x) for x in DTYPES)],
)
def test_banked_ids_stand_for_their_tokens(name, dtype, tmp_path):
    model, seen = tiny_model(name), []
    adapter = mk.create(model, mk.AIMConfig())
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter, dtype=dtype)
    given = demonstrations(5)
    with mk.attach(model, adapter, bank=bank) as handle:
        assert handle.bank is bank
        ids = handle.add_demonstrations(given, collate_for(model, seen), batch_size=2, progress=False)
        assert ids == [0, 1, 2, 3, 4]
        chosen = [[4, 0], [2]]
        inputs = tiny_inputs(model, padding="left")
        found = logits(model, handle.splice(inputs, chosen))
        rows = torch.cat([bank.tokens(k).float() for k in ids])
        tokens = FusedTokens(rows, torch.tensor([0, *bank.lengths.tolist()]).cumsum(0), None)
        assert torch.equal(found, logits(model, handle.splice(inputs, chosen, tokens=tokens)))
        assert not torch.equal(found, logits(model, handle.splice(inputs, [[3, 0], [2]])))
    assert sorted(bank.lengths.tolist()) != bank.lengths.tolist()  # of different lengths


def test_nothing_is_read_twice(made):
    (model, adapter, bank), seen, given = made, [], demonstrations(4)
    with mk.attach(model, adapter, bank=bank) as handle:
        collate = collate_for(model, seen)
        handle.add_demonstrations(given[:2], collate, progress=False)
        ids = handle.add_demonstrations([*given, given[1], given[3]], collate, progress=False)
    assert ids == [0, 1, 2, 3, 1, 3]
    assert seen == ["0", "1", "2", "3"]
    with mk.attach(model, adapter, bank=mk.DemonstrationBank(bank.folder)) as handle:
        assert handle.add_demonstrations(given, collate, progress=False) == [0, 1, 2, 3]
    assert len(seen) == 4


def test_an_interruption_keeps_whole_batches(made):
    model, adapter, bank = made
    collate = collate_for(model, [])

    def breaks(batch):
        if any(x.text == "3" for x in batch):
            raise KeyboardInterrupt
        return collate(batch)

    with mk.attach(model, adapter, bank=bank) as handle:
        with pytest.raises(KeyboardInterrupt):
            handle.add_demonstrations(demonstrations(4), breaks, batch_size=2, progress=False)
        assert len(bank) == 2
        assert handle.enabled


def test_a_bank_belongs_to_its_projection(made):
    model, adapter, bank = made
    other = mk.create(model, mk.AIMConfig())
    with torch.no_grad():
        other.fuser.bias[0] = 1
    for wrong in (other, {"aim": other}):
        with pytest.raises(mk.CheckpointError, match="another projection"):
            mk.attach(model, wrong, bank=bank)
    with pytest.raises(ValueError, match="none of the adapters .* fuses"):
        mk.attach(model, mk.create(model, mk.M2IVConfig()), bank=bank)
    assert len(model.get_input_embeddings()._forward_hooks) == 0
    with mk.attach(model, adapter) as handle, pytest.raises(ValueError, match="no bank is attached"):
        handle.add_demonstrations([], collate_for(model, []))
    mk.attach(model, adapter, bank=bank).detach()


def test_saved_and_loaded(tmp_path):
    model = tiny_model("llava-llama")
    adapter = mk.create(model, mk.AIMConfig(layer_norm=True, positions="answer"))
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = mk.load(tmp_path / "adapter", model)
    assert loaded.config == adapter.config
    assert loaded.digest() == adapter.digest()
    with torch.no_grad():
        loaded.fuser.norm_bias[3] += 1e-6
    assert loaded.digest() != adapter.digest()
    library = mk.VLibrary(tmp_path / "library")
    library.put("aim", adapter)
    assert library.get("aim").digest() == adapter.digest()
    with pytest.raises(mk.CheckpointError, match="another backbone"):
        mk.load(tmp_path / "adapter", tiny_model("llava-llama", seed=1))


def test_a_projection_that_changed_adds_nothing(made):
    model, adapter, bank = made
    with mk.attach(model, adapter, bank=bank) as handle:
        collate = collate_for(model, [])
        handle.add_demonstrations(demonstrations(2), collate, progress=False)
        with torch.no_grad():
            adapter.fuser.weight[0, 0] += 1
        with pytest.raises(mk.CheckpointError, match="another projection"):
            handle.add_demonstrations(demonstrations(4), collate, progress=False)
        assert len(bank) == 2
        for batch_size in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match="batch_size is"):
                handle.add_demonstrations([], collate, batch_size=batch_size)


def test_a_digest_knows_backbone_and_config_but_no_names():
    model, other = tiny_model("llava-llama"), tiny_model("llava-llama", seed=1)
    digests = {mk.create(x, mk.AIMConfig()).digest() for x in (model, other)}
    digests |= {mk.create(model, mk.AIMConfig(positions=x)).digest() for x in ("answer", "answer_end")}
    assert len(digests) == 4
    model.config.name_or_path = "somewhere/else"
    assert mk.create(model, mk.AIMConfig()).digest() in digests


@pytest.mark.parametrize("dtype", DTYPES)
def test_through_a_working_set(dtype, tmp_path):
    """What an accelerator does, here on the CPU: rows of a few demonstrations, evicted and read again."""
    model = tiny_model("llava-llama")
    adapter = mk.create(model, mk.AIMConfig())
    bank = mk.DemonstrationBank.create(tmp_path / "bank", adapter, dtype=dtype)
    inputs = tiny_inputs(model, padding="left")
    with mk.attach(model, adapter, bank=bank) as handle:
        handle.add_demonstrations(demonstrations(8), collate_for(model, []), progress=False)
        requests = [[[4, 0], [2]], [[7, 7], []], [[1], [6, 5]], [[0, 4], [3]]]
        expected = [logits(model, handle.splice(inputs, chosen)) for chosen in requests]
        room = 3 * int(bank.lengths.max()) * (bank.hidden_size * dtype.itemsize + 4)
        handle._patches.splicer._working_set = bank.working_set("cpu", room)
        for chosen, plain in zip(requests, expected, strict=True):
            assert torch.equal(logits(model, handle.splice(inputs, chosen)), plain)
