"""Writing text with a trained model: one pass over the prompt, then one token at a time over a key/value cache.

Several samples share the prompt's pass. When the context is full, the older half is forgotten and the newer half read
again, once per half context: no token is paid for more than twice, whatever the positions are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tinylm.generation.sampling import SamplingOptions, choose, penalised
from tinylm.model.cache import KeyValueCache
from tinylm.model.transformer import Transformer
from tinylm.tokenizer import StreamDecoder, Tokenizer

OnText = Callable[[int, str], None]


@dataclass
class Sample:
    """What was written after a prompt. `finish_reason`: stop (a stop text), end (end of text) or length."""

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    tokens_per_second: float = 0.0


def generate(
    network: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    options: SamplingOptions,
    *,
    count: int = 1,
    seed: int = 0,
    on_text: OnText | None = None,
) -> list[Sample]:
    """`count` continuations of a prompt; the empty prompt starts a new document.

    Sample i depends on (seed, i) alone. `on_text(i, text)` hears text as it becomes certain: whole characters that no
    stop text can still take back.
    """
    writers = [_Writer(index, prompt, tokenizer, options.stop, on_text) for index in range(count)]
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text or 0]
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63) for index in range(count)]
    start = time.perf_counter()
    was_training = network.training
    network.eval()
    try:
        for chosen in _tokens(network, ids, options, generators):
            for writer, id in zip(writers, chosen, strict=True):
                writer.push(id, tokenizer.end_of_text)
            if all(writer.finished for writer in writers):
                break
    finally:
        network.train(was_training)
    seconds = max(time.perf_counter() - start, 1e-9)
    for writer in writers:
        writer.finish()
        writer.sample.tokens_per_second = len(writer.sample.token_ids) / seconds
    return [writer.sample for writer in writers]


@torch.inference_mode()
def _tokens(
    network: Transformer, prompt: Sequence[int], options: SamplingOptions, generators: list[torch.Generator]
) -> Iterator[list[int]]:
    """The next id of every sample, up to `max_new_tokens` times."""
    if options.max_new_tokens == 0:
        return
    parameter = next(network.parameters())
    context, batch = network.model.context_length, len(generators)
    prompt = list(prompt)
    cache = KeyValueCache(network.model, 1, context, device=parameter.device, dtype=parameter.dtype)
    history = torch.tensor([prompt[-context:]], device=parameter.device)
    logits = _last_logits(network, history, cache).expand(batch, -1)
    cache.expand(batch)
    history = history.expand(batch, -1)
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=parameter.device)
    seen[:, torch.tensor(prompt, device=parameter.device)] = True
    for position in range(options.max_new_tokens):
        chosen = choose(penalised(logits, seen, options.repetition_penalty), options, generators)
        seen.scatter_(1, chosen[:, None], True)
        yield chosen.tolist()
        if position == options.max_new_tokens - 1:
            return
        history = torch.cat((history[:, -context + 1 :] if context > 1 else history[:, :0], chosen[:, None]), dim=1)
        if cache.length < context:
            logits = _last_logits(network, chosen[:, None], cache)
        else:
            cache.clear()
            logits = _last_logits(network, history[:, -max(1, context // 2) :], cache)


def _last_logits(network: Transformer, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """(B, V) after the last of `tokens`, which continue the cache."""
    return network.logits(network.hidden(tokens, cache)[:, -1])


class _Writer:
    """Turns one sample's ids into text: whole characters, up to a stop text."""

    def __init__(self, index: int, prompt: str, tokenizer: Tokenizer, stop: tuple[str, ...], on_text: OnText | None) -> None:
        self.sample = Sample(prompt)
        self.finished = False
        self._index = index
        self._decoder: StreamDecoder = tokenizer.stream_decoder()
        self._stop = stop
        self._on_text = on_text
        self._shown = 0

    def push(self, id: int, end_of_text: int | None) -> None:
        if self.finished:
            return
        if id == end_of_text:
            self.sample.finish_reason, self.finished = "end", True
            return
        self.sample.token_ids.append(id)
        self._take(self._decoder.push(id))

    def finish(self) -> None:
        if self.sample.finish_reason != "stop":
            self._take(self._decoder.finish())
        self._show(len(self.sample.text))

    def _take(self, text: str) -> None:
        before = len(self.sample.text)
        self.sample.text += text
        longest = max((len(stop) for stop in self._stop), default=0)
        found = [at for stop in self._stop if (at := self.sample.text.find(stop, max(0, before - longest + 1))) >= 0]
        if found:
            self.sample.text = self.sample.text[: min(found)]
            self.sample.finish_reason, self.finished = "stop", True
        self._show(len(self.sample.text) if self.finished else len(self.sample.text) - self._held_back())

    def _held_back(self) -> int:
        """How many last characters could still become the beginning of a stop text."""
        text = self.sample.text
        return max(
            (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])),
            default=0,
        )

    def _show(self, end: int) -> None:
        if self._on_text is not None and end > self._shown:
            self._on_text(self._index, self.sample.text[self._shown : end])
            self._shown = end
