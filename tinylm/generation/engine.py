"""Writing text with a trained model: prompts are read into rows of a cache, and all rows are continued together.

A row that is done makes room for the next prompt at once, so prompts of any lengths share the steps; several samples of one prompt
share its reading. When a row's context is full, its older half is forgotten and the newer half read again, whatever the model's
positions are: learned and sinusoidal ones are part of what the cache holds, so that nothing can be moved, and rotary ones could
be, but a model that never saw the middle of a text without its beginning gets worse. It happens once per half context, so no
token is read more than twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.generation.constraint import Constraint
from tinylm.generation.sampling import SamplingOptions, choose, penalised
from tinylm.model.decoder import Decoder
from tinylm.model.transformer import Transformer
from tinylm.tokenizer import StreamDecoder, Tokenizer

OnText = Callable[[int, str], None]
ROWS = 16
"""Rows that are continued together, when there is so much to write."""
_DRAWS = 256


@dataclass(frozen=True)
class TokenChoice:
    """A token that was written, its log-probability in nats under the model as it is, and the likeliest (id, log-probability)."""

    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass
class Sample:
    """What was written after a prompt. `finish_reason`: stop (a stop text, or nothing may follow), end (end of text) or length.

    `choices` is filled when `logprobs` was asked for.
    """

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    tokens_per_second: float = 0.0
    choices: list[TokenChoice] = field(default_factory=list)


@dataclass
class Request:
    """A sample to be written. `seed` alone decides its random numbers; `on_text` hears text as it becomes certain, whole
    characters that no stop text can still take back, and `on_token` each token (only with `logprobs`).
    """

    prompt: str
    options: SamplingOptions
    seed: int = 0
    constraint: Constraint | None = None
    on_text: Callable[[str], None] | None = None
    on_token: Callable[[TokenChoice], None] | None = None


def generate(
    model: Transformer | Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    options: SamplingOptions,
    *,
    count: int = 1,
    seed: int = 0,
    constraint: Constraint | None = None,
    on_text: OnText | None = None,
) -> list[Sample]:
    """`count` continuations of a prompt; the empty prompt starts a new document. `on_text(i, text)` hears sample i.

    Sample i depends on (seed, i) alone, as does `write`'s i-th: rounding apart, on nothing that is written beside it.
    """

    def listener(index: int) -> Callable[[str], None] | None:
        return None if on_text is None else lambda text: on_text(index, text)

    requests = [Request(prompt, options, sample_seed(seed, index), constraint, listener(index)) for index in range(count)]
    return list(write(model, tokenizer, requests))


def sample_seed(seed: int, index: int) -> int:
    """The seed of the index-th sample of a run that was given `seed`."""
    return (seed * 1_000_003 + index) % 2**63


def write(
    model: Transformer | Decoder, tokenizer: Tokenizer, requests: Sequence[Request], *, rows: int | None = None
) -> Iterator[Sample]:
    """Samples in the order of their requests, `rows` at a time (default: at most 16)."""
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    prompts = [tokenizer.encode(request.prompt) for request in requests]
    longest = max((len(ids) + request.options.max_new_tokens for ids, request in zip(prompts, requests, strict=True)), default=1)
    size = max(1, min(len(requests), rows or ROWS))
    engine = Engine(decoder, tokenizer, size, capacity=min(decoder.model.context_length, longest + 1))
    pending = list(zip(requests, prompts, strict=True))[::-1]
    writers: dict[int, SequenceState] = {}
    order, told = {id(request): index for index, request in enumerate(requests)}, 0
    while pending or engine.busy:
        while pending and engine.free:
            request, ids = pending.pop()
            same = [request]
            while pending and len(same) < engine.free and pending[-1][1] == ids:
                same.append(pending.pop()[0])
            for one, writer in zip(same, engine.add(same, ids), strict=True):
                writers[order[id(one)]] = writer
        engine.step()
        while told in writers and writers[told].done:
            yield writers.pop(told).sample
            told += 1


class Engine:
    """Rows that are being written. `add` reads a prompt into free rows, `step` adds a token to every row, `drop` gives one up."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, rows: int, *, capacity: int | None = None) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.rows = rows
        self._cache = decoder.cache(rows, capacity)
        self._cache.use(0)
        self._writers: list[SequenceState] = []
        self._logits: Tensor | None = None
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._biases: dict[tuple[tuple[int, float], ...], Tensor] = {}
        self._pick = choose
        if decoder.is_machine_code:
            from tinylm.generation import fast_sampling  # which needs numba, as that does

            self._pick = fast_sampling.choose

    @property
    def busy(self) -> bool:
        return bool(self._writers)

    @property
    def free(self) -> int:
        return self.rows - len(self._writers)

    @torch.inference_mode()
    def add(self, requests: Sequence[Request], ids: Sequence[int] | None = None) -> list[SequenceState]:
        """Begin samples of one prompt, which is read once, in rows that are free. `ids`: the prompt, if encoded already."""
        prompt = list(ids if ids is not None else self.tokenizer.encode(requests[0].prompt))
        prompt = prompt or [self.tokenizer.end_of_text or 0]
        writers = [SequenceState(request, prompt, self.tokenizer) for request in requests]
        going = [writer for writer in writers if not writer.done]
        if not going:
            return writers
        first = len(self._writers)
        self._cache.use(first + len(going))
        logits = self.decoder.read(self._cache, first, prompt[-self._cache.capacity :])
        self._cache.share(first, range(first + 1, first + len(going)))
        new = logits.expand(len(going), -1)
        self._logits = new if not first or self._logits is None else torch.cat((self._logits, new))
        self._writers += going
        for row, writer in enumerate(going, first):
            if writer.options.remembers:
                self._remember(row, prompt)
        return writers

    @torch.inference_mode()
    def step(self) -> None:
        """Choose a token in every row; rows that are done leave, the others are ready for the next."""
        if not self._writers or self._logits is None:
            return
        chosen = self._choose(self._logits)
        ids = chosen.tolist()
        for writer, id in zip(self._writers, ids, strict=True):
            writer.push(id)
        for row in reversed(range(len(ids))):
            if self._writers[row].done:
                chosen = self._leave(row, chosen)
        if self._writers:
            for row, writer in enumerate(self._writers):
                if self._cache.lengths[row] == self._cache.capacity:
                    self._forget(row, writer.history)
            self._logits = self.decoder.step(self._cache, chosen)

    @torch.inference_mode()
    def drop(self, writer: SequenceState) -> None:
        """Give up a sample, whoever wanted it having gone."""
        if writer in self._writers:
            row = self._writers.index(writer)
            assert self._logits is not None
            self._logits = self._leave(row, self._logits)

    def _forget(self, row: int, history: list[int]) -> None:
        """Begin the row again with its newer half, of which the last token is still to be added."""
        kept = max(1, self._cache.capacity // 2) - 1
        self._cache.lengths[row] = 0
        if kept:
            self.decoder.read(self._cache, row, history[-kept - 1 : -1])

    def _leave(self, row: int, values: Tensor) -> Tensor:
        """Take a row out; the last one moves into its place, in the cache and in `values` (B, ...)."""
        last = len(self._writers) - 1
        if row != last:
            self._writers[row] = self._writers[last]
            self._cache.take([last], [row])
            for store in (self._seen, self._counts):
                if store is not None:
                    store[row] = store[last]
            values = values.clone()
            values[row] = values[last]
        self._writers.pop()
        self._cache.use(last)
        return values[:last]

    def _remember(self, row: int, prompt: list[int]) -> None:
        if self._seen is None or self._counts is None:
            shape = (self.rows, self.decoder.network.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.decoder.device)
            self._counts = torch.zeros(shape, device=self.decoder.device)
        self._seen[row] = False
        self._seen[row, torch.tensor(prompt, device=self.decoder.device)] = True
        self._counts[row] = 0

    def _choose(self, logits: Tensor) -> Tensor:
        """The next ids (B,): rows that were asked for in the same way are chosen together."""
        options = [writer.options for writer in self._writers]
        if all(one is options[0] or one == options[0] for one in options[1:]):
            return self._chosen(logits, options[0], list(range(len(options))))
        chosen = torch.empty(len(options), dtype=torch.long, device=logits.device)
        for kind in set(options):
            rows = [row for row, one in enumerate(options) if one == kind]
            chosen[rows] = self._chosen(logits[rows], kind, rows)
        return chosen

    def _chosen(self, logits: Tensor, options: SamplingOptions, rows: list[int]) -> Tensor:
        writers = [self._writers[row] for row in rows]
        raw = logits
        if options.logit_bias:
            logits = logits + self._bias(options.logit_bias)
        if options.remembers and self._seen is not None and self._counts is not None:
            logits = penalised(logits, self._seen[rows], self._counts[rows], options)
        if any(writer.restricted for writer in writers):
            logits = logits.clone()
            for row, writer in enumerate(writers):
                writer.restrict(logits[row])
        greedy = options.temperature == 0
        drawn = None if greedy else torch.from_numpy(np.array([writer.draw() for writer in writers]))  # no tensor from a list: slow
        chosen = self._pick(logits, options, drawn)
        if options.remembers and self._seen is not None and self._counts is not None:
            index = torch.tensor(rows, device=logits.device)
            self._seen[index, chosen] = True
            self._counts[index, chosen] += 1
        if options.logprobs is not None:
            for writer, choice in zip(writers, choices(raw, chosen, options.logprobs), strict=True):
                writer.note(choice)
        return chosen

    def _bias(self, biases: tuple[tuple[int, float], ...]) -> Tensor:
        if biases not in self._biases:
            added = torch.zeros(self.decoder.network.vocab_size, device=self.decoder.device)
            for id, bias in biases:
                added[id] += bias
            self._biases = {biases: added}  # one is enough: who mixes them pays
        return self._biases[biases]


def choices(logits: Tensor, chosen: Tensor, alternatives: int) -> list[TokenChoice]:
    """What was chosen (B,) from logits (B, V), with its log-probability and the likeliest alternatives."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, chosen[:, None]).squeeze(1).tolist()
    top = logprobs.topk(min(alternatives, logprobs.shape[-1]), dim=-1)
    listed = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenChoice(id, logprob, tuple(zip(ids, values, strict=True)))
        for id, logprob, (ids, values) in zip(chosen.tolist(), own, listed, strict=True)
    ]


class SequenceState:
    """One sample as it is written: its random numbers, what it may say next, and its text, whole characters up to a stop text."""

    def __init__(self, request: Request, prompt: list[int], tokenizer: Tokenizer) -> None:
        self.options = request.options
        self.sample = Sample(request.prompt)
        self.history = list(prompt)
        self.done = False
        self._request = request
        self._end = tokenizer.end_of_text
        self._decoder: StreamDecoder = tokenizer.stream_decoder()
        self._longest_stop = max((len(stop) for stop in self.options.stop), default=0)
        self._shown = 0
        self._begun = time.perf_counter()
        self._generator = torch.Generator().manual_seed(request.seed)
        self._draws: Iterator[float] = iter(())
        self._state = 0
        if request.constraint is not None:
            needed = request.constraint.fewest_tokens
            if needed > self.options.max_new_tokens:
                raise InputError(
                    f"needs {needed} tokens at least, and --max-new-tokens is {self.options.max_new_tokens}",
                    where=request.constraint.name,
                )
        if not self.options.max_new_tokens:
            self._finish("length")

    def draw(self) -> float:
        """The next uniform number, from a stream that is this sample's own."""
        for number in self._draws:
            return number
        self._draws = iter(torch.rand(_DRAWS, generator=self._generator, dtype=torch.float64).tolist())
        return next(self._draws)

    @property
    def restricted(self) -> bool:
        return self._request.constraint is not None or len(self.sample.token_ids) < len(self.options.forced)

    def restrict(self, logits: Tensor) -> None:
        """Set to minus infinity, in place, what may not come next (V,)."""
        written = len(self.sample.token_ids)
        if written < len(self.options.forced):
            forced = self.options.forced[written]
            logits.fill_(float("-inf"))
            logits[forced] = 0.0
        elif self._request.constraint is not None:
            self._request.constraint.restrict(logits, self._state, self.options.max_new_tokens - written)
        if bool(logits.max() == float("-inf")):
            raise InputError("nothing that is not banned may come next", where="--ban")

    def note(self, choice: TokenChoice) -> None:
        if choice.id == self._end:
            return
        self.sample.choices.append(choice)
        if self._request.on_token is not None:
            self._request.on_token(choice)

    def push(self, id: int) -> None:
        if id == self._end:
            return self._finish("end")
        self.history.append(id)
        self.sample.token_ids.append(id)
        self._take(self._decoder.push(id))
        if self.done:
            return None
        constraint = self._request.constraint
        if constraint is not None and len(self.sample.token_ids) > len(self.options.forced):
            self._state = constraint.after(self._state, id)
            if constraint.complete(self._state):
                return self._finish("stop")
        if len(self.sample.token_ids) == self.options.max_new_tokens:
            self._finish("length")
        return None

    def stop(self) -> None:
        """Nothing more comes, though more was wanted."""
        self._finish("length")

    def _finish(self, reason: str) -> None:
        self.done = True
        self.sample.finish_reason = reason
        if reason != "stop" or self._request.constraint is not None:
            self._take(self._decoder.finish())
        self._show(len(self.sample.text))
        self.sample.tokens_per_second = len(self.sample.token_ids) / max(time.perf_counter() - self._begun, 1e-9)

    def _take(self, text: str) -> None:
        before = len(self.sample.text)
        self.sample.text += text
        if self._longest_stop and not self.done:
            since = max(0, before - self._longest_stop + 1)
            found = [at for stop in self.options.stop if (at := self.sample.text.find(stop, since)) >= 0]
            if found:
                self.sample.text = self.sample.text[: min(found)]
                return self._finish("stop")
        if self._request.on_text is not None:
            self._show(len(self.sample.text) - (0 if self.done else self._held_back()))
        return None

    def _held_back(self) -> int:
        """How many last characters could still become the beginning of a stop text."""
        text = self.sample.text
        return max(
            (size for stop in self.options.stop for size in range(1, len(stop)) if text.endswith(stop[:size])),
            default=0,
        )

    def _show(self, end: int) -> None:
        if self._request.on_text is not None and end > self._shown:
            self._request.on_text(self.sample.text[self._shown : end])
            self._shown = end
