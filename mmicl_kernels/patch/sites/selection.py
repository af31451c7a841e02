"""Which tokens of a forward pass the adapters act on: hooks of the whole model that say so to every site."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmicl_kernels.models.tokens import special_ids, visual_ids
from mmicl_kernels.patch.sites.hooks import ForwardHook
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

    ``chosen`` are those of the last pass, bool ``[B, T]``. Where ``tokens`` is None all are, and nothing is
    in the model. A prompt is what ``generate`` is given, elsewhere what a pass with an empty cache sees. What
    differs between prompts and names is in tensors, which are not read: compiled graphs fit them all.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model.base_model)
        self._model, self._device = model, device
        self._visual = torch.tensor(visual_ids(model), dtype=torch.long, device=device)
        self._roles = torch.ones(len(CHOSEN_ROLES["all"]), dtype=torch.bool, device=device)
        bos = special_ids(model.config.get_text_config(), "bos_token_id")
        self._bos = torch.tensor(bos, dtype=torch.long, device=device)
        self._before: RemovableHandle | None = None
        self.tokens: str | Tensor | None = None
        self._needs_ids, self._mask = False, None  # of ``tokens``, which compiled graphs must not depend on
        self.is_on, self.is_generating, self._is_running = False, False, False
        self.chosen: Tensor | None = None
        self._length, self._last = (torch.zeros(n, dtype=torch.long, device=device) for n in ((), 1))
        self._from_end = torch.zeros(1, 1, dtype=torch.long, device=device)  # counts a prompt's own tokens
        self._columns: Tensor | None = None

    # Inference tensors could not be changed again outside of inference mode.
    @torch.inference_mode(False)
    def choose(self, tokens: str | Tensor | None) -> None:
        """Raises TypeError, ValueError as ``Handle.tokens``; None is all, and takes the hooks away."""
        check_tokens(tokens)
        self.tokens, self.is_on, self.chosen, self._columns = tokens, tokens is not None, None, None
        self._mask = tokens.to(self._device) if isinstance(tokens, Tensor) else None
        self._needs_ids = isinstance(tokens, str) and tokens in NEED_IDS
        if isinstance(tokens, str):
            self._roles.copy_(torch.tensor(CHOSEN_ROLES[tokens]))

    def install(self) -> None:
        super().install()
        if self._before is None:
            self._before = self.module.register_forward_pre_hook(self._find, with_kwargs=True)
        if "generate" not in vars(self._model) and hasattr(self._model, "generate"):
            self._model.generate = GenerateCall(self._model, self)

    def remove(self) -> None:
        super().remove()
        if self._before is not None:
            self._before.remove()
            self._before = None
        if isinstance(vars(self._model).get("generate"), GenerateCall):
            del self._model.generate

    def of(self, x: Tensor) -> Tensor | None:
        """Which tokens of ``x [B, T, ...]`` are chosen, bool ``[B, T]``; None for all.

        Raises RuntimeError: the model itself was not called, and cannot say which tokens these are.
        """
        if not self.is_on:
            return None
        self._check_known()
        return self.chosen.to(x.device).reshape(x.shape[:2])  # mixtures of experts return them in one row

    def slots(self, x: Tensor, readout: int) -> tuple[Tensor, Tensor]:
        """Of the tokens of ``x [B, T, C]`` their slots and ``1 / sqrt`` of how many a prompt has there.

        Slot 0 are the last ``readout`` tokens of a prompt, 1 those before them, -1 all others: what begins a
        text, padding, what a mask leaves out, generated tokens. Both ``[B, T]``, int32 and fp32. Raises as
        :meth:`of`.
        """
        self._check_known()
        B, T = x.shape[:2]
        from_end, L = for_batch(self._from_end, B, "tokens()"), self._from_end.shape[1]
        place = from_end[:, self._columns.clamp(max=L - 1)] * (self._columns < L)
        slot = torch.where(place > readout, 1, torch.where(place > 0, 0, -1))
        count = from_end.amax(1, keepdim=True)
        count = torch.where(slot == 1, count - readout, count.clamp(max=readout)).clamp(min=1)
        chosen = self.of(x)
        slot = slot if chosen is None else slot.where(chosen, -1)
        return slot.int().to(x.device), count.float().rsqrt().to(x.device)

    def _check_known(self) -> None:
        # A backward pass may repeat parts of the last forward pass.
        known = torch.compiler.is_compiling() or self._is_running or torch._C._current_graph_task_id() != -1
        if self._columns is None or not known:
            raise RuntimeError(
                f"a part of the {type(self._model).__name__} was called by itself, expected a call of the "
                f"whole: which tokens these are is not known, and tokens() is {_described(self.tokens)}"
            )

    def begin(
        self, first: int | Tensor, ids: Tensor | None, T: int, attention_mask: object
    ) -> None:  # fmt: skip
        """The next T tokens, ``ids`` if they are known, are the prompt if the cache before them is empty,
        ``first == 0``."""
        if isinstance(first, int) and first > 0:
            return
        if self._mask is not None and self._mask.shape[1] < T:
            raise ValueError(
                f"tokens() is a mask {list(self._mask.shape)}, expected one of at least {T} columns, the "
                "prompt's"
            )
        length, last = torch.full_like(self._length, T), _last_columns(attention_mask, T).to(self._device)
        if isinstance(first, Tensor):
            length = torch.where(first == 0, length, self._length)
            last = torch.where(first == 0, last, self._last)
        self._length, self._last = length, last
        if isinstance(first, int) or T > 1:
            self._from_end = self._counted(ids, T, attention_mask)

    def _find(self, module: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        ids = inputs.get("input_ids", args[0] if args else None)
        embeddings = inputs.get("inputs_embeds")
        (B, T), cache = (embeddings if ids is None else ids).shape[:2], inputs.get("past_key_values")
        first = 0 if cache is None else cache.get_seq_length()
        if isinstance(first, Tensor):
            first = first.to(self._device)
        if not self.is_generating:
            self.begin(first, ids, T, inputs.get("attention_mask"))
        self._columns = columns = first + torch.arange(T, device=self._device)
        if not self.is_on:
            self.chosen = None
        elif self._mask is not None:
            self.chosen = self._of_mask(self._mask, columns, B)
        else:
            self.chosen = self._roles[self._role_of(ids, columns, B)]
        self._is_running = True

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._is_running = False

    def _counted(self, ids: Tensor | None, T: int, attention_mask: object) -> Tensor:
        """Of each of a prompt's tokens how many follow it up to the last, itself included; of others 0."""
        own = torch.ones(1 if ids is None else len(ids), T, dtype=torch.bool, device=self._device)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            own = own & attention_mask[:, :T].bool().to(self._device)
        if self._mask is not None:
            own = own & for_batch(self._mask, len(own), "tokens()")[:, :T]
        if ids is not None:
            begins = (ids.to(self._device)[..., None] == self._bos).any(-1)
            own = own & ~(begins & (own.cumsum(-1) == 1))
        return own.int().flip(-1).cumsum(-1).flip(-1) * own

    def _of_mask(self, mask: Tensor, columns: Tensor, B: int) -> Tensor:
        L = mask.shape[1]
        return for_batch(mask, B, "tokens()")[:, columns.clamp(max=L - 1)] & (columns < L)

    def _role_of(self, ids: Tensor | None, columns: Tensor, B: int) -> Tensor:
        """Of each token its place in ``CHOSEN_ROLES``."""
        prompt = (columns < self._length).expand(B, -1)
        image = torch.zeros_like(prompt)
        if ids is not None:
            image = prompt & (ids.to(self._device)[..., None] == self._visual).any(-1)
        elif self._needs_ids:
            raise ValueError(
                f"tokens() is {self.tokens!r} and the model was given inputs_embeds, expected input_ids or a "
                "mask: embeddings do not say which of them are images"
            )
        last = columns == for_batch(self._last, B, "tokens()")[:, None]
        return prompt.int() + image.int() + 2 * last.int()


