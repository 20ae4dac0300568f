"""Compare tinylm's generation speed with that of transformers' `generate`, with the same weights and interleaved runs.

    python benchmarks/sampling.py [--models 0.86M 13.8M 124M] [--rows 1 16] [--rounds 5] [--first-token]

Each model has the `gpt2` preset and random weights, which are copied into a GPT2LMHeadModel. The script first checks that greedy
decoding produces the same tokens, and counts the sampled texts that differ with compiled decoding. Then it samples with top-k 50
after a 16-token prompt, with batch sizes 1 and 16. The end-of-text token is banned in both libraries. The speedup is the ratio of
the median times. "default" is what `tinylm sample` uses without options once the code has been compiled. With
`--first-token`, the script instead measures the time to the first token after a 1000-token prompt, with the 13.8M model.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from tinylm.generation.engine import Engine, Request
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import Decoder, make_decoder
from tinylm.model.packed import WEIGHT_KINDS
from tinylm.model.state import DecodingModel
from tinylm.model.transformer import Transformer
from tinylm.recipe.schema import ByteTokenizer, DecoderSection
from tinylm.reporting import SILENT
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training

MODELS = {
    "0.86M": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 256}, 512, 200),
    "13.8M": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 1024}, 8192, 200),
    "124M": ({"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024}, 50257, 16),
}
PROMPT = list(range(10, 26))
END = 0


class FakeTokenizer(Tokenizer):
    """A tokenizer with an arbitrary vocabulary size. Its decoded text is meaningless."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print).backend)
        self.__dict__.update(vocab_size=vocab_size, end_of_text=END, token_bytes=[b"x"] * vocab_size)


def to_transformers(network: Transformer, vocab_size: int) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with the weights of `network`."""
    model = network.model
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=model.context_length,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        bos_token_id=END,
        eos_token_id=None,
    )
    gpt2 = GPT2LMHeadModel(config).eval()
    weights = network.state_dict()
    their_weights = {"wte.weight": weights["embedding.weight"], "wpe.weight": weights["positions.weight"]}
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.input": "mlp.c_fc",
        "feed_forward.output": "mlp.c_proj",
    }
    for layer in range(model.n_layer):
        for name, their_name in names.items():
            for part in ("weight", "bias"):
                value = weights[f"blocks.{layer}.{name}.{part}"]
                their_weights[f"h.{layer}.{their_name}.{part}"] = value.T if value.ndim == 2 else value
    their_weights |= {f"ln_f.{part}": weights[f"final_norm.{part}"] for part in ("weight", "bias")}
    gpt2.transformer.load_state_dict(their_weights)
    gpt2.tie_weights()
    return gpt2


def add_noise(network: Transformer) -> Transformer:
    """Add noise, so that the weights are about as large as trained weights and the model does not repeat one token."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return network


def measure_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def generate_with_tinylm(
    decoder: DecodingModel[Any], tokenizer: Tokenizer, rows: int, tokens: int, prompt: list[int], temperature: float = 1.0
) -> list[list[int]]:
    """Generate `rows` samples with the engine, as `tinylm sample` does, and return their token ids."""
    settings = SamplingOptions(tokens, logit_bias=((END, float("-inf")),), temperature=temperature)
    engine = Engine(decoder, tokenizer, rows, max_tokens=len(prompt) + tokens)
    sequences = engine.add([Request("", settings, seed) for seed in range(rows)], prompt)
    while engine.busy:
        engine.step()
    return [sequence.sample.token_ids for sequence in sequences]


def generate_with_transformers(gpt2: GPT2LMHeadModel, rows: int, tokens: int, prompt: list[int], **options: object) -> torch.Tensor:
    ids = torch.tensor([prompt] * rows)
    with torch.inference_mode():
        output: torch.Tensor = gpt2.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=END, suppress_tokens=[END], **options
        )
    return output


def benchmark(name: str, all_rows: list[int], rounds: int) -> None:
    shape, vocab_size, tokens = MODELS[name]
    network = add_noise(Transformer(DecoderSection.model_validate({"preset": "gpt2", **shape}), vocab_size)).eval()
    gpt2, tokenizer = to_transformers(network, vocab_size), FakeTokenizer(vocab_size)
    decoders: dict[str, DecodingModel[Any]] = {
        f"{weights}{' compiled' if compiled else ''}": Decoder(network, weights=weights, compiled=compiled)
        for weights in WEIGHT_KINDS
        for compiled in (False, True)
    }
    expected = generate_with_transformers(gpt2, 1, 12, PROMPT, do_sample=False)[0, len(PROMPT) :].tolist()
    decoders["default"] = make_decoder(network, weights=None, compiled=None, steps=tokens, reporter=SILENT)
    for kind in ("fp32", "fp32 compiled"):
        assert generate_with_tinylm(decoders[kind], tokenizer, 1, 12, PROMPT, temperature=0.0) == [expected], (
            "greedy decoding differs"
        )
    texts = [generate_with_tinylm(decoders[kind], tokenizer, 4, tokens, PROMPT) for kind in ("fp32", "fp32 compiled")]
    differing = sum(uncompiled != compiled for uncompiled, compiled in zip(*texts, strict=True))
    print(f"{name}: {differing} of 4 sampled texts of {tokens} tokens differ between uncompiled and compiled decoding")
    for rows in all_rows:
        variants: dict[str, Callable[[], object]] = {
            "transformers": lambda rows=rows: generate_with_transformers(gpt2, rows, tokens, PROMPT, do_sample=True, top_k=50)
        }
        for kind, decoder in decoders.items():
            variants[kind] = lambda rows=rows, decoder=decoder: generate_with_tinylm(decoder, tokenizer, rows, tokens, PROMPT)
        report(f"{name}, batch size {rows}", variants, rounds, rows * tokens)


def first_token(rounds: int) -> None:
    shape, vocab_size, _ = MODELS["13.8M"]
    network = add_noise(Transformer(DecoderSection.model_validate({"preset": "gpt2", **shape}), vocab_size)).eval()
    gpt2, tokenizer = to_transformers(network, vocab_size), FakeTokenizer(vocab_size)
    prompt = torch.randint(1, vocab_size, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    decoder = Decoder(network)
    variants = {
        "transformers": lambda: generate_with_transformers(gpt2, 1, 1, prompt, do_sample=True, top_k=50),
        "fp32": lambda: generate_with_tinylm(decoder, tokenizer, 1, 1, prompt),
    }
    report("first token, 1000-token prompt, 13.8M", variants, rounds, None)


def report(title: str, variants: dict[str, Callable[[], object]], rounds: int, tokens: int | None) -> None:
    """Time every variant once per round. Print the median throughput, or the median time, and the speedup over transformers."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for work in variants.values():
        work()
    for _ in range(rounds):
        for name, work in variants.items():
            seconds[name].append(measure_seconds(work))
    base = statistics.median(seconds["transformers"])
    for name, times in seconds.items():
        median = statistics.median(times)
        ratios = sorted(a / b for a, b in zip(seconds["transformers"], times, strict=True))
        measured = f"{1e3 * median:9.1f} ms" if tokens is None else f"{tokens / median:9.1f} tokens/s"
        print(
            f"{title:<38} {name:<13} {measured}  speedup {base / median:5.2f}"
            f"  (range over rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--first-token", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.first_token:
        first_token(options.rounds)
        return
    for name in options.models:
        benchmark(name, options.rows, options.rounds)


if __name__ == "__main__":
    main()
