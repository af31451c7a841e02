"""Which tokens of a forward pass the adapters act on: hooks of the whole model that say so to every site."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmicl_kernels.models.anchors import Anchor, family_of
from mmicl_kernels.models.tokens import special_ids, visual_ids
from mmicl_kernels.patch.sites.hooks import ForwardHook, argument_names
from mmicl_kernels.patch.sites.passes import Pass, Prompt, read_prompt
from mmicl_kernels.patch.slots import for_batch

# A token is generated; text or image of the prompt; or one of these as the prompt's last token.
CHOSEN_ROLES = {
    "all": (True, True, True, True, True),
    "prompt": (False, True, True, True, True),
    "generated": (True, False, False, False, False),
    "last": (False, False, False, True, True),
    "text": (True, True, False, True, False),
    "image": (False, False, True, False, True),
}
NEED_IDS = ("text", "image")


class TokenSelection(ForwardHook):
    """The tokens that ``Handle.tokens`` names, found anew in every forward pass of ``model``.

    ``current`` is the last pass. Where ``tokens`` is None all tokens are chosen. A prompt is what
    ``generate`` is given, elsewhere what a pass with an empty cache sees; the cache keeps it. What differs
    between prompts and names is in tensors, which are not read: compiled graphs fit them all.
    """

    always_call = True

    def __init__(self, model: nn.Module, anchors: list[Anchor], device: torch.device) -> None:
        reads = family_of(model).reads
        super().__init__(model.get_submodule(reads) if reads else model.base_model)
        self._model, self._device, self._names = model, device, argument_names(self.module)
        self._shares_kv = any(anchor.decoder.shares_kv for anchor in anchors)
        self._visual = self._ids(visual_ids(model))
        self._begins = self._ids(special_ids(model.config.get_text_config(), "bos_token_id"))
        self._roles = torch.ones(len(CHOSEN_ROLES["all"]), dtype=torch.bool, device=device)
        self._before: RemovableHandle | None = None
        self.tokens: str | Tensor | None = None
        self._needs_ids, self._mask = False, None  # of ``tokens``, which compiled graphs must not depend on
        self.is_on = self.is_installed = self.is_running = self.is_generating = False
        self.current: Pass | None = None
        self._given: Prompt | None = None  # to ``generate``, and not to a cache yet

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._device)

    # Inference tensors could not be changed again outside of inference mode.
    @torch.inference_mode(False)
    def choose(self, tokens: str | Tensor | None) -> None:
        """Raises TypeError, ValueError as ``Handle.tokens``; None is all, and takes the hooks away."""
        check_tokens(tokens)
        if isinstance(tokens, str) and tokens == "image" and not len(self._visual):
            raise ValueError(
                f"tokens is 'image', expected another: the configuration of the {type(self._model).__name__} "
                "names no ids of images"
            )
        mask = tokens.to(self._device, copy=True) if isinstance(tokens, Tensor) else None
        if isinstance(tokens, str):
            self._roles.copy_(torch.tensor(CHOSEN_ROLES[tokens]))
        self.tokens, self._mask, self.is_on = tokens if mask is None else mask, mask, tokens is not None
        self._needs_ids = isinstance(tokens, str) and tokens in NEED_IDS

    def install(self) -> None:
        super().install()
        if self.is_installed:
            return
        self.is_installed = True
        self._before = self.module.register_forward_pre_hook(self._find, with_kwargs=True)
        if hasattr(self._model, "generate"):
            self._model.generate = GenerateCall(self._model, self, vars(self._model).get("generate"))

    def remove(self) -> None:
        super().remove()
        if not self.is_installed:
            return
        self.is_installed = False
        self._before.remove()
        self._before = self.current = None
        call = vars(self._model).get("generate")
        if isinstance(call, GenerateCall):
            call.restore()

    def of(self, x: Tensor) -> Tensor | None:
        """Which tokens of ``x [B, T, ...]`` are chosen, bool ``[B, T]``; None for all.

        Raises RuntimeError: the model itself was not called, and cannot say which tokens these are.
        """
        chosen = self._known().chosen if self.is_installed else None
        if chosen is None:
            return None
        chosen = chosen.to(x.device)
        if self._shares_kv and x.shape[0] == len(chosen):
            chosen = chosen[:, -x.shape[1] :]  # layers that read others' keys may see the last tokens alone
        return chosen.reshape(x.shape[:2])  # mixtures of experts return them in one row

    def slots(self, x: Tensor, readout: int) -> tuple[Tensor, Tensor]:
        """Of the tokens of ``x [B, T, C]`` their slots and ``1 / sqrt`` of how many a prompt has there.

        Slot 0 are the last ``readout`` tokens of a prompt, 1 those before them, -1 all others: what begins a
        text, padding, what a mask leaves out, generated tokens. Both ``[B, T]``, int32 and at least fp32.
        Raises as :meth:`of`.
        """
        columns, prompt, chosen = self._known()
        from_end = prompt.of_batch(x.shape[0]).from_end
        L = from_end.shape[1]
        place = from_end[:, columns.clamp(max=L - 1)] * (columns < L)
        slot = torch.where(place > readout, 1, torch.where(place > 0, 0, -1))
        count = from_end.amax(1, keepdim=True)
        count = torch.where(slot == 1, count - readout, count.clamp(max=readout)).clamp(min=1)
        slot = slot if chosen is None else slot.where(chosen, -1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return slot.int().to(x.device), count.to(x.device, dtype).rsqrt()

    def _known(self) -> Pass:
        known = torch.compiler.is_compiling() or self.is_running or is_backward()
        if self.current is None or not known:
            raise RuntimeError(
                f"a part of the {type(self._model).__name__} was called by itself, expected a call of the "
                f"whole: which tokens these are is not known, and tokens() is {_described(self.tokens)}"
            )
        return self.current

    def read(
        self, ids: Tensor | None, rows: int, first: int | Tensor, T: int, attention_mask: object,
        length: int | None = None,
    ) -> Prompt:  # fmt: skip
        """The prompt of ``rows`` of which T tokens, with their ids if known, stand behind ``first``.

        It has ``length`` tokens. By default a mask says which: all that it marks, of T or more that may be
        read later; else it is these T. Raises ValueError: the mask is shorter, or does not fit the rows.
        """
        counted = self._mask
        is_cached = isinstance(first, int) and first > 0
        if counted is not None and counted.shape[1] < T and not is_cached:
            raise ValueError(
                f"tokens() is a mask {list(counted.shape)}, expected one of at least {T} columns, the "
                "prompt's"
            )
        if length is None:
            length = T if counted is None else counted.shape[1]
        if counted is not None:
            counted = for_batch(counted, rows, "tokens()")[:, :length]
        mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        if mask is not None:  # later columns may be hidden as long as they are empty
            mask = mask[:, : first + T if is_cached else T]
        return read_prompt(ids, first == 0, length, mask, counted, self._begins)

    @contextmanager
    def expecting(self, prompt: Prompt | None) -> Iterator[None]:
        """While ``generate`` runs, which reads ``prompt`` first; None: what it reads is not known before."""
        before = self._given, self.is_generating
        self._given, self.is_generating = prompt, True
        try:
            yield
        finally:
            self._given, self.is_generating = before

    def _find(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        (B, T), cache = (embeddings if ids is None else ids).shape[:2], inputs.get("past_key_values")
        first = 0 if cache is None else cache.get_seq_length()
        if isinstance(first, Tensor):
            first = first.to(self._device)
        prompt = self._prompt(cache, first, ids, (B, T), inputs.get("attention_mask"))
        columns, chosen = first + torch.arange(T, device=self._device), None
        if self._mask is not None:
            L = self._mask.shape[1]
            mask = for_batch(self._mask, B, "tokens()")
            chosen = mask[:, columns.clamp(max=L - 1)] & (columns < L)
        elif self.is_on:
            chosen = self._roles[self._role_of(ids, columns, prompt, B)]
        self.current, self.is_running = Pass(columns, prompt, chosen), True

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.is_running = False
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self.current is not None:  # a model may have made it itself
            cache.mmicl_prompt = self.current.prompt

    def _prompt(
        self, cache: Any, first: int | Tensor, ids: Tensor | None, shape: tuple[int, int],
        attention_mask: object,
    ) -> Prompt:  # fmt: skip
        """Of tokens ``[B, T]`` behind ``first`` cached ones: the prompt that they begin, or their cache's."""
        B, T = shape
        if self._given is not None:
            prompt = self._given
            if cache is not None:  # a cache of a second model call within ``generate`` has another prompt
                cache.mmicl_prompt, self._given = prompt, None
            return prompt
        known = getattr(cache, "mmicl_prompt", None)
        if known is not None and (self.is_generating or (isinstance(first, int) and first > 0)):
            return known
        if isinstance(first, int) and first > 0 and self._mask is None:
            raise RuntimeError(
                f"the cache has {first} tokens that were read without tokens(), expected an empty one or a "
                "mask: where their prompt ends is not known"
            )
        prompt = self.read(ids, B, first, T, attention_mask)
        if isinstance(first, Tensor) and known is not None:
            prompt = prompt.unless(first == 0, known, B)
        if cache is not None:
            cache.mmicl_prompt = prompt
        return prompt

    def _role_of(self, ids: Tensor | None, columns: Tensor, prompt: Prompt, B: int) -> Tensor:
        """Of each token its place in ``CHOSEN_ROLES``."""
        inside = (columns < prompt.length).expand(B, -1)
        image = torch.zeros_like(inside)
        if ids is not None:
            image = inside & (ids.to(self._device)[..., None] == self._visual).any(-1)
        elif self._needs_ids:
            raise ValueError(
                f"tokens() is {self.tokens!r} and the model was given inputs_embeds, expected input_ids or a "
                "mask: embeddings do not say which of them are images"
            )
        last = columns == prompt.of_batch(B).last[:, None]
        return inside.int() + image.int() + 2 * last.int()


