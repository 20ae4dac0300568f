"""Generate text with continuous batching: requests are prefilled into the rows of a decoding state and decoded together.

Works with any model that has a decoding state (`tinylm.model.state`). A finished sequence immediately frees its row for the next
request, so prompts of any length share the decoding steps. Samples of the same prompt share its prefill. When a row is full, the
state evicts its older half. If the newer half has to be prefilled again, no token is processed more than about twice, because
an eviction happens once per half capacity. The rows of a state of unlimited capacity are never full.

Legend: `B` rows in use, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinylm.errors import InputError
from tinylm.evaluation.scoring import token_logprobs, top_logprobs
from tinylm.generation.constraint import Constraint
from tinylm.generation.sampling import SamplingOptions, apply_penalties, choose
from tinylm.model.decoder import as_decoder
from tinylm.model.state import DecodingModel, DecodingState
from tinylm.tokenizer import StreamDecoder, Tokenizer

OnText = Callable[[int, str], None]
DEFAULT_ROWS = 16
"""Maximum number of rows that `generate_batch` decodes together by default."""
_UNIFORMS_PER_BLOCK = 256


@dataclass(frozen=True)
class TokenChoice:
    """A generated token with its log-probability and the most likely alternatives as pairs of (id, log-probability).

    Log-probabilities are in nats. They are computed from the model's logits, before penalties, temperature and filters.
    """

    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass
class Sample:
    """A generated continuation.

    `finish_reason`: "stop" (a stop text was generated, or the constraint is complete), "end" (the end-of-text token was generated)
    or "length" (`max_new_tokens` was reached). `choices` is filled only if `SamplingOptions.logprobs` is set.
    """

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    tokens_per_second: float = 0.0
    choices: list[TokenChoice] = field(default_factory=list)


@dataclass
class Request:
    """One sample to generate. Its random numbers depend only on `seed`.

    `on_text` receives text as soon as it is final: complete characters that cannot become part of a stop text. `on_token` receives
    each token if `SamplingOptions.logprobs` is set.
    """

    prompt: str
    options: SamplingOptions
    seed: int = 0
    constraint: Constraint | None = None
    on_text: Callable[[str], None] | None = None
    on_token: Callable[[TokenChoice], None] | None = None


def generate(
    model: nn.Module | DecodingModel[Any],
    tokenizer: Tokenizer,
    prompt: str,
    options: SamplingOptions,
    *,
    count: int = 1,
    seed: int = 0,
    constraint: Constraint | None = None,
    on_text: OnText | None = None,
) -> list[Sample]:
    """Generate `count` continuations of a prompt. The empty prompt starts a new document. `on_text(i, text)` streams sample i.

    Up to rounding, sample i depends only on the seed and i, not on the other samples of the batch.
    """

    def on_text_of(index: int) -> Callable[[str], None] | None:
        return None if on_text is None else lambda text: on_text(index, text)

    requests = [Request(prompt, options, sample_seed(seed, index), constraint, on_text_of(index)) for index in range(count)]
    return list(generate_batch(model, tokenizer, requests))


def sample_seed(seed: int, index: int) -> int:
    """The seed of the sample with this index, derived from the user's `seed`."""
    return (seed * 1_000_003 + index) % 2**63


def generate_batch(
    model: nn.Module | DecodingModel[Any], tokenizer: Tokenizer, requests: Sequence[Request], *, rows: int | None = None
) -> Iterator[Sample]:
    """Yield one sample per request, in order. At most `rows` (default: `DEFAULT_ROWS`) of them are decoded together.

    Raises `InputError` if the model cannot generate text.
    """
    prompts = [tokenizer.encode(request.prompt) for request in requests]
    max_length = max((len(ids) + request.options.max_new_tokens for ids, request in zip(prompts, requests, strict=True)), default=1)
    rows = max(1, min(len(requests), rows or DEFAULT_ROWS))
    engine = Engine(as_decoder(model), tokenizer, rows, max_tokens=max_length + 1)
    waiting = deque(range(len(requests)))  # indices of the requests that have not been started
    started: dict[int, SequenceState] = {}
    next_index = 0  # the index of the sample to yield next
    while waiting or engine.busy:
        while waiting and engine.free_rows:
            group = [waiting.popleft()]  # consecutive requests with the same prompt
            prompt = prompts[group[0]]
            while waiting and len(group) < engine.free_rows and prompts[waiting[0]] == prompt:
                group.append(waiting.popleft())
            added = engine.add([requests[index] for index in group], prompt)
            started.update(zip(group, added, strict=True))
        engine.step()
        while next_index in started and started[next_index].done:
            yield started.pop(next_index).sample
            next_index += 1


