"""Compare tinylm's translation quality with baselines and JoeyNMT, and its decoding speed with transformers and CTranslate2.

    python benchmarks/translation.py quality --minutes 20 --seeds 3      # every model (or only some: --models) and the baselines
    python benchmarks/translation.py joeynmt --minutes 20                # the same pairs, training time and number of parameters
    python benchmarks/translation.py decoding --run runs/NAME            # beam 5, batch 32, on held-out sentences, one thread
    python benchmarks/translation.py invariance --run runs/NAME          # one sentence at a time and in batches of 32

The runs of the systems are interleaved. JoeyNMT runs in its own process, with the Python interpreter of --joey-python.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tinylm.data import formats
from tinylm.interchange import marian
from tinylm.model import compiled_translation
from tinylm.model.compiled_translation import CompiledTranslation
from tinylm.pipeline import train
from tinylm.recipe import load
from tinylm.reporting import Reporter
from tinylm.run import Run
from tinylm.text.pairs import SentencePair
from tinylm.translation import bleu
from tinylm.translation.evaluate import TranslationEvaluationOptions, evaluate_translator, evaluation_pairs
from tinylm.translation.search import SearchOptions, translate_ids
from tinylm.translation.translator import Translator

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "translate-de-en.yaml"
REPEATS = 3
JOEY_TEST_EVERY = 5
"""JoeyNMT translates every fifth test pair, because its beam search takes a quarter of an hour for all of them."""
_RECURRENT = "architecture: recurrent_encoder_decoder, n_embd: 256, context_length: 96, dropout: 0.2, tie_embeddings: all"
MODELS = {
    "modern": ["model.preset=modern"],
    # post-norm needs AdamW and a longer warm-up
    "transformer": [
        "model.preset=transformer",
        "training.optimizer={name: adamw, lr: 1e-3, betas: [0.9, 0.98]}",
        "training.schedule=inverse_sqrt",
    ],
    "bahdanau": [f"model={{{_RECURRENT}, preset: bahdanau}}"],
    "sutskever": [f"model={{{_RECURRENT}, preset: sutskever, n_layer: 2}}"],
}
"""The overrides of the recipe for each model."""


class Printer(Reporter):
    """Prints notes and warnings."""

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)

    warn = note


def interval(ci95: tuple[float, float] | None) -> str:
    return "no CI" if ci95 is None else f"95% CI {ci95[0]:.2f} to {ci95[1]:.2f}"


def quality(minutes: float, seeds: int, models: list[str], folder: Path) -> None:
    """Train every model with several seeds and print BLEU, chrF and the baselines on the test pairs."""
    for seed in range(seeds):
        for name in models:
            run_folder = folder / f"{name}-{seed}"
            overrides = [f"training.minutes={minutes}", f"seed={seed}", *MODELS[name]]
            train(load(RECIPE, overrides), run_folder, device="cpu", overwrite=True)
            options = TranslationEvaluationOptions(split="test")
            result = evaluate_translator(Run.open(run_folder), options=options, reporter=Printer())
            scores = result.scores
            print(
                f"{name} seed {seed}: BLEU {scores.bleu:.2f} ({interval(scores.bleu_ci95)}), chrF {scores.chrf:.2f}, "
                f"loss {result.loss:.4f}"
            )
            for baseline_name, baseline in result.baselines.items():
                paired = result.against_baselines[baseline_name]
                difference = f"BLEU of model minus baseline {paired.difference:+.2f} ({interval(paired.ci95)})"
                print(f"  {baseline_name}: BLEU {baseline.bleu:.2f}, chrF {baseline.chrf:.2f}, {difference}")


JOEY = """\
name: joey
joeynmt_version: 2.3.0
model_dir: {folder}/model
use_cuda: False
random_seed: 42
data:
  train: {folder}/train
  dev: {folder}/dev
  test: {folder}/test
  dataset_type: plain
  src: {{lang: de, level: bpe, lowercase: False, max_length: {length}, voc_file: {folder}/vocab.txt, tokenizer_type: sentencepiece,
    tokenizer_cfg: {{model_file: {folder}/sp.model}}}}
  trg: {{lang: en, level: bpe, lowercase: False, max_length: {length}, voc_file: {folder}/vocab.txt, tokenizer_type: sentencepiece,
    tokenizer_cfg: {{model_file: {folder}/sp.model}}}}
