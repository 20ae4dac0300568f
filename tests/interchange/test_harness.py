"""The lm-evaluation-harness adapter, tested with local task files and without network access."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from untrained_runs import MakeRun

from tinylm.errors import InputError
from tinylm.evaluation.evaluate_run import evaluate_run
from tinylm.generation.engine import generate
from tinylm.generation.sampling import SamplingOptions
from tinylm.interchange import harness
from tinylm.run import Run

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: {text}
doc_to_target: {target}
{more}
metadata: {{version: 1}}
"""
ROLLING = "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"


def task_file(folder: Path, name: str, documents: list[dict[str, str]], **parts: str) -> Path:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(TASK.format(name=name, data=data, **parts), encoding="utf-8")
    return path


def test_harness_and_tinylm_eval_report_the_same_perplexity(tiny_run: Run, english: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    texts = [english[:2000], english[3000:5000], "short one"]
    documents = [{"text": text} for text in texts]
    path = task_file(tmp_path, "local", documents, kind="loglikelihood_rolling", text='""', target='"{{text}}"', more=ROLLING)
    (metrics,) = harness.run_tasks(tiny_run, [str(path)], device="cpu").results.values()
    ours = evaluate_run(tiny_run, [str(tmp_path / "local.jsonl")]).perplexity
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(ours.nats / words), rel=1e-6)
    assert metrics["bits_per_byte"] == pytest.approx(ours.bits_per_byte, rel=1e-6)
    with pytest.raises(InputError, match="unknown task: nowhere"):
        harness.run_tasks(tiny_run, ["nowhere"], device="cpu")


def test_multiple_choice_and_generation_tasks_run(tiny_run: Run, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    network = tiny_run.network(tiny_run.checkpoint(), torch.device("cpu"))
    generated = generate(network, tiny_run.tokenizer, "The for", SamplingOptions(5, 0.0, None))[0].text
    documents = [{"q": "The for", "good": generated.strip(), "bad": "zzz"}] * 2
    choice = 'doc_to_choice: ["{{good}}", "{{bad}}"]\nmetric_list: [{metric: acc}]'
    generation = "generation_kwargs: {until: [zzz], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]"
    paths = [
        task_file(tmp_path, "choice", documents, kind="multiple_choice", text='"{{q}}"', target='"{{0}}"', more=choice),
        task_file(tmp_path, "generation", documents, kind="generate_until", text='"{{q}}"', target='"{{good}}"', more=generation),
    ]
    results = harness.run_tasks(tiny_run, [str(path) for path in paths], device="cpu").results
    assert 0 <= results["choice"]["acc"] <= 1
    assert results["generation"]["exact_match"] in (0.0, 1.0)


def test_continuations_are_scored_given_their_context(make_run: MakeRun) -> None:
    run = make_run("gpt2")
    network = run.network(run.checkpoint(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    requests = [
        (torch.randint(400, (before,), generator=generator).tolist(), torch.randint(400, (after,), generator=generator).tolist())
        for before, after in ((1, 3), (60, 4), (5, 48), (2, 70))
    ]
    with torch.no_grad():
        most_likely = int(network(torch.tensor([requests[0][0]]))[0, -1].argmax())
    requests.append((requests[0][0], [most_likely]))
    scores = harness.score_continuations(network, requests)
    context = network.model.context_length
    for (before, after), (logprob, greedy) in zip(requests, scores, strict=True):
        ids, expected, all_greedy = [*before, *after], 0.0, True
        for position in range(len(before), len(ids)):
            # Windows are aligned to the end of the sequence, so the last `context` ids are scored in one window.
            end = len(ids) if len(ids) - position <= context else len(ids) - (len(ids) - 1 - position) // context * context
            window = ids[max(0, end - context - 1) : end]
            with torch.no_grad():
                logits = network(torch.tensor([window[:-1]]))[0, position - end]
            expected += float(F.log_softmax(logits, -1)[ids[position]])
            all_greedy &= int(logits.argmax()) == ids[position]
        assert logprob == pytest.approx(expected, rel=1e-5)
        assert greedy == all_greedy
    assert scores[-1][1]


def test_generation_stops_at_the_stop_string_from_the_task(tiny_run: Run) -> None:
    network = tiny_run.network(tiny_run.checkpoint(), torch.device("cpu"))
    full = harness.complete(network, tiny_run.tokenizer, "The for", {"max_gen_toks": 12})
    assert full == generate(network, tiny_run.tokenizer, "The for", SamplingOptions(12, 0.0, None))[0].text
    stop = full[len(full) // 2 :][:2]
    assert harness.complete(network, tiny_run.tokenizer, "The for", {"max_gen_toks": 12, "until": stop}) == full.split(stop)[0]


def test_a_task_file_without_a_task_line_is_rejected(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.verify, "require", lambda *arguments: None)
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    (tmp_path / "a.yaml").write_text("dataset_path: json\n")
    with pytest.raises(InputError, match="no `task:` line"):
        harness.run_tasks(tiny_run, [str(tmp_path / "a.yaml")])
