"""Right before fast, at real size: the logits of every variant against the same model in fp32.

The measure is what 8 billion parameters lose in bf16 without any shift: a variant may err at most twice
as much as the plain model, or the authors' formulation of the shift, does against itself in fp32, plus one
rounding. Ours is held to its specification (impl="reference"), and with the gate of the authors' code to
their formulation. The shift must change the logits by more than that budget, or nothing is checked.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from benchmarks.e2e.decoding import Decoder, Eager
from benchmarks.e2e.models import Prompt, Size, Subject, prompt_inputs, random_adapter
from mmicl_kernels.testing.budgets import unit_roundoff

FORCED_TOKENS = 3  # appended after the prompt, so that decoding is checked too
OURS, ALL_KEYS = "ours", "all_keys"


@dataclass
class Checks:
    """exact: logits in fp32 by variant. budget, effect: relative errors. verdicts: of all that was judged."""

    prompt: Prompt
    tokens: Tensor
    exact: dict[str, Tensor]
    budget: float = 0.0
    effect: float = 0.0
    verdicts: list[dict] = field(default_factory=list)

    def judge(self, variant: str, decoder: Decoder, *, exact: str | None = None) -> bool:
        """Whether logits are right, by comparison with ``exact``'s in fp32, by default the variant's own."""
        key = exact or (OURS if variant.startswith(OURS) else variant)
        verdict = {"variant": variant, "mode": type(decoder).__name__.lower(), "against": key, "right": False}
        self.verdicts.append(verdict)
        error = relative_error(decoder.forced_logits(self.tokens), self.exact[key])
        verdict |= {"error": error, "budget": self.budget, "effect": self.effect}
        verdict["right"] = error <= self.budget < self.effect  # False for NaN
        return verdict["right"]


def make_checks(model: nn.Module, size: Size, impls: Mapping[str, str], *, device: str) -> Checks:
    """Exact logits from a copy of ``model`` in fp32, the budget, and ours with the authors' gate judged."""
    prompt = Prompt(0, size.lengths[0])
    inputs = prompt_inputs(size, prompt, device=device, dtype=model.dtype)
    tokens = inputs["input_ids"][:, :FORCED_TOKENS]
    visible, all_keys = (
        random_adapter(model, keys=prompt.tokens, normalizer=normalizer)
        for normalizer in ("visible", ALL_KEYS)
    )

    def logits(subject: Subject, variant: str) -> Tensor:
        subject.use(variant)
        return Eager(subject.model, inputs).forced_logits(tokens)

    with Subject(copy.deepcopy(model).float(), visible, {OURS: "reference"}) as wide:
        exact = {variant: logits(wide, variant) for variant in ("plain", "published", OURS)}
    checks = Checks(prompt, tokens, exact)
    checks.effect = relative_error(exact["plain"], exact[OURS])
    with Subject(model, all_keys, impls) as subject:
        low = max(
            relative_error(logits(subject, variant), exact[variant]) for variant in ("plain", "published")
        )
        checks.budget = 2 * low + unit_roundoff(model.dtype)
        for variant in impls:
            subject.use(variant)
            try:
                checks.judge(variant, Eager(model, inputs), exact="published")
            except Exception as error:  # the others can still be measured
                checks.verdicts[-1]["exception"] = f"{type(error).__name__}: {error}"
    return checks


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())