class GenerateCall:
    """``model.generate``, which says what the prompt is before it is read in pieces, or guesses are."""

    def __init__(self, model: nn.Module, selection: TokenSelection) -> None:
        self._model, self._selection = model, selection

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generate, selection = type(self._model).generate, self._selection
        prompt = next((x for x in (*_prompts(kwargs), *args[:1]) if x is not None), None)
        if prompt is None or selection.is_generating:  # a model may be its own assistant
            return generate(self._model, *args, **kwargs)
        ids = None if prompt.is_floating_point() else prompt
        selection.begin(0, ids, prompt.shape[1], kwargs.get("attention_mask"))
        selection.is_generating = True
        try:
            return generate(self._model, *args, **kwargs)
        finally:
            selection.is_generating = False


def _prompts(inputs: dict[str, Any]) -> list[Tensor | None]:
    return [inputs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")]


def check_tokens(tokens: object) -> None:
    """Raise TypeError or ValueError unless they are a name or a mask, or None."""
    if isinstance(tokens, Tensor):
        if tokens.dtype != torch.bool or tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens is {_described(tokens)}, expected a name or bool [rows, columns]")
    elif not isinstance(tokens, str | None):
        raise TypeError(f"tokens is {tokens!r}, expected a name or a bool tensor")
    elif tokens is not None and tokens not in CHOSEN_ROLES:
        raise ValueError(f"tokens is {tokens!r}, expected one of {sorted(CHOSEN_ROLES)} or a bool tensor")


def _described(tokens: str | Tensor | None) -> str:
    return repr(tokens) if isinstance(tokens, str | None) else f"{tokens.dtype} {list(tokens.shape)}"


def _last_columns(attention_mask: object, T: int) -> Tensor:
    """The last column that a mask ``[B, S]`` shows of the first T; T - 1 where there is no such mask."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return torch.tensor([T - 1])
    return T - 1 - attention_mask[:, :T].flip(-1).int().argmax(-1)
