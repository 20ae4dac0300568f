"""Generate text with continuous batching: requests are prefilled into the rows of a decoding state and decoded together.

The engine works with any model that has a decoding state (`tinylm.model.state`). A finished sequence immediately frees its row for
the next request, so prompts of any length share the decoding steps. Samples with the same prompt share one prefill. When a row is
full, the state evicts the older half of the row. Some states then have to prefill the newer half again. No token is processed more
than about twice, because a row fills up again only after as many tokens as were evicted. If the capacity is unlimited, rows are
never full.

Legend: `B` rows in use, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinylm.generation import fast_sampling
from tinylm.generation.constraint import Constraint
from tinylm.generation.row_sampler import RowSampler, unusable_error
from tinylm.generation.sampling import SamplingOptions, device_sampler
from tinylm.generation.stops import StopMatcher
from tinylm.generation.token_choice import TokenChoice, prompt_choices
from tinylm.host_copy import HostCopy
from tinylm.model.decoder import as_decoder
from tinylm.model.state import DecodingModel, DecodingState, RunsAhead, SamplesOnDevice
from tinylm.tokenizer import StreamDecoder, Tokenizer

OnText = Callable[[int, str], None]
DEFAULT_ROWS = 16
"""Default maximum number of rows that `generate_batch` decodes together."""
_UNIFORMS_PER_BLOCK = 256
_STEPS_AHEAD = 16
"""Maximum number of tokens per sequence that a model chooses in a single call. Tokens after the end of a sample are discarded."""


@dataclass
class Sample:
    """A generated continuation.

    `finish_reason` is "stop" (a stop string was generated, or the constraint is complete), "end" (the end-of-text token or one of
    `stop_ids` was generated) or "length" (`max_new_tokens` was reached). `choices` is filled only if `SamplingOptions.logprobs` is
    set. The token that ends a sample is not part of it, so the choice of that token is stored separately in `end_choice`.
    `prompt_choices`, for all prompt tokens except the first, is filled only if `Request.score_prompt` is also set.
    """

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    tokens_per_second: float = 0.0
    choices: list[TokenChoice] = field(default_factory=list)
    end_choice: TokenChoice | None = None
    prompt_choices: list[TokenChoice] = field(default_factory=list)


@dataclass
class Request:
    """One sample to generate. Its random numbers depend only on `seed`.

    `on_text` receives text as soon as it is final, which means complete characters that cannot be part of a stop string. `on_token`
    receives each token if `SamplingOptions.logprobs` is set. `score_prompt` also records the log-probabilities of the prompt tokens
    and requires a prompt of no more than `capacity` + 1 tokens. `ids` replaces the encoding of `prompt`, for prompts that are not
    plain text.
    """

    prompt: str
    options: SamplingOptions
    seed: int = 0
    constraint: Constraint | None = None
    on_text: Callable[[str], None] | None = None
    on_token: Callable[[TokenChoice], None] | None = None
    score_prompt: bool = False
    ids: Sequence[int] | None = None


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
    """Generate `count` continuations of a prompt. An empty prompt starts a new document. `on_text(i, text)` streams sample i.

    Up to rounding, sample i depends only on the seed and i, and not on the other samples in the batch.
    """

    def on_text_of(index: int) -> Callable[[str], None] | None:
        return None if on_text is None else lambda text: on_text(index, text)

    requests = [Request(prompt, options, sample_seed(seed, index), constraint, on_text_of(index)) for index in range(count)]
    return list(generate_batch(model, tokenizer, requests))


def sample_seed(seed: int, index: int) -> int:
    """Derive the seed for the sample with this index from the user's `seed`."""
    return (seed * 1_000_003 + index) % 2**63


def generate_batch(
    model: nn.Module | DecodingModel[Any], tokenizer: Tokenizer, requests: Sequence[Request], *, rows: int | None = None
) -> Iterator[Sample]:
    """Yield one sample per request, in order. Up to `rows` sequences (default: `DEFAULT_ROWS`) are decoded together.

    Raises `InputError` if the model cannot generate text, or if a request bans all tokens that it allows. Raises `WorkError` if the
    model's logits are non-finite.
    """
    prompts = [list(request.ids) if request.ids is not None else tokenizer.encode(request.prompt) for request in requests]
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
            finished = started.pop(next_index)
            if finished.error is not None:
                raise finished.error
            yield finished.sample
            next_index += 1


