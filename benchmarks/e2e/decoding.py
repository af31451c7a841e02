"""Ways to answer a prompt, and how long each takes: to the first token, and for each further one.

Greedy decoding is a loop of our own, the model's forward and an argmax: what is timed is the model and
not the bookkeeping of ``generate``. "beams" is ``generate`` all the same, as published times are of it.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

NEW_TOKENS = 20  # of an answer, as in the published times
BEAMS = 3
WARM_UPS = 3  # before a capture: workspaces and kernels are made in the first calls

Inputs = dict[str, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Stopwatch:
    """Milliseconds on ``device``; on CUDA between events, from an idle device to the end of the work."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def start(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._start.record()
        else:
            self._start = time.perf_counter()

    def stop(self) -> float:
        if not self._cuda:
            return 1e3 * (time.perf_counter() - self._start)
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


class Decoder(ABC):
    """Answers one prompt, batch 1, as often as asked."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs

    @abstractmethod
    def begin(self) -> None:
        """Start a new answer with an empty cache; not timed."""

    @abstractmethod
    def prefill(self) -> Tensor:
        """Read the prompt: the logits ``[1, 1, V]`` of the first token."""

    @abstractmethod
    def step(self, token: Tensor) -> Tensor:
        """Append ``token [1, 1]``: the logits ``[1, 1, V]`` of the next one."""

    @torch.no_grad()
    def sample(self, stopwatch: Stopwatch) -> tuple[float, float]:
        """Milliseconds to the first token, and of each further one, of one answer of ``NEW_TOKENS``."""
        self.begin()
        stopwatch.start()
        token = self.prefill().argmax(-1)
        first = stopwatch.stop()
        stopwatch.start()
        for _ in range(NEW_TOKENS - 1):
            token = self.step(token).argmax(-1)
        return first, stopwatch.stop() / (NEW_TOKENS - 1)

    @torch.no_grad()
    def forced_logits(self, tokens: Tensor) -> Tensor:
        """Logits ``[1, 1 + N, V]`` in fp32 after the prompt and each of ``tokens [1, N]``, whatever they say.

        Greedy tokens would not do to compare two decoders: one rounding can change all that follow.
        """
        self.begin()
        logits = [self.prefill().float()]
        for token in tokens.split(1, dim=1):
            logits.append(self.step(token).float().clone())  # a CUDA graph writes to the same place again
        return torch.cat(logits, dim=1)


class Eager(Decoder):
    """A dynamic cache, every operation launched from Python."""

    def begin(self) -> None:
        self._cache = DynamicCache(config=self.model.config)

    def prefill(self) -> Tensor:
        return self._forward(**self.inputs)

    def step(self, token: Tensor) -> Tensor:
        return self._forward(input_ids=token)

    def _forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits


class _Static(Decoder):
    """A static cache; positions and mask are made between the steps, as ``generate`` does.

    Reading the prompt is neither compiled nor captured, as in ``generate``.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__(model, inputs)
        ids = inputs["input_ids"]
        self._length, slots = ids.shape[1], ids.shape[1] + NEW_TOKENS
        self._cache = StaticCache(config=model.config, max_cache_len=slots)
        self._slots = torch.arange(slots, device=ids.device)[None, None, None]
        self._position = ids.new_zeros(1, 1)
        self._mask = torch.zeros(1, 1, 1, slots, dtype=torch.bool, device=ids.device)
        self._ready: Forward | None = None

    def begin(self) -> None:
        self._cache.reset()
        self._position.fill_(self._length)

    def prefill(self) -> Tensor:
        return self.model(**self.inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits

    def step(self, token: Tensor) -> Tensor:
        torch.le(self._slots, self._position, out=self._mask)
        if self._ready is None:  # now that the cache has its memory
            self._ready = self._prepare(token)
        logits = self._ready(token, self._position, self._mask)
        self._position += 1
        return logits

    @abstractmethod
    def _prepare(self, token: Tensor) -> Forward:
        """``_forward``, made fast; the cache is left as it was."""

    def _forward(self, token: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        return self.model(
            input_ids=token,
            attention_mask=mask,
            position_ids=position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits


class Compiled(_Static):
    """Each step is one graph of torch.compile, and on CUDA replayed as a CUDA graph ("reduce-overhead")."""

    def _prepare(self, token: Tensor) -> Forward:
        cuda = token.device.type == "cuda"
        # On CPU it is only seen to be one graph, which needs no C++ compiler and no time.
        options = {"mode": "reduce-overhead"} if cuda else {"backend": "aot_eager"}
        compiled = torch.compile(self._forward, fullgraph=True, **options)

        def step(token: Tensor, position: Tensor, mask: Tensor) -> Tensor:
            if cuda:
                torch.compiler.cudagraph_mark_step_begin()  # the last step's logits are done with
            return compiled(token, position, mask)

        return step


class Graph(_Static):
    """Each step is a CUDA graph of what PyTorch launches: no compiler, and no launches to pay for.

    There are no such graphs on the CPU, where it is a plain static cache.
    """

    def _prepare(self, token: Tensor) -> Forward:
        if token.device.type != "cuda":
            return self._forward
        held, position, mask = token.clone(), self._position.clone(), self._mask.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a capture must not see first-call work
            for _ in range(WARM_UPS):
                self._forward(held, position, mask)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward(held, position, mask)
        self._rewind(WARM_UPS)

        def step(token: Tensor, new_position: Tensor, new_mask: Tensor) -> Tensor:
            held.copy_(token)
            position.copy_(new_position)
            mask.copy_(new_mask)
            graph.replay()
            return logits

        return step

    def _rewind(self, steps: int) -> None:
        """Forget the last ``steps`` tokens; their rows are overwritten, and masked until then."""
        for layer in self._cache.layers:
            layer.cumulative_length -= steps


class Beams:
    """``generate`` with three beams and a dynamic cache."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs

    def sample(self, stopwatch: Stopwatch) -> tuple[float, float]:
        """As papers time it: an answer of one token, and the rest of a longer one."""
        first, whole = (self._generate(tokens, stopwatch) for tokens in (1, NEW_TOKENS))
        return first, (whole - first) / (NEW_TOKENS - 1)

    def _generate(self, tokens: int, stopwatch: Stopwatch) -> float:
        stopwatch.start()
        self.model.generate(
            **self.inputs,
            num_beams=BEAMS,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        return stopwatch.stop()


MODES: dict[str, type[Decoder] | type[Beams]] = {
    "eager": Eager,
    "graph": Graph,
    "compiled": Compiled,
    "beams": Beams,
}
