"""Search for a likely continuation: beam search, and the best of several samples.

Legend: `T` time, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.evaluation.scoring import all_logprobs, token_logprobs
from tinylm.generation.constraint import Constraint
from tinylm.generation.engine import Request, Sample, generate_batch, sample_seed
from tinylm.model.state import DecodingModel, DecodingState
from tinylm.tokenizer import Tokenizer

RANKINGS = ("likelihood", "contrast")
_MAX_LENGTH_PENALTY = 10.0
"""Maximum absolute value. Scores could overflow with larger exponents."""


@dataclass(frozen=True)
class RankedSample:
    """A sample and its ranking score in nats. Higher is better."""

    sample: Sample
    score: float


@dataclass
class _Beam:
    ids: list[int]
    logprob: float
    """Total log-probability of the ids, in nats."""
    constraint_state: int = 0


@dataclass(frozen=True)
class _Finished:
    score: float
    reason: str
    beam: _Beam


@torch.inference_mode()
def beam_search(
    decoder: DecodingModel[Any],
    tokenizer: Tokenizer,
    prompt: str,
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    constraint: Constraint | None = None,
) -> list[RankedSample]:
    """Find the `beams` most likely continuations, best first. The score is log-probability / length ** `length_penalty`.

    Each step extends all beams and keeps the most likely extensions. A beam is finished when it ends with the end-of-text token or
    completes the constraint. The search stops when there are `beams` finished beams and no unfinished beam has a better score. It
    is exhaustive only if `beams` is at least the number of possible continuations. Raises `InputError` if the prompt and the
    continuation exceed the model's capacity, if `max_new_tokens` is too small for the constraint, or if `beams` or `length_penalty`
    is out of range.
    """
    start = time.perf_counter()
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.end_of_text or 0]
    _check_beam_search(decoder.capacity, len(prompt_ids), beams, max_new_tokens, constraint)
    if not abs(length_penalty) <= _MAX_LENGTH_PENALTY:
        limit = f"between -{_MAX_LENGTH_PENALTY:g} and {_MAX_LENGTH_PENALTY:g}"
        raise InputError(f"must be {limit}, not {length_penalty:g}", where="--length-penalty")
    search = _BeamSearch(beams, length_penalty, tokenizer.end_of_text, constraint)
    state: DecodingState = decoder.new_state(beams, len(prompt_ids) + max_new_tokens)
    state.resize(1)
    logits = decoder.prefill(state, 0, prompt_ids)[None]
    active: list[_Beam] = [_Beam([], 0.0)]
    finished: list[_Finished] = []
    for generated in range(1, max_new_tokens + 1):
        logprobs = _extension_logprobs(logits, active, constraint, max_new_tokens - generated + 1)
        parents, active, newly_finished = search.extend(active, logprobs, generated)
        finished = _best([*finished, *newly_finished], beams)
        if not active:
            break
        if len(finished) == beams and max(search.score(beam, generated) for beam in active) <= finished[-1].score:
            break
        if generated < max_new_tokens:
            state.resize(max(len(state.lengths), len(active)))
            state.reorder(parents, range(len(active)))
            state.resize(len(active))
            logits = decoder.step(state, torch.tensor([beam.ids[-1] for beam in active], device=decoder.device))
    else:
        finished += [
            _Finished(search.score(beam, max_new_tokens), "length", beam)
            for beam in active
            if constraint is None or constraint.accepts(beam.constraint_state)
        ]
    seconds = max(time.perf_counter() - start, 1e-9)
    return [
        RankedSample(
            Sample(
                prompt,
                tokenizer.decode(result.beam.ids, keep_first_space=tokenizer.space_precedes(prompt, prompt_ids)),
                result.beam.ids,
                result.reason,
                tokens_per_second=len(result.beam.ids) / seconds,
            ),
            result.score,
        )
        for result in _best(finished, beams)
    ]


def _check_beam_search(
    capacity: int | None, prompt_length: int, beams: int, max_new_tokens: int, constraint: Constraint | None
) -> None:
    if beams < 1:
        raise InputError(f"must be 1 or more, not {beams}", where="--beams")
    if capacity is not None and prompt_length + max_new_tokens > capacity:
        raise InputError(
            f"the prompt ({prompt_length} tokens) and --max-new-tokens ({max_new_tokens}) exceed "
            f"the model's context of {capacity} tokens",
            where="--beams",
        )
    if constraint is not None:
        constraint.check_max_new_tokens(max_new_tokens)


@dataclass(frozen=True)
class _BeamSearch:
    beams: int
    length_penalty: float
    end_of_text: int | None
    constraint: Constraint | None

    def score(self, beam: _Beam, tokens: int) -> float:
        """Return the score of a beam. `tokens` is its length, including the end-of-text token."""
        return float(beam.logprob / max(tokens, 1) ** self.length_penalty)

    def extend(self, active: list[_Beam], logprobs: Tensor, tokens: int) -> tuple[list[int], list[_Beam], list[_Finished]]:
        """Extend the active beams to `tokens` tokens. `logprobs` `(beams, V)` scores each beam extended by each token.

        Returns the parent of each kept beam (an index into `active`), the kept beams, and the beams that finished.
        """
        top = logprobs.flatten().topk(min(2 * self.beams, logprobs.numel()))
        parents: list[int] = []
        extended: list[_Beam] = []
        finished: list[_Finished] = []
        for logprob, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            parent, id = divmod(index, logprobs.shape[1])
            if logprob == float("-inf") or len(extended) == self.beams:
                break
            beam = _Beam([*active[parent].ids, id], logprob, active[parent].constraint_state)
            if id == self.end_of_text:
                finished.append(_Finished(self.score(beam, tokens), "end", _Beam(beam.ids[:-1], logprob)))
                continue
            if self.constraint is not None:
                beam.constraint_state = self.constraint.next_state(beam.constraint_state, id)
                if self.constraint.is_complete(beam.constraint_state):
                    finished.append(_Finished(self.score(beam, tokens), "stop", beam))
                    continue
            parents.append(parent)
            extended.append(beam)
        return parents, extended, finished


def _best(finished: list[_Finished], count: int) -> list[_Finished]:
    return sorted(finished, key=lambda beam: -beam.score)[:count]


def _extension_logprobs(logits: Tensor, beams: list[_Beam], constraint: Constraint | None, max_tokens: int) -> Tensor:
    """Return the log-probability `(beams, V)` of each beam extended by each token. It is minus infinity if forbidden."""
    logprobs = all_logprobs(logits)
    if constraint is not None:
        logprobs = logprobs.clone()
        for row, beam in enumerate(beams):
            constraint.mask_logits(logprobs[row], beam.constraint_state, max_tokens)
    return logprobs + torch.tensor([beam.logprob for beam in beams], device=logits.device)[:, None]


def best_of(
    decoder: DecodingModel[Any],
    tokenizer: Tokenizer,
    request: Request,
    *,
    count: int,
    candidates: int,
    ranking: str = "likelihood",
) -> list[RankedSample]:
    """Generate `candidates` samples and return the best `count` of them, best first.

    The seed of sample i is `sample_seed(request.seed, i)`. The "likelihood" ranking scores a sample by the mean log-probability of
    its tokens given the prompt. The "contrast" ranking subtracts their mean log-probability without the prompt, which favors text
    that is specific to the prompt (pointwise mutual information, Li et al. 2016). Raises `InputError` if the ranking is unknown or
    `candidates` is less than `count`.
    """
    if ranking not in RANKINGS:
        raise InputError(f"must be one of {', '.join(RANKINGS)}, not {ranking!r}", where="--rank")
    if candidates < count:
        raise InputError(f"must be at least -n ({count})", where="--best-of")
    requests = [replace(request, seed=sample_seed(request.seed, index)) for index in range(candidates)]
    samples = list(generate_batch(decoder, tokenizer, requests))
    scores = [mean_logprob(decoder, tokenizer, request.prompt, sample.token_ids) for sample in samples]
    if ranking == "contrast":
        scores = [
            score - mean_logprob(decoder, tokenizer, "", sample.token_ids) for score, sample in zip(scores, samples, strict=True)
        ]
    ranked = [RankedSample(sample, score) for sample, score in zip(samples, scores, strict=True)]
    return sorted(ranked, key=lambda ranked_sample: -ranked_sample.score)[:count]


@torch.inference_mode()
def mean_logprob(decoder: DecodingModel[Any], tokenizer: Tokenizer, prompt: str, ids: Sequence[int]) -> float:
    """Return the mean log-probability of `ids` after a prompt, in nats. Text that exceeds the capacity is truncated on the left."""
    if not ids:
        return 0.0
    sequence = [*(tokenizer.encode(prompt) or [tokenizer.end_of_text or 0]), *ids]
    if decoder.capacity is not None:
        sequence = sequence[-decoder.capacity - 1 :]
    tokens = torch.tensor([sequence], device=decoder.device)
    logits = decoder(tokens[:, :-1])[0]  # (T, V)
    scored = min(len(ids), len(sequence) - 1)
    return float(token_logprobs(logits[-scored:], tokens[0, -scored:]).mean())
