"""Evaluate a chat model on conversations: compute the loss on all answers, and generate greedy answers to the last questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinylm import device as devices
from tinylm.data.chat import fit, open_conversations
from tinylm.errors import InputError
from tinylm.evaluation import answers
from tinylm.evaluation.answers import AnswerScores
from tinylm.evaluation.intervals import wilson
from tinylm.generation.chat import answer_all
from tinylm.generation.sampling import SamplingOptions
from tinylm.reporting import SILENT, Reporter
from tinylm.run import Run

MAX_NEW_TOKENS = 200


@dataclass(frozen=True)
class Answer:
    """A question with the expected and the generated answer. `stopped` is True if the model ended its answer with an end token."""

    question: str
    expected: str
    text: str
    stopped: bool

    @property
    def exact(self) -> bool:
        """Whether the generated answer is complete and equals the expected answer."""
        return self.stopped and self.text == self.expected


@dataclass(frozen=True)
class ChatEvaluation:
    """The evaluation of a chat model on its held-out or test conversations."""

    run: str
    checkpoint: str
    step: int
    split: str
    scores: AnswerScores
    answers: list[Answer]
    """The generated answer to the last question in each conversation."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of `tinylm eval --json`."""
        count, exact, stopped = len(self.answers), *(sum(values) for values in self._outcomes())
        return {
            "run": self.run,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "split": self.split,
            "conversations": self.scores.conversations,
            "skipped": self.scores.skipped,
            "tokens": self.scores.tokens,
            "bytes": self.scores.bytes,
            "loss": self.scores.loss,
            "bits_per_byte": self.scores.bits_per_byte,
            "answers": count,
            "exact_match": exact / count if count else None,
            "exact_match_ci95": list(wilson(exact, count)) if count else None,
            "stop_rate": stopped / count if count else None,
            "stop_rate_ci95": list(wilson(stopped, count)) if count else None,
        }

    def _outcomes(self) -> tuple[list[bool], list[bool]]:
        return [answer.exact for answer in self.answers], [answer.stopped for answer in self.answers]


def evaluate_chat_run(
    run: Run,
    *,
    split: str = "heldout",
    max_answers: int | None = None,
    checkpoint: str | None = None,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> ChatEvaluation:
    """Score the answers in the run's held-out or test conversations, and generate a greedy answer to each last question.

    `max_answers` limits the number of generated answers, but not the conversations that are scored. Raises `InputError` if the run
    has no such conversations or the checkpoint cannot be read.
    """
    encoder, chosen = run.require_chat(), run.checkpoint(checkpoint)
    run.heldout(split)  # raises if the split is missing
    conversations = open_conversations(run.path / "heldout", split, run.tokenizer.vocab_size)
    network = run.network(chosen, devices.resolve(device))
    with reporter.progress("evaluating", None, "tokens") as advance:
        scores = answers.evaluate(network, conversations, run.tokenizer.token_byte_lengths, on_progress=advance)
    prompts: list[list[int]] = []
    expected, questions = [], []
    for index in range(len(conversations)):
        if max_answers is not None and len(prompts) >= max_answers:
            break
        turns = conversations[index]
        fitted = fit(turns, encoder.start, network.model.context_length)
        if fitted is None:
            continue
        answer = turns[-1].ids
        prompts.append(fitted.ids[: len(fitted.ids) - len(answer) + 1].tolist())
        expected.append(run.tokenizer.decode(answer[1:-1]))
        questions.append(run.tokenizer.decode(turns[-2].ids[1:-1]))
    generated: list[Answer] = []
    options = SamplingOptions(MAX_NEW_TOKENS, temperature=0.0, top_k=None)
    with reporter.progress("answering", len(prompts), " answers") as advance:
        for sample in answer_all(network, encoder, prompts, options):
            number = len(generated)
            generated.append(Answer(questions[number], expected[number], sample.text, sample.finish_reason == "end"))
            advance(len(generated))
    if not generated and max_answers != 0:
        raise InputError("no conversation fits into the context", where=str(run.path))
    return ChatEvaluation(str(run.path), chosen.name, chosen.step, split, scores, generated)