testing: {{beam_size: 5, beam_alpha: 1.0, batch_size: 1024, batch_type: token, eval_metrics: [bleu]}}
training:
  optimizer: adamw
  adam_betas: [0.9, 0.98]
  scheduling: warmupinversesquareroot
  learning_rate: 0.001
  learning_rate_min: 1.0e-9
  learning_rate_warmup: 400
  label_smoothing: 0.1
  loss: crossentropy
  batch_size: 2048
  batch_type: token
  normalization: tokens
  epochs: 1000
  validation_freq: 1000000
  logging_freq: 100
  early_stopping_metric: bleu
  overwrite: True
  shuffle: True
model:
  initializer: xavier_uniform
  bias_initializer: zeros
  embed_initializer: xavier_uniform
  tied_embeddings: True
  tied_softmax: True
  encoder: {{type: transformer, num_layers: 3, num_heads: 4, embeddings: {{embedding_dim: 256, scale: True, dropout: 0.0}},
    hidden_size: 256, ff_size: 1024, dropout: 0.2, layer_norm: pre}}
  decoder: {{type: transformer, num_layers: 3, num_heads: 4, embeddings: {{embedding_dim: 256, scale: True, dropout: 0.0}},
    hidden_size: 256, ff_size: 1024, dropout: 0.2, layer_norm: pre}}
