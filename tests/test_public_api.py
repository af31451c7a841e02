"""The names and signatures that users rely on (DESIGN section 9): added to, never changed."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import mmicl_kernels as mk
from mmicl_kernels import ops

SIGNATURES = {
    "ops.shifted_attention": "(q, k, v, weight, bias, shift, *, scale=None, causal=False, window=None, "
    "softcap=None, q_start=None, kv_start=None, kv_end=None, mask=None, cu_seqlens_q=None, "
    "cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, adapter_ids=None, prefix=False, "
    "normalizer='visible', return_lse=False, impl='auto')",
    "ops.attention_shift": "(out, lse, q, weight, bias, shift, *, adapter_ids=None, prefix=False, "
    "impl='auto')",
    "ops.residual_shift": "(x, vector, scale=1.0, *, preserve_norm=False, adapter_ids=None, strengths=None, "
    "impl='auto')",
    "ops.residual_shift_rms_norm": "(x, residual, vector, scale, norm_weight, *, eps, weight_offset=0.0, "
    "adapter_ids=None, strengths=None, impl='auto')",
    "ops.prefix_splice": "(bank, offsets, demo_ids, cu_demos, prompt, *, length, layout='left', "
    "max_length=None, prompt_start=None, prompt_end=None, cu_prompt=None, labels=None, bank_scale=None, "
    "impl='auto')",
    "ops.prefix_splice_": "(embeddings, bank, offsets, demo_ids, cu_demos, starts, *, bank_scale=None, "
    "impl='auto')",
    "ops.row_projection": "(hidden, rows, weight, bias=None, *, norm_weight=None, norm_bias=None, eps=1e-05, "
    "num_rows=None, dtype=None, impl='auto')",
    "ops.alignment_loss": "(states, targets, rows, *, form='relative', impl='auto')",
    "TokenFuser.forward": "(self, hidden, rows, *, num_rows=None, dtype=None, impl='auto')",
    "create": "(model, config)",
    "attach": "(model, adapter, *, impl='auto', slots=8, strength=1.0, tokens=None, bank=None, "
    "bank_bytes=1073741824, placeholder_ids=None)",
    "load": "(folder, model, *, revision=None)",
    "load_model": "(folder, *, dtype='auto', device=None, quantization=None, attn_implementation=None)",
    "load_processor": "(folder)",
    "train": "(model, processor, records, config, *, out=None, shots=None, steps=None, recipe=None, "
    "validation=None, draw=None, seed=0, resume=False, arguments=None, callbacks=(), progress=True)",
    "load_official": "(path, model)",
    "save_official": "(adapter, path)",
    "evaluate": "(model, processor, records, *, adapters=None, bank=None, shots=(0,), adapter_shots=(0,), "
    "demonstrations=None, retrieval='random', features=None, metric='exact', auroc=False, generation=None, "
    "out=None, batch_size=8, limit=None, seed=0, progress=True)",
    "MimICConfig": "(normalizer='visible', align='mlp', alignment='relative', align_weight=1.0, "
    "ce_weight=0.5, ffn_shift=False)",
    "PromptTuningConfig": "(num_tokens=20, std=0.02)",
    "HiFICLConfig": "(num_keys=8, rank=8, prefix=True, normalizer='visible')",
    "STAVEConfig": "(readout=1, ce_weight=1.0, demonstrations_weight=1.0)",
    "MimICAdapter.save_pretrained": "(self, folder)",
    "MimICAdapter.from_pretrained": "(folder)",
    "Handle.rows": "(self, names)",
    "Handle.add": "(self, name, adapter)",
    "Handle.remove": "(self, name)",
    "Handle.splice": "(self, inputs, demonstrations=None, *, max_length=None, tokens=None)",
    "Handle.aggregate": "(self, inputs, positions=None)",
    "Handle.add_demonstrations": "(self, demonstrations, collate, *, batch_size=8, progress=True)",
    "DemonstrationBank.create": "(folder, adapter, dtype=torch.bfloat16, prompt='')",
    "Handle.enable": "(self)",
    "Handle.disable": "(self)",
    "Handle.disabled": "(self)",
    "Handle.detach": "(self)",
    "Handle.__enter__": "(self)",
    "AttentionShift.forward": "(self, out, lse, q, *, impl='auto')",
    "ResidualShift.forward": "(self, x, *, impl='auto')",
    "ShiftedAttention.forward": "(self, q, k, v, *, mask=None, causal=False, window=None, softcap=None, "
    "scale=None, normalizer='visible', impl='auto')",
}
# What section 9 promises today; later issues add the rest of it.
PROMISED = {"ops", "create", "attach", "load", "load_official", "save_official", "MimICConfig"}


def find(dotted):
    thing = mk
    for name in dotted.split("."):
        thing = getattr(thing, name)
    return thing


def bare(signature):
    """Without annotations."""
    parameters = [x.replace(annotation=inspect.Parameter.empty) for x in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert bare(inspect.signature(find(name))) == SIGNATURES[name]


def public_callables():
    for module in (mk, ops):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) and not issubclass(thing, BaseException):
                yield f"{name}()", thing
                for method, function in vars(thing).items():
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{name}.{method}", function
            elif inspect.isfunction(thing):
                yield name, thing


def test_nothing_public_swallows_arguments():
    checked = dict(public_callables())
    del checked["AdaptedModel.forward"]  # passes them on: the model says what they are
    assert {"attach", "shifted_attention", "attention_shift", "Handle.rows"} <= checked.keys()
    for name, function in checked.items():
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, name
        assert inspect.Parameter.VAR_POSITIONAL not in kinds, name


def test_everything_public_says_what_it_is():
    for name, thing in public_callables():
        assert inspect.getdoc(thing) or name.split(".")[-1] in ("forward", "extra_repr"), name


def test_all_is_complete():
    assert set(mk.__all__) >= PROMISED
    assert len(set(mk.__all__)) == len(mk.__all__)
    for name in mk.__all__:
        assert getattr(mk, name) is not None
    assert set(mk.__all__) <= set(dir(mk))
    # Whatever a layer calls public is public from the top: operators stay in `ops`.
    for layer in ("modules", "patch"):
        module = importlib.import_module(f"mmicl_kernels.{layer}")
        assert set(module.__all__) <= set(mk.__all__), layer
    assert set(ops.__all__) == {
        name for name in vars(ops) if inspect.isfunction(getattr(ops, name)) and not name.startswith("_")
    }


def test_every_op_has_its_files():
    for _, name, is_package in pkgutil.iter_modules(ops.__path__):
        if is_package and name != "_core":
            assert name in ops.__all__
            for part in ("api", "reference"):
                importlib.import_module(f"mmicl_kernels.ops.{name}.{part}")


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'mmicl_kernels' has no attribute 'atach'"):
        mk.atach  # noqa: B018


@pytest.mark.parametrize("name", mk.__all__)
def test_every_name_is_importable_alone(name):
    """In any order: no name needs another to be imported before."""
    if name in ("__version__", "ops"):
        return
    script = f"from mmicl_kernels import {name} as x; import mmicl_kernels; assert mmicl_kernels.{name} is x"
    if name in ("attach", "MimICAdapter", "AttentionShift"):  # one per layer; a process takes seconds
        subprocess.run([sys.executable, "-c", script], check=True)
    else:
        exec(script, {})  # noqa: S102


def test_adapters_are_modules_keyed_by_layer():
    from mmicl_kernels.testing.tiny_models import tiny_model

    model = tiny_model("llava-llama")
    adapter = mk.create(model, mk.MimICConfig())
    layer = adapter.layers["0"]
    assert isinstance(layer, mk.AttentionShift)
    assert [tuple(x.shape) for x in (layer.weight, layer.bias, layer.shift)] == [(4, 8), (4,), (4, 8)]
    with mk.attach(model, adapter, impl="auto") as handle:
        assert isinstance(handle, mk.Handle)
