"""Looking for a good text instead of drawing one: beam search, and the best of several samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.errors import InputError
from tinylm.generation.constraint import Constraint
from tinylm.generation.engine import Request, Sample, sample_seed, write
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import Decoder
from tinylm.tokenizer import Tokenizer

RANKINGS = ("likelihood", "contrast")


@dataclass(frozen=True)
class Ranked:
    """A sample and what it was ranked by, nats per token: higher is better."""

    sample: Sample
    score: float


@dataclass
class _Beam:
    ids: list[int]
    nats: float
    state: int = 0


@torch.inference_mode()
def beam_search(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    constraint: Constraint | None = None,
) -> list[Ranked]:
    """The `beams` likeliest continuations found, best first, by log-probability over length ** `length_penalty`.

    At each step the likeliest continuations of all beams go on; those that end, or match a constraint with nothing to follow, are
    put aside. The search stops when as many are put aside as there are beams and none that goes on has a better score. With as
    many beams as there are continuations this is exact. Raises `InputError` when the text would pass the model's context, or
    for a width below 1.
    """
    if beams < 1:
        raise InputError(f"must be 1 or more, not {beams}", where="--beams")
    end = tokenizer.end_of_text
    read = tokenizer.encode(prompt) or [end or 0]
    if len(read) + max_new_tokens > decoder.model.context_length:
        room = decoder.model.context_length
        raise InputError(f"prompt and text of {len(read)} + {max_new_tokens} tokens pass the context of {room}", where="--beams")
    if constraint is not None and constraint.fewest_tokens > max_new_tokens:
        raise InputError(
            f"needs {constraint.fewest_tokens} tokens, and --max-new-tokens is {max_new_tokens}", where=constraint.name
        )
    cache = decoder.cache(beams, len(read) + max_new_tokens)
    cache.use(1)
    logits = decoder.read(cache, 0, read)[None]
    going, ended = [_Beam([], 0.0)], []

    def score(beam: _Beam, tokens: int) -> float:
        return float(beam.nats / max(tokens, 1) ** length_penalty)

    for written in range(max_new_tokens):
        totals = _logprobs(logits, going, constraint, max_new_tokens - written)
        top = totals.flatten().topk(min(2 * beams, totals.numel()))
        sources: list[int] = []
        chosen: list[_Beam] = []
        for nats, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            row, id = divmod(place, totals.shape[1])
            if nats == float("-inf") or len(chosen) == beams:
                break
            beam = _Beam([*going[row].ids, id], nats, going[row].state)
            if id == end:
                ended.append((score(beam, written + 1), "end", _Beam(beam.ids[:-1], nats)))
                continue
            if constraint is not None:
                beam.state = constraint.after(beam.state, id)
                if constraint.complete(beam.state):
                    ended.append((score(beam, written + 1), "stop", beam))
                    continue
            sources.append(row)
            chosen.append(beam)
        going = chosen
        ended = sorted(ended, key=lambda one: -one[0])[:beams]
        if not going or (len(ended) == beams and max(score(beam, written + 1) for beam in going) <= ended[-1][0]):
            break
        if written + 1 < max_new_tokens:
            cache.use(max(len(cache.lengths), len(going)))
            cache.take(sources, range(len(going)))
            cache.use(len(going))
            logits = decoder.step(cache, torch.tensor([beam.ids[-1] for beam in going], device=decoder.device))
    else:
        ended += [(score(beam, max_new_tokens), "length", beam) for beam in going if _may_stop(beam, constraint)]
    best = sorted(ended, key=lambda one: -one[0])[:beams]
    return [Ranked(_sample(prompt, beam.ids, reason, tokenizer), value) for value, reason, beam in best]


def _logprobs(logits: Tensor, beams: list[_Beam], constraint: Constraint | None, left: int) -> Tensor:
    """(beams, V): log-probability of each beam followed by each token, minus infinity where that may not be."""
    logprobs = logits.float().log_softmax(dim=-1)
    if constraint is not None:
        logprobs = logprobs.clone()
        for row, beam in enumerate(beams):
            constraint.restrict(logprobs[row], beam.state, left)
    return logprobs + torch.tensor([beam.nats for beam in beams], device=logits.device)[:, None]


def _may_stop(beam: _Beam, constraint: Constraint | None) -> bool:
    return constraint is None or constraint.accepts(beam.state)


def _sample(prompt: str, ids: list[int], reason: str, tokenizer: Tokenizer) -> Sample:
    return Sample(prompt, tokenizer.decode(ids), ids, reason)


def best_of(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    options: SamplingOptions,
    *,
    count: int,
    among: int,
    ranking: str = "likelihood",
    seed: int = 0,
    constraint: Constraint | None = None,
) -> list[Ranked]:
    """The best `count` of `among` samples, best first.

    `likelihood`: the mean log-probability of a sample's tokens after the prompt. `contrast`: less their mean log-probability
    without the prompt, so that what the model would say anyway counts for nothing (pointwise mutual information; Li et al. 2016).
    """
    if ranking not in RANKINGS:
        raise InputError(f"must be one of {', '.join(RANKINGS)}, not {ranking!r}", where="--rank")
    if among < count:
        raise InputError(f"the best {count} of {among}?", where="--best-of", hint=f"{count} or more")
    requests = [Request(prompt, options, sample_seed(seed, index), constraint) for index in range(among)]
    samples = list(write(decoder, tokenizer, requests))
    scores = [score(decoder, tokenizer, prompt, sample.token_ids) for sample in samples]
    if ranking == "contrast":
        scores = [own - score(decoder, tokenizer, "", sample.token_ids) for own, sample in zip(scores, samples, strict=True)]
    ranked = [Ranked(sample, value) for sample, value in zip(samples, scores, strict=True)]
    return sorted(ranked, key=lambda one: -one.score)[:count]


@torch.inference_mode()
def score(decoder: Decoder, tokenizer: Tokenizer, prompt: str, ids: Sequence[int]) -> float:
    """Mean log-probability in nats of `ids` after the prompt; what does not fit the context is scored without its beginning."""
    if not ids:
        return 0.0
    read = [*(tokenizer.encode(prompt) or [tokenizer.end_of_text or 0]), *ids][-decoder.model.context_length - 1 :]
    tokens = torch.tensor([read], device=decoder.device)
    logprobs = decoder.network(tokens[:, :-1])[0].float().log_softmax(dim=-1)
    scored = min(len(ids), len(read) - 1)
    return float(logprobs[-scored:].gather(1, tokens[0, -scored:, None]).mean())