"""


def joeynmt(minutes: float, folder: Path, python: str) -> None:
    """Write the pairs and a configuration for JoeyNMT, train it for the same number of minutes, and score its translations."""
    recipe = load(RECIPE)
    prepared = formats.find(recipe.data).prepare(recipe, Printer(), 1)
    folder.mkdir(parents=True, exist_ok=True)
    scored = prepared.test.pairs[::JOEY_TEST_EVERY]
    parts = {"train": prepared.train.pairs, "dev": prepared.heldout.pairs, "test": scored}
    for name, pairs in parts.items():
        for language, texts in (("de", [pair.source for pair in pairs]), ("en", [pair.target for pair in pairs])):
            (folder / f"{name}.{language}").write_text("\n".join(texts) + "\n", encoding="utf-8")
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=[str(folder / "train.de"), str(folder / "train.en")],
        model_prefix=str(folder / "sp"),
        vocab_size=recipe.tokenizer.vocab_size,
        model_type="bpe",
        unk_id=0,
        pad_id=1,
        bos_id=2,
        eos_id=3,
    )
    pieces = [line.split("\t")[0] for line in (folder / "sp.vocab").read_text(encoding="utf-8").splitlines()]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    (folder / "config.yaml").write_text(JOEY.format(folder=folder, length=recipe.model.context_length), encoding="utf-8")
    command = [python, "-m", "joeynmt", "train", str(folder / "config.yaml"), "--skip-test"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background inherits that SIGINT is ignored
    process = subprocess.Popen(command)
    try:
        process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # JoeyNMT then saves a checkpoint
        process.wait()
    command = [python, "-m", "joeynmt", "translate", str(folder / "config.yaml")]
    translated = subprocess.run(command, stdin=open(folder / "test.de", "rb"), capture_output=True, check=True)  # noqa: SIM115
    translations = translated.stdout.decode().splitlines()
    scores = bleu.score(translations, [pair.target for pair in scored])
    print(f"JoeyNMT: BLEU {scores.bleu:.2f} ({interval(scores.bleu_ci95)}), chrF {scores.chrf:.2f} ({scores.bleu_signature})")


def decoding(run: Run, sentences: int, beams: int, batch_size: int, ct2_converter: str) -> None:
    """Time tinylm, transformers and CTranslate2 (if it is installed) in turn, with the same weights and sentences."""
    import transformers

    translator = Translator.open(run, device="cpu")
    marian.check_exportable(run.recipe.model, translator.framing.source_tokenizer is not translator.framing.target_tokenizer)
    compiled_translation.load_code(print)
    compiled = CompiledTranslation(translator.network)
    pairs = evaluation_pairs(run, (), "heldout", Printer())[:sentences]
    framing = translator.framing
    sources = [framing.source(framing.source_tokenizer.encode(pair.source)[: framing.source_limit]) for pair in pairs]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "hf"
        folder.mkdir()
        marian.write(folder, translator, "", "f32")
        other = marian.load(folder)
        systems = {"tinylm": lambda: _tinylm(translator, sources, beams, batch_size, compiled)}
        systems["tinylm with PyTorch"] = lambda: _tinylm(translator, sources, beams, batch_size, None)
        systems["transformers"] = lambda: _transformers(other, sources, beams, batch_size)
        if ctranslate2 := _ctranslate2(folder, ct2_converter):
            systems["CTranslate2"] = lambda: _run_ctranslate2(ctranslate2, framing, pairs, beams, batch_size)
        best: dict[str, tuple[float, int]] = {}
        for _ in range(REPEATS):
            for name, system in systems.items():
                start = time.perf_counter()
                tokens = system()
                seconds = time.perf_counter() - start
                best[name] = min(best.get(name, (float("inf"), 0)), (seconds, tokens))
    rates = {name: tokens / seconds for name, (seconds, tokens) in best.items()}
    for name, rate in rates.items():
        print(f"{name}: {rate:,.0f} tokens/s, {rate / rates['transformers']:.2f} x transformers {transformers.__version__}")


def _tinylm(translator: Translator, sources: list, beams: int, batch_size: int, compiled: CompiledTranslation | None) -> int:
    options = SearchOptions(beams=beams, length_penalty=0.0, max_length=translator.network.model.context_length)
    end = translator.framing.target_end
    found = translate_ids(translator.network, sources, end, options, batch_size=batch_size, compiled=compiled)
    return sum(len(best[0].ids) + 1 for best in found)


def _transformers(other: object, sources: list, beams: int, batch_size: int) -> int:
    """Translate in order of length, as tinylm does, to minimize padding. Return the number of generated tokens."""
    ordered, tokens = sorted(sources, key=len), 0
    pad = other.config.pad_token_id
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        ids = torch.full((len(batch), max(map(len, batch))), pad)
        for row, source in enumerate(batch):
            ids[row, : len(source)] = torch.from_numpy(source)
        with torch.inference_mode():
            found = other.generate(
                input_ids=ids,
                attention_mask=(ids != pad).long(),
                num_beams=beams,
                length_penalty=0.0,
                max_length=None,
                max_new_tokens=other.config.max_position_embeddings - 1,
            )
        tokens += int((found[:, 1:] != pad).sum())
    return tokens


def _ctranslate2(folder: Path, converter: str) -> object | None:
    try:
        import ctranslate2
    except ImportError:
        print("CTranslate2 is not installed (pip install ctranslate2)")
        return None
    output = folder.parent / "ct2"
    subprocess.run([converter, "--model", str(folder), "--output_dir", str(output)], check=True)
    return ctranslate2.Translator(str(output), device="cpu", intra_threads=torch.get_num_threads(), compute_type="float32")


def _run_ctranslate2(translator: object, framing: object, pairs: list[SentencePair], beams: int, batch_size: int) -> int:
    backend = framing.source_tokenizer.backend
    end = backend.id_to_token(framing.target_end)
    tokens = [[*backend.encode(pair.source, add_special_tokens=False).tokens, end] for pair in pairs]
    results = translator.translate_batch(tokens, beam_size=beams, max_batch_size=batch_size, length_penalty=0)
    return sum(len(result.hypotheses[0]) + 1 for result in results)


def batch_invariance(run: Run, sentences: int) -> None:
    """Translate sentences alone and in batches of 32, and count the differences."""
    translator = Translator.open(run, device="cpu")
    texts = [pair.source for pair in evaluation_pairs(run, (), "heldout", Printer())[:sentences]]
    together = translator.translate(texts, batch_size=32)
    alone = [translator.translate([text])[0] for text in texts]
    different = sum(a != b for a, b in zip(together, alone, strict=True))
    print(json.dumps({"sentences": len(texts), "different": different}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "joeynmt", "decoding", "invariance"])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models for `quality`")
    parser.add_argument("--run")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="number of threads for decoding")
    parser.add_argument("--out", type=Path, default=Path("runs/translation-benchmark"))
    parser.add_argument("--joey-python", default=sys.executable)
    parser.add_argument("--ct2-converter", default="ct2-transformers-converter")
    options = parser.parse_args()
    if options.what == "quality":
        quality(options.minutes, options.seeds, options.models, options.out)
    elif options.what == "joeynmt":
        joeynmt(options.minutes, options.out / "joeynmt", options.joey_python)
    elif options.what == "decoding":
        torch.set_num_threads(options.threads)
        decoding(Run.open(options.run), options.sentences, options.beams, options.batch_size, options.ct2_converter)
    else:
        batch_invariance(Run.open(options.run), options.sentences)


if __name__ == "__main__":
    main()