class GenerateCall:
    """``model.generate``, which says what the prompt is before it is read in pieces, or guesses are."""

    def __init__(self, model: nn.Module, selection: TokenSelection, own: Callable[..., Any] | None) -> None:
        """``own``: what the instance had in its place, if anything."""
        self.__setstate__({"_model": model, "_selection": selection, "_own": own})

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("_model", "_selection", "_own")}

    def __setstate__(self, state: dict[str, object]) -> None:
        functools.update_wrapper(self, type(state["_model"]).generate)
        self.__dict__.update(state)

    def restore(self) -> None:
        if self._own is None:
            del self._model.generate
        else:
            self._model.generate = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        selection = self._selection
        generate = self._own or functools.partial(type(self._model).generate, self._model)
        named = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")]
        prompt = next((x for x in (*named, *args[:1]) if x is not None), None)
        if not isinstance(prompt, Tensor):
            return generate(*args, **kwargs)
        if selection.is_generating:  # the model is its own assistant, which reads the prompt as it comes
            with selection.expecting(None):
                return generate(*args, **kwargs)
        mask, T = kwargs.get("attention_mask"), prompt.shape[1]
        if mask is None:
            mask = self._mask_of(prompt, kwargs)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            T = max(T, mask.shape[1])  # of a cache's tokens too, where the ids are the new ones alone
        is_whole = prompt.shape[1] == T and not prompt.is_floating_point()
        given = selection.read(prompt if is_whole else None, len(prompt), 0, T, mask, length=T)
        with selection.expecting(given):
            return generate(*args, **kwargs)

    def _mask_of(self, prompt: Tensor, options: dict[str, Any]) -> Tensor | None:
        """What ``generate`` takes for the mask where it is given none: padding that does not end a text."""
        configs = [options.get("generation_config"), self._model.generation_config]
        pad, ends = (
            next(
                (x for x in (options.get(name), *(getattr(y, name, None) for y in configs)) if x is not None),
                [],
            )
            for name in ("pad_token_id", "eos_token_id")
        )
        pads, ends = (torch.as_tensor(x, device=prompt.device).flatten() for x in (pad, ends))
        if prompt.is_floating_point() or len(pads) == 0 or torch.isin(pads, ends).any():
            return None
        return prompt != pads


def is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def check_tokens(tokens: object) -> None:
    """Raise TypeError or ValueError unless they are a name or a mask, or None."""
    if isinstance(tokens, Tensor):
        usable = tokens.layout == torch.strided and tokens.device.type != "meta"
        if not usable or tokens.dtype != torch.bool or tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens is {_described(tokens)}, expected a name or bool [rows, columns]")
    elif not isinstance(tokens, str | None):
        raise TypeError(f"tokens is {tokens!r}, expected a name or a bool tensor")
    elif tokens is not None and tokens not in CHOSEN_ROLES:
        raise ValueError(f"tokens is {tokens!r}, expected one of {sorted(CHOSEN_ROLES)} or a bool tensor")


def _described(tokens: str | Tensor | None) -> str:
    if isinstance(tokens, str | None):
        return repr(tokens)
    return f"{tokens.dtype} {list(tokens.shape)}, {tokens.layout}, on {tokens.device}"