class Engine:
    """A batch of sequences that are decoded together, one row of the decoding state each.

    `add` prefills a prompt into free rows, `step` appends one token to every sequence, `evict` removes a sequence. `max_tokens` is
    the number of tokens per row that memory is reserved for (default: the capacity of the model).
    """

    def __init__(self, decoder: DecodingModel[Any], tokenizer: Tokenizer, rows: int, *, max_tokens: int | None = None) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.rows = rows
        self._state: DecodingState = decoder.new_state(rows, max_tokens)
        self._state.resize(0)
        self._sequences: list[SequenceState] = []
        self._logits: Tensor | None = None  # (B, V): logits of each sequence's next token
        self._seen: Tensor | None = None  # (rows, V), bool: the token occurs in the prompt or the generated text
        self._counts: Tensor | None = None  # (rows, V): occurrences in the generated text
        self._biases: dict[tuple[tuple[int, float], ...], Tensor] = {}
        self._choose = choose
        if decoder.uses_numba:
            from tinylm.generation import fast_sampling  # imports numba, an optional dependency

            self._choose = fast_sampling.choose

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    @property
    def free_rows(self) -> int:
        return self.rows - len(self._sequences)

    @torch.inference_mode()
    def add(self, requests: Sequence[Request], ids: Sequence[int] | None = None) -> list[SequenceState]:
        """Start one sequence per request in the free rows. All requests must have the same prompt, which is prefilled once.

        `ids` are the tokens of the prompt if it has already been encoded. Raises `InputError` if `max_new_tokens` is too small for
        the constraint.
        """
        prompt = list(ids if ids is not None else self.tokenizer.encode(requests[0].prompt))
        prompt = prompt or [self.tokenizer.end_of_text or 0]
        added = [SequenceState(request, prompt, self.tokenizer) for request in requests]
        unfinished = [sequence for sequence in added if not sequence.done]
        if not unfinished:
            return added
        first = len(self._sequences)
        self._state.resize(first + len(unfinished))
        capacity = self._state.capacity
        logits = self.decoder.prefill(self._state, first, prompt if capacity is None else prompt[-capacity:])  # (V,)
        self._state.fork(first, range(first + 1, first + len(unfinished)))
        new = logits.expand(len(unfinished), -1)
        self._logits = new if not first or self._logits is None else torch.cat((self._logits, new))
        self._sequences += unfinished
        for row, sequence in enumerate(unfinished, first):
            if sequence.options.has_penalties:
                self._reset_penalties(row, prompt)
        return added

    @torch.inference_mode()
    def step(self) -> None:
        """Append one token to every sequence, evict the finished ones and compute the next logits of the others."""
        if not self._sequences or self._logits is None:
            return
        chosen = self._next_tokens(self._logits)
        ids = chosen.tolist()
        for sequence, id in zip(self._sequences, ids, strict=True):
            sequence.append(id)
        for row in reversed(range(len(ids))):
            if self._sequences[row].done:
                chosen = self._remove_row(row, chosen)
        if self._sequences:
            capacity = self._state.capacity
            for row, length in enumerate(self._state.lengths):
                if capacity is not None and length == capacity:
                    self._evict_older_half(row, capacity)
            self._logits = self.decoder.step(self._state, chosen)

    @torch.inference_mode()
    def evict(self, sequence: SequenceState) -> None:
        """Free the row of a sequence that may be unfinished, for example because its client disconnected."""
        if sequence in self._sequences:
            row = self._sequences.index(sequence)
            assert self._logits is not None
            self._logits = self._remove_row(row, self._logits)

    def _evict_older_half(self, row: int, capacity: int) -> None:
        """Evict the older half of a full row. The newest token of the sequence is not in the state yet, but counts as kept."""
        missing = self._state.evict(row, max(1, capacity // 2) - 1)
        if missing:
            self.decoder.prefill(self._state, row, self._sequences[row].history[-missing - 1 : -1])

    def _remove_row(self, row: int, values: Tensor) -> Tensor:
        """Remove a row by moving the last one into its place, in the state and in `values` `(B, ...)`; return the new values."""
        last = len(self._sequences) - 1
        if row != last:
            self._sequences[row] = self._sequences[last]
            self._state.reorder([last], [row])
            for table in (self._seen, self._counts):
                if table is not None:
                    table[row] = table[last]
            values = values.clone()
            values[row] = values[last]
        self._sequences.pop()
        self._state.resize(last)
        return values[:last]

    def _reset_penalties(self, row: int, prompt: list[int]) -> None:
        """Reset the token counts of a row for a new sequence. The first sequence that uses penalties allocates the tables."""
        if self._seen is None or self._counts is None:
            shape = (self.rows, self.decoder.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.decoder.device)
            self._counts = torch.zeros(shape, device=self.decoder.device)
        self._seen[row] = False
        self._seen[row, torch.tensor(prompt, device=self.decoder.device)] = True
        self._counts[row] = 0

    def _next_tokens(self, logits: Tensor) -> Tensor:
        """The next ids `(B,)` from logits `(B, V)`. Rows with equal options are sampled together."""
        options = [sequence.options for sequence in self._sequences]
        if all(other is options[0] or other == options[0] for other in options[1:]):
            return self._sample_rows(logits, options[0], list(range(len(options))))
        chosen = torch.empty(len(options), dtype=torch.long, device=logits.device)
        for distinct in set(options):
            rows = [row for row, row_options in enumerate(options) if row_options == distinct]
            chosen[rows] = self._sample_rows(logits[rows], distinct, rows)
        return chosen

    def _sample_rows(self, logits: Tensor, options: SamplingOptions, rows: list[int]) -> Tensor:
        """The next ids of the given rows, which have the same options; `logits` contains only these rows."""
        sequences = [self._sequences[row] for row in rows]
        model_logits = logits
        if options.logit_bias:
            logits = logits + self._bias(options.logit_bias)
        if options.has_penalties and self._seen is not None and self._counts is not None:
            logits = apply_penalties(logits, self._seen[rows], self._counts[rows], options)
        if any(sequence.is_restricted for sequence in sequences):
            logits = logits.clone()
            for row, sequence in enumerate(sequences):
                sequence.mask_logits(logits[row])
        uniforms = None
        if options.temperature != 0:
            uniforms = torch.from_numpy(np.array([sequence.next_uniform() for sequence in sequences]))  # torch.tensor(list) is slow
        chosen = self._choose(logits, options, uniforms)
        if options.has_penalties and self._seen is not None and self._counts is not None:
            index = torch.tensor(rows, device=logits.device)
            self._seen[index, chosen] = True
            self._counts[index, chosen] += 1
        if options.logprobs is not None:
            for sequence, choice in zip(sequences, _token_choices(model_logits, chosen, options.logprobs), strict=True):
                sequence.record_choice(choice)
        return chosen

    def _bias(self, biases: tuple[tuple[int, float], ...]) -> Tensor:
        """The biases as a vector `(V,)`. Only the latest one is cached, because requests with different biases are rare."""
        if biases not in self._biases:
            vector = torch.zeros(self.decoder.vocab_size, device=self.decoder.device)
            for id, bias in biases:
                vector[id] += bias
            self._biases = {biases: vector}
        return self._biases[biases]


def _token_choices(logits: Tensor, chosen: Tensor, alternatives: int) -> list[TokenChoice]:
    """The chosen ids `(B,)` with their log-probabilities under logits `(B, V)` and the most likely alternatives."""
    chosen_logprobs = token_logprobs(logits, chosen).tolist()
    top_ids, top_values = top_logprobs(logits, alternatives)
    top_rows = zip(top_ids.tolist(), top_values.tolist(), strict=True)
    return [
        TokenChoice(id, logprob, tuple(zip(ids, values, strict=True)))
        for id, logprob, (ids, values) in zip(chosen.tolist(), chosen_logprobs, top_rows, strict=True)
    ]


class SequenceState:
    """A sample that is being generated: its random numbers, its constraint, and its text up to a stop text.

    Raises `InputError` if `max_new_tokens` is too small for the constraint.
    """

    def __init__(self, request: Request, prompt: list[int], tokenizer: Tokenizer) -> None:
        self.options = request.options
        self.sample = Sample(request.prompt)
        self.history = list(prompt)
        self.done = False
        self._request = request
        self._end_of_text = tokenizer.end_of_text
        self._decoder: StreamDecoder = tokenizer.stream_decoder()
        self._max_stop_length = max((len(stop) for stop in self.options.stop), default=0)
        self._streamed = 0  # characters passed to on_text
        self._start_time = time.perf_counter()
        self._generator = torch.Generator().manual_seed(request.seed)
        self._uniforms: Iterator[float] = iter(())
        self._constraint_state = 0
        if request.constraint is not None:
            request.constraint.check_max_new_tokens(self.options.max_new_tokens)
        if not self.options.max_new_tokens:
            self._finish("length")

    def next_uniform(self) -> float:
        """The next random number in [0, 1) of this sample."""
        for number in self._uniforms:
            return number
        self._uniforms = iter(torch.rand(_UNIFORMS_PER_BLOCK, generator=self._generator, dtype=torch.float64).tolist())
        return next(self._uniforms)

    @property
    def is_restricted(self) -> bool:
        """Whether `mask_logits` excludes any token at this position."""
        return self._request.constraint is not None or len(self.sample.token_ids) < len(self.options.forced)

    def mask_logits(self, logits: Tensor) -> None:
        """Set logits `(V,)` to minus infinity, in place, for tokens that must not come next.

        Raises `InputError` if all tokens that the constraint allows are banned.
        """
        generated = len(self.sample.token_ids)
        if generated < len(self.options.forced):
            forced = self.options.forced[generated]
            logits.fill_(float("-inf"))
            logits[forced] = 0.0
        elif self._request.constraint is not None:
            self._request.constraint.mask_logits(logits, self._constraint_state, self.options.max_new_tokens - generated)
        if bool(logits.max() == float("-inf")):
            raise InputError("every token that the constraint allows next is banned", where="--ban")

    def record_choice(self, choice: TokenChoice) -> None:
        """Record the log-probabilities of the token that is about to be appended, unless it is the end-of-text token."""
        if choice.id == self._end_of_text:
            return
        self.sample.choices.append(choice)
        if self._request.on_token is not None:
            self._request.on_token(choice)

    def append(self, id: int) -> None:
        """Add a token to the sample and finish the sample if it is complete."""
        if id == self._end_of_text:
            self._finish("end")
            return
        self.history.append(id)
        self.sample.token_ids.append(id)
        self._append_text(self._decoder.push(id))
        if self.done:
            return
        constraint = self._request.constraint
        if constraint is not None and len(self.sample.token_ids) > len(self.options.forced):
            self._constraint_state = constraint.next_state(self._constraint_state, id)
            if constraint.is_complete(self._constraint_state):
                self._finish("stop")
                return
        if len(self.sample.token_ids) == self.options.max_new_tokens:
            self._finish("length")

    def finish_early(self) -> None:
        """Finish the sample with the text generated so far, for example because of a timeout."""
        self._finish("length")

    def _finish(self, reason: str) -> None:
        self.done = True
        self.sample.finish_reason = reason
        if reason != "stop" or self._request.constraint is not None:  # a text that was cut at a stop text must not grow
            self._append_text(self._decoder.finish())
        self._stream(len(self.sample.text))
        self.sample.tokens_per_second = len(self.sample.token_ids) / max(time.perf_counter() - self._start_time, 1e-9)

    def _append_text(self, text: str) -> None:
        """Append decoded text, cut it at the first stop text, and stream the part that is final."""
        before = len(self.sample.text)
        self.sample.text += text
        if self._max_stop_length and not self.done:
            start = max(0, before - self._max_stop_length + 1)
            stop_positions = [index for stop in self.options.stop if (index := self.sample.text.find(stop, start)) >= 0]
            if stop_positions:
                self.sample.text = self.sample.text[: min(stop_positions)]
                self._finish("stop")
                return
        if self._request.on_text is not None:
            self._stream(len(self.sample.text) - (0 if self.done else self._partial_stop_length()))

    def _partial_stop_length(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop text."""
        text = self.sample.text
        return max(
            (size for stop in self.options.stop for size in range(1, len(stop)) if text.endswith(stop[:size])),
            default=0,
        )

    def _stream(self, end: int) -> None:
        """Pass the text from the last streamed character up to `end` to `on_text`."""
        if self._request.on_text is not None and end > self._streamed:
            self._request.on_text(self.sample.text[self._streamed : end])
            self._streamed = end