@dataclass(frozen=True)
class _QueuedTokens:
    """The tokens that the device chooses in a step, one for each of `sequences`. The host has not read them yet."""

    sequences: list[SequenceState]
    ids: HostCopy


class Engine:
    """A batch of sequences that are decoded together. Each sequence uses one row of the decoding state.

    `add` prefills a prompt into free rows, `step` appends one token to every sequence, and `evict` removes a sequence. `max_tokens`
    is the number of tokens per row for which memory is reserved (default: the model's capacity).
    """

    def __init__(self, decoder: DecodingModel[Any], tokenizer: Tokenizer, rows: int, *, max_tokens: int | None = None) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.rows = rows
        self._state: DecodingState = decoder.new_state(rows, max_tokens)
        self._state.resize(0)
        self._sequences: list[SequenceState] = []
        self._logits: Tensor | None = None  # (B, V): logits of each sequence's next token
        self._sampler = RowSampler(rows, decoder.vocab_size, decoder.device, uses_numba=decoder.uses_numba)
        self._run_ahead = decoder.run if isinstance(decoder, RunsAhead) else None
        self._sample_and_step = None
        if isinstance(decoder, SamplesOnDevice) and decoder.samples_on_device:
            self._sample_and_step = decoder.sample_and_step
        self._queued: _QueuedTokens | None = None

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    @property
    def free_rows(self) -> int:
        return self.rows - len(self._sequences)

    @torch.inference_mode()
    def add(self, requests: Sequence[Request], ids: Sequence[int] | None = None) -> list[SequenceState]:
        """Start one sequence per request in the free rows. All requests must have the same prompt, which is prefilled once.

        Pass `ids` if the prompt has already been encoded. Raises `InputError` if `max_new_tokens` is too small for the constraint.
        """
        prompt_ids = list(ids if ids is not None else self.tokenizer.encode(requests[0].prompt))
        prompt = prompt_ids or [self.tokenizer.end_of_text or 0]
        added = [SequenceState(request, prompt, self.tokenizer) for request in requests]
        for sequence, request in zip(added, requests, strict=True):
            if request.score_prompt and request.options.logprobs is not None:
                sequence.sample.prompt_choices = prompt_choices(self.decoder, prompt_ids, request.options.logprobs)
        unfinished = [sequence for sequence in added if not sequence.done]
        if not unfinished:
            return added
        first = len(self._sequences)
        try:
            logits = self._prefill(first, len(unfinished), prompt)  # (V,)
        except Exception:
            self._state.resize(first)
            raise
        added_logits = logits.expand(len(unfinished), -1)
        self._logits = added_logits if not first or self._logits is None else torch.cat((self._logits, added_logits))
        self._sequences += unfinished
        for row, sequence in enumerate(unfinished, first):
            self._sampler.reset(row, sequence.options, prompt)
        return added

    def _prefill(self, first: int, count: int, prompt: list[int]) -> Tensor:
        """Prefill a prompt into `count` new rows and return the logits `(V,)` after it."""
        self._state.resize(first + count)
        capacity = self._state.capacity
        logits = self.decoder.prefill(self._state, first, prompt if capacity is None else prompt[-capacity:])
        if count > 1:
            self._state.fork(first, range(first + 1, first + count))
        return logits

    @torch.inference_mode()
    def step(self) -> None:
        """Append one token to every sequence, remove finished sequences and compute the next logits for the others.

        A model that runs ahead appends several tokens if the options allow it. With a model that samples on its device, each call
        appends the tokens that the previous call queued. An error in one sequence ends only that sequence and is stored in its
        `error`.
        """
        if self._queue_step():
            return
        self._append_queued_tokens()
        if not self._sequences or self._logits is None or self._append_several(self._logits):
            return
        chosen = self._sampler.next_tokens(self._logits, self._sequences)
        ids = chosen.tolist()
        for sequence, id in zip(self._sequences, ids, strict=True):
            sequence.attempt(partial(sequence.append, id))
        chosen = self._remove_rows([row for row, sequence in enumerate(self._sequences) if sequence.done], chosen)
        if self._sequences:
            capacity = self._state.capacity
            for row, length in enumerate(self._state.lengths):
                if capacity is not None and length == capacity:
                    self._evict_older_half(row, capacity)
            self._logits = self.decoder.step(self._state, chosen)

    def _queue_step(self) -> bool:
        """Queue a step whose tokens the device chooses. While the device computes, append the tokens of the previously queued step.

        If one of those ends its sequence, the sequence's token in the new step is discarded. Return false if the device cannot
        choose the next tokens, or if every sequence is complete once the previously queued tokens are appended.
        """
        sequences, capacity, waiting = self._sequences, self._state.capacity, int(self._queued is not None)
        if self._sample_and_step is None or self._logits is None or all(each.remaining <= waiting for each in sequences):
            return False
        options = sequences[0].options
        for sequence, length in zip(sequences, self._state.lengths, strict=True):
            if not sequence.needs_only_logits or sequence.options.sampling_key != options.sampling_key or length == capacity:
                return False
        uniforms = [0.0 if options.temperature == 0 else sequence.next_uniform() for sequence in sequences]
        sampler = device_sampler(options, self.decoder.vocab_size)
        chosen, self._logits = self._sample_and_step(self._state, self._logits, sampler, torch.from_numpy(np.array(uniforms)))
        queued = _QueuedTokens(list(sequences), HostCopy(chosen))
        self._append_queued_tokens()
        self._queued = queued
        return True

    def _append_queued_tokens(self) -> None:
        """Append the tokens of the last queued step, if they have not been appended yet, and remove finished sequences."""
        queued, self._queued = self._queued, None
        if queued is None or self._logits is None:
            return
        active = set(self._sequences)
        for sequence, id in zip(queued.sequences, queued.ids.tolist(), strict=True):
            if sequence not in active:
                continue
            if id < 0:
                sequence.fail(unusable_error(float("nan"), restricted=False))
            else:
                sequence.attempt(partial(sequence.append, id))
        self._logits = self._remove_rows([row for row, sequence in enumerate(self._sequences) if sequence.done], self._logits)

    def _append_several(self, logits: Tensor) -> bool:
        """Append several tokens to every sequence in a single call of the model. Return false if this is not possible."""
        if self._run_ahead is None or any(not sequence.can_run_ahead for sequence in self._sequences):
            return False
        options = self._sequences[0].options
        steps = min(_STEPS_AHEAD, *(sequence.remaining for sequence in self._sequences))
        if steps < 2 or any(sequence.options.sampling_key != options.sampling_key for sequence in self._sequences):
            return False
        uniforms = np.array([[sequence.next_uniform() for _ in range(steps)] for sequence in self._sequences])
        logits = logits.clone(memory_format=torch.contiguous_format)  # the model overwrites them
        run = fast_sampling.Run(logits, options, uniforms.T)
        done = self._run_ahead(self._state, run.chooser)
        for sequence, unused in zip(self._sequences, uniforms[:, done:].tolist(), strict=True):
            sequence.return_uniforms(unused)
        if not done:
            return False
        for ids in run.chooser.chosen[:done].tolist():
            for sequence, id in zip(self._sequences, ids, strict=True):
                sequence.attempt(partial(sequence.append, id))
        self._logits = self._remove_rows([row for row, sequence in enumerate(self._sequences) if sequence.done], logits)
        return True

    @torch.inference_mode()
    def evict(self, sequence: SequenceState) -> None:
        """Remove a sequence even if it is unfinished, for example because its client disconnected."""
        if sequence in self._sequences:
            assert self._logits is not None
            self._logits = self._remove_rows([self._sequences.index(sequence)], self._logits)

    def _evict_older_half(self, row: int, capacity: int) -> None:
        """Evict the older half of a full row. The newest token counts toward the half to keep but is not in the state yet."""
        missing = self._state.evict(row, max(1, capacity // 2) - 1)
        if missing:
            self.decoder.prefill(self._state, row, self._sequences[row].history[-missing - 1 : -1])

    def _remove_rows(self, removed: list[int], values: Tensor) -> Tensor:
        """Remove rows from the state and `values` `(B, ...)` by moving the last rows into their places. Returns the new values."""
        if not removed:
            return values
        count = len(self._sequences) - len(removed)
        rows = [row for row in removed if row < count]
        sources = [row for row in range(count, len(self._sequences)) if row not in removed]
        if rows:
            self._state.reorder(sources, rows)
            values = values.clone()
            values[rows] = values[sources]
        for source, row in zip(sources, rows, strict=True):
            self._sequences[row] = self._sequences[source]
            self._sampler.move(source, row)
        del self._sequences[count:]
        self._state.resize(count)
        return values[:count]


class SequenceState:
    """The state of a sample during generation: its random numbers, its constraint, and its text up to a stop string.

    Raises `InputError` if `max_new_tokens` is too small for the constraint.
    """

    def __init__(self, request: Request, prompt: list[int], tokenizer: Tokenizer) -> None:
        self.options = request.options
        self.sample = Sample(request.prompt)
        self.history = list(prompt)
        self.done = False
        self.error: Exception | None = None
        self._request = request
        self._only_top_k = fast_sampling.supports_run(self.options)
        self._end_ids = {tokenizer.end_of_text, *request.options.stop_ids}
        self._decoder: StreamDecoder = tokenizer.stream_decoder(keep_first_space=tokenizer.space_precedes(request.prompt, prompt))
        self._stops = StopMatcher(self.options.stop) if self.options.stop else None
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
        """Return this sample's next random number in [0, 1)."""
        for number in self._uniforms:
            return number
        self._uniforms = iter(torch.rand(_UNIFORMS_PER_BLOCK, generator=self._generator, dtype=torch.float64).tolist())
        return next(self._uniforms)

    def return_uniforms(self, unused: list[float]) -> None:
        """Return random numbers that were not used. `next_uniform` will return them again."""
        if unused:
            self._uniforms = chain(unused, self._uniforms)

    @property
    def remaining(self) -> int:
        """The maximum number of tokens that can still be appended."""
        return self.options.max_new_tokens - len(self.sample.token_ids)

    @property
    def can_run_ahead(self) -> bool:
        """Whether the next tokens depend only on logits and random numbers, so that several can be chosen in one call."""
        return self._only_top_k and not self.is_restricted

    @property
    def needs_only_logits(self) -> bool:
        """Whether the next token can be chosen with only the model's logits and a random number."""
        return self.options.needs_only_logits and not self.is_restricted

    @property
    def is_restricted(self) -> bool:
        """Whether `mask_logits` excludes any token at this position."""
        return self._request.constraint is not None or len(self.sample.token_ids) < len(self.options.forced)

    def mask_logits(self, logits: Tensor) -> None:
        """Set logits `(V,)` to minus infinity in place for tokens that must not come next."""
        generated = len(self.sample.token_ids)
        if generated < len(self.options.forced):
            forced = self.options.forced[generated]
            logits.fill_(float("-inf"))
            logits[forced] = 0.0
        elif self._request.constraint is not None:
            self._request.constraint.mask_logits(logits, self._constraint_state, self.options.max_new_tokens - generated)

    def record_choice(self, choice: TokenChoice) -> None:
        """Record the log-probabilities of the token that is about to be appended."""
        if choice.id in self._end_ids:
            self.sample.end_choice = choice
            return
        self.sample.choices.append(choice)
        if self._request.on_token is not None:
            self._request.on_token(choice)

    def attempt(self, action: Callable[[], None]) -> None:
        """Run a part of a step that affects only this sequence. If it raises, only this sequence fails and not the whole batch."""
        if self.done:
            return
        try:
            action()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the sequence with an error."""
        self.done, self.error = True, error

    def append(self, id: int) -> None:
        """Add a token to the sample and finish the sample if it is complete."""
        if id in self._end_ids:
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
        if reason != "stop" or self._request.constraint is not None:  # do not extend a text that was truncated at a stop string
            self._append_text(self._decoder.finish())
        self._stream(len(self.sample.text))
        self.sample.tokens_per_second = len(self.sample.token_ids) / max(time.perf_counter() - self._start_time, 1e-9)

    def _append_text(self, text: str) -> None:
        """Append decoded text, truncate the sample at the first stop string, and stream the part that is final."""
        self.sample.text += text
        held_back = 0
        if self._stops is not None and not self.done:
            start = self._stops.push(text)
            if start is not None:
                self.sample.text = self.sample.text[:start]
                self._finish("stop")
                return
            held_back = self._stops.partial_length
        self._stream(len(self.sample.text) - held_back)

    def _stream(self, end: int) -> None:
        """Pass the text from the last streamed character up to `end` to `on_text`."""
        if self._request.on_text is not None and end > self._streamed:
            self._request.on_text(self.sample.text[self._streamed : end])
            self._streamed = end
