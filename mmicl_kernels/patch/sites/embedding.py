"""Tokens before a prompt: a hook that overwrites the embeddings of their placeholders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmicl_kernels.methods import Adapter
from mmicl_kernels.methods.sites import FusedTokens
from mmicl_kernels.models.anchors import compute_device, family_of
from mmicl_kernels.models.tokens import named_ids, special_ids, visual_tokens
from mmicl_kernels.ops import prefix_splice_
from mmicl_kernels.patch.sites.hooks import ForwardHook, argument_names
from mmicl_kernels.patch.sites.layout import Plan, grow, lay_out
from mmicl_kernels.patch.state import State
from mmicl_kernels.store import DemonstrationBank

ANY = -1


@dataclass(frozen=True)
class Prefix:
    """The fused tokens of the batch that was spliced last, on the embedding's device.

    ``input_ids`` are what the embedding will be asked for; ``ANY`` where a model may write something else
    before, as some do for images. They were made of ``prompts``, ``plan`` and the tokens ``given``, if any,
    with ``placeholder_id``.
    """

    prompts: Tensor
    plan: Plan
    given: FusedTokens | None
    placeholder_id: int
    input_ids: Tensor
    tokens: FusedTokens
    demo_ids: Tensor
    cu_demos: Tensor
    starts: Tensor


class EmbeddingHook(ForwardHook):
    """Of the input embedding: fused tokens in the place of placeholders.

    ``prefix`` is that of the last splice, which used one of the ``placeholder_ids``. Behind a whole prompt in
    the cache they are tokens like others: the model may say them, and an assistant or a lookup guess them.
    """

    def __init__(self, embedding: nn.Module, placeholder_ids: tuple[int, int], state: State) -> None:
        super().__init__(embedding)
        self.placeholder_ids, self._state = placeholder_ids, state
        self.prefix: Prefix | None = None
        self._cached: int | Tensor = 0  # tokens; of a static cache a tensor
        self._calls: RemovableHandle | None = None
        self._names = argument_names(state.model.base_model)

    def install(self) -> None:
        super().install()
        if self._calls is None:
            self._calls = self._state.model.base_model.register_forward_pre_hook(
                self._count_cached, with_kwargs=True
            )

    def remove(self) -> None:
        super().remove()
        if self._calls is not None:
            self._calls.remove()
            self._calls = None

    def _count_cached(self, model: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        if self.prefix is not None and isinstance(ids, Tensor) and ids.shape[-1] > 1:
            self._cached = 0 if cache is None else cache.get_seq_length()

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        prefix, ids = self.prefix, args[0]
        if prefix is None or ids.dim() != 2 or ids.shape[1] == 1:  # a step of decoding
            return output
        R, L = prefix.input_ids.shape
        begun, self._cached = self._cached >= L, 0
        if begun is True:
            return output
        one, other = self.placeholder_ids
        placeholders = ((ids == one) | (ids == other)).any(-1)
        if isinstance(begun, Tensor):
            placeholders &= ~begun.to(ids.device)
        if ids.shape[0] % R != 0 or ids.shape[1] < L:
            torch._assert_async(~placeholders.any(), self._complaint)
            return output
        # Beams of a request lie together; a prompt that is read again without a cache has grown at its end.
        expected = prefix.input_ids[:, None]
        same = (ids[:, :L].unflatten(0, (R, -1)) == expected) | (expected == ANY)
        spliced = same.flatten(2).all(-1)
        torch._assert_async((spliced | ~placeholders.view_as(spliced)).all(), self._complaint)
        starts = prefix.starts.where(spliced.all(-1), ids.shape[1])  # a plain prompt stays as it is
        return prefix_splice_(
            output, prefix.tokens.rows, prefix.tokens.offsets, prefix.demo_ids, prefix.cu_demos, starts,
            bank_scale=prefix.tokens.scale, impl=self._state.impl,
        )  # fmt: skip

    @property
    def _complaint(self) -> str:
        return (
            f"input_ids have a placeholder {self.placeholder_ids} of fused tokens but are not those that the "
            "last splice() returned, whole (chunked prefill is not supported)"
        )


class Splicer:
    """What ``Handle.splice`` works with: a bank, or tokens given to it, and the hook of the embedding."""

    def __init__(
        self, state: State, bank: DemonstrationBank | None, bank_bytes: int,
        placeholder_ids: tuple[int, int] | None,
    ) -> None:  # fmt: skip
        """``bank_bytes`` bounds what of the bank is kept on the device; unused on the CPU, which maps it."""
        model = state.model
        self.bank, self._model = bank, model
        embedding = model.get_input_embeddings()
        self.device = compute_device(embedding)
        ids = choose_placeholders(model) if placeholder_ids is None else placeholder_ids
        check_placeholders(ids, embedding)
        on_cpu = bank is None or self.device.type == "cpu"
        self._working_set = None if on_cpu else bank.working_set(self.device, bank_bytes)
        self.hook, self._turns = EmbeddingHook(embedding, ids, state), cycle(ids)

    # Inference tensors could not be used outside of inference mode.
    @torch.inference_mode(False)
    def splice(
        self, adapter: Adapter, inputs: Mapping[str, object], demonstrations: Sequence[Sequence[int]] | None,
        max_length: int | None, tokens: FusedTokens | None,
    ) -> dict[str, object]:  # fmt: skip
        """Learned tokens of ``adapter`` are those of one demonstration, which every prompt has."""
        ids, own = _own_tokens(inputs)
        if not adapter.fuses:
            _refuse_demonstrations(adapter, demonstrations, tokens)
            demonstrations, tokens = [[0]] * len(ids), _as_demonstration(adapter.learned_tokens())
        self._check(max_length, tokens)
        lengths = self.bank.lengths if tokens is None else tokens.offsets.diff().cpu()
        check_demonstrations(demonstrations, len(ids), len(lengths))
        lengths = {x: int(lengths[x]) for x in set().union(*demonstrations)}
        bos = torch.tensor(special_ids(self._model.config.get_text_config(), "bos_token_id"))
        first = ids.gather(1, own.int().argmax(1, keepdim=True)).flatten()
        leading = torch.isin(first, bos.to(first)).int().tolist()
        plan = lay_out(own, leading, demonstrations, lengths, max_length)
        if not adapter.fuses and len(plan.demonstrations) < len(ids):
            raise ValueError(
                f"max_length is {max_length}, expected room for {lengths[0]} learned tokens beside a prompt"
            )
        placeholder_id = self._turn(ids, plan, tokens)
        grown = grow(inputs, plan, placeholder_id, self._pad_id(), family_of(self._model).per_image)
        made = self._made(grown["input_ids"], plan, tokens)
        self.hook.prefix = Prefix(ids, plan, tokens, placeholder_id, *made)
        return grown

    def _turn(self, ids: Tensor, plan: Plan, tokens: FusedTokens | None) -> int:
        """A placeholder's id. They take turns, so that prompts of the splice before are not taken for these.

        Where they are these, with the same tokens, the result is the same too.
        """
        last = self.hook.prefix
        repeated = last is not None and last.given is tokens and last.plan.equals(plan)
        if repeated and torch.equal(last.prompts, ids):
            return last.placeholder_id
        return next(self._turns)

    def _check(self, max_length: int | None, tokens: FusedTokens | None) -> None:
        embedding = self._model.get_input_embeddings()
        if embedding is not self.hook.module:
            raise RuntimeError("the model has another input embedding than at attach(): attach again")
        check_placeholders(self.hook.placeholder_ids, embedding)
        if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int)):
            raise TypeError(f"max_length is {max_length!r}, expected an int or None")
        if tokens is None and self.bank is None:
            raise ValueError("no bank is attached, expected attach(model, adapter, bank=...) or tokens=")
        if tokens is not None and not isinstance(tokens, FusedTokens):
            raise TypeError(f"tokens is a {type(tokens).__name__}, expected FusedTokens")

    def _made(self, ids: Tensor, plan: Plan, tokens: FusedTokens | None) -> tuple:
        """The further fields of a prefix: what the embedding is asked for and what it answers."""
        chosen = plan.demonstrations
        if tokens is None and self._working_set is not None:
            tokens, chosen = self._working_set.load(chosen)
        elif tokens is None:
            self.bank.prefetch(set(chosen))
            tokens = self.bank.fused
        cu_demos = [0, *accumulate(plan.counts)]
        numbers = (torch.tensor(x, dtype=torch.int64) for x in (chosen, cu_demos, plan.starts))
        images = visual_tokens(self._model, ids) | (ids >= self.hook.module.weight.shape[0])
        ids = ids.masked_fill(images, ANY).to(self.device)
        return ids, tokens, *(x.to(self.device) for x in numbers)

    def _pad_id(self) -> int:
        text = self._model.config.get_text_config()
        found = [*special_ids(text, "pad_token_id"), *special_ids(text, "eos_token_id"), 0]
        return next(token for token in found if token >= 0)  # hidden by the mask, whichever it is


def _refuse_demonstrations(adapter: Adapter, demonstrations: object, tokens: object) -> None:
    for name, given in (("demonstrations", demonstrations), ("tokens", tokens)):
        if given is not None:
            raise ValueError(
                f"{name} was given, expected none: the tokens of a {type(adapter).__name__} are its own"
            )


def _as_demonstration(rows: Tensor) -> FusedTokens:
    return FusedTokens(rows, torch.tensor([0, len(rows)], device=rows.device), None)


def _own_tokens(inputs: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """The ids, and where the mask keeps them, both on the CPU."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"input_ids is {_described(ids)}, expected ids [R, T] of at least one token")
    mask = inputs.get("attention_mask")
    if mask is None:
        return ids.cpu(), torch.ones(ids.shape, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {_described(mask)}, expected {list(ids.shape)} like input_ids")
    own = mask.bool().cpu()
    if not own.any(-1).all():
        raise ValueError("attention_mask hides every token of a prompt, expected at least one")
    return ids.cpu(), own


def _described(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_demonstrations(demonstrations: object, R: int, count: int) -> None:
    """Raise TypeError or ValueError unless they are R sequences of ids below ``count``."""
    if not isinstance(demonstrations, Sequence) or any(not isinstance(x, Sequence) for x in demonstrations):
        raise TypeError(f"demonstrations is {demonstrations!r}, expected a list of ids for each prompt")
    if len(demonstrations) != R:
        raise ValueError(f"demonstrations has {len(demonstrations)} lists, expected {R} like input_ids")
    for chosen in demonstrations:
        for demonstration in chosen:
            if isinstance(demonstration, bool) or not isinstance(demonstration, int):
                raise TypeError(f"demonstrations has {demonstration!r}, expected an id, an int")
            if not 0 <= demonstration < count:
                raise ValueError(f"demonstrations has id {demonstration}, expected 0 to {count - 1}")


def check_placeholders(placeholder_ids: object, embedding: nn.Module) -> None:
    """Raise unless they are two that the embedding has, which looks them up before they are overwritten."""
    if not isinstance(placeholder_ids, tuple) or any(type(x) is not int for x in placeholder_ids):
        raise TypeError(f"placeholder_ids is {placeholder_ids!r}, expected a tuple of two ints")
    size = embedding.weight.shape[0]
    if len(set(placeholder_ids)) != 2 or not all(0 <= x < size for x in placeholder_ids):
        raise ValueError(f"placeholder_ids is {placeholder_ids}, expected two ids from 0 to {size - 1}")


def choose_placeholders(model: nn.Module) -> tuple[int, int]:
    """The two largest ids of the input embedding that the configuration gives no meaning to.

    Nor to their neighbours: Idefics2's marks around images are beside the image's own id, and not named.
    """
    configs = (model.config, getattr(model, "generation_config", None))
    named = {token for config in configs if config is not None for _, token in named_ids(config)}
    special = {token + step for token in named for step in (-1, 0, 1)}
    size = model.get_input_embeddings().weight.shape[0]
    free = (token for token in reversed(range(size)) if token not in special)
    return next(free), next(free)
