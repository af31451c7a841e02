"""Every family on CUDA: the kernels that `auto` chooses, against the independent forms in fp64."""

import copy

import pytest

from mmicl_kernels.testing.budgets import assert_within_budget
from mmicl_kernels.testing.tiny_models import ALL_MODELS, is_available, tiny_inputs
from tests.patch.empty_cells import REFUSED
from tests.patch.family_oracles import METHODS, adapter_of, attached, independent
from tests.patch.test_support_matrix import model_of
from tests.support.published import doubled, in_double, logits

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", filter(is_available, ALL_MODELS))
@pytest.mark.parametrize("padding", [None, "left"])
def test_logits(name, method, padding):
    if (name, method) in REFUSED:
        pytest.skip(REFUSED[name, method])
    model = copy.deepcopy(model_of(name)).to(DEVICE)
    double, inputs = in_double(model), tiny_inputs(model, padding=padding)
    results = {}
    for form, of in ((independent, double), (independent, model), (attached, model)):
        adapter = adapter_of(of, method).to(of.dtype)
        with form(of, method, adapter) as prompts:
            given = prompts(doubled(inputs) if of is double else inputs)
            results[form, of] = logits(of, {key: x.to(DEVICE) for key, x in given.items()})
    low, exact = results[independent, model], results[independent, double]
    assert_within_budget(f"logits of {name}", results[attached, model], low, exact)
