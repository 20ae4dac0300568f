"""Compare recurrent networks with torch.nn, and run the ladder of model generations on several texts.

    python benchmarks/ladder.py speed [--rounds 5] [--steps 10] [--tokens 300]
    python benchmarks/ladder.py texts TEXT [TEXT...] [--minutes 50] [--seeds 1 2 3] [--set tokenizer=char] [--out DIR]

`speed` compares the speed of training steps with that of a simple language model built from torch.nn modules, and the speed of
compiled sampling with that of a torch loop that samples from the 50 most likely tokens. `texts` runs `tinylm ladder` on each text
with each seed. It prints one table per text with the mean bits per byte over the seeds, the range over the seeds, and the first
seed's confidence interval. For example, TEXT can be the path to tinyshakespeare.txt, with `--set tokenizer=char` and
`--minutes 50`, which gives each of the 5 models 10 minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.generation.engine import Engine, Request
from tinylm.generation.sampling import SamplingOptions
from tinylm.model import registry
from tinylm.model.compiled_recurrent import CompiledRecurrent
from tinylm.model.recurrent import Recurrent
from tinylm.recipe.recurrent import GruSection, LstmSection, RecurrentSection
from tinylm.recipe.schema import ByteTokenizer
from tinylm.text.sources import Piece
from tinylm.tokenizer import Tokenizer, training

SECTIONS: dict[str, type[RecurrentSection]] = {"lstm": LstmSection, "gru": GruSection}
BATCH, CONTEXT = 32, 64
TEMPERATURE, TOP_K = 0.8, 50


class PlainModel(nn.Module):
    """An embedding, torch.nn's recurrent layers and a head, as in a tutorial."""

    def __init__(self, kind: str, vocab_size: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens: Tensor, state: object = None) -> tuple[Tensor, object]:
        outputs, state = self.layers(self.embedding(tokens), state)
        return self.head(outputs), state


def our_model(kind: str, vocab_size: int, width: int, layers: int) -> Recurrent:
    section = SECTIONS[kind](n_layer=layers, n_embd=width, context_length=CONTEXT, burn_in=0)
    built = registry.build(section, vocab_size, 0)
    assert isinstance(built, Recurrent)
    return built


def seconds_per_step(ours: Recurrent | None, plain: PlainModel | None, steps: int) -> float:
    """Return the mean time of a training step (forward pass, backward pass and AdamW) for the model that is not None."""
    model = ours if ours is not None else plain
    assert model is not None
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(256, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for _ in range(steps):
        if ours is not None:
            loss = ours(tokens[:, :-1], targets=tokens[:, 1:]) / (BATCH * CONTEXT)
        else:
            assert plain is not None
            loss = F.cross_entropy(plain(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps


@torch.inference_mode()
def plain_tokens_per_second(model: PlainModel, tokens: int) -> float:
    token, state = torch.zeros(1, 1, dtype=torch.long), None
    start = time.perf_counter()
    for _ in range(tokens):
        logits, state = model(token, state)
        values, ids = (logits[:, -1] / TEMPERATURE).topk(TOP_K)
        token = ids.gather(1, torch.multinomial(values.softmax(-1), 1))
    return tokens / (time.perf_counter() - start)


def our_tokens_per_second(model: Recurrent, tokenizer: Tokenizer, tokens: int) -> float:
    options = SamplingOptions(max_new_tokens=tokens, temperature=TEMPERATURE, top_k=TOP_K)
    engine = Engine(CompiledRecurrent(model), tokenizer, 1)
    engine.add([Request("a", options, 1)])
    start = time.perf_counter()
    while engine.busy:
        engine.step()
    return tokens / (time.perf_counter() - start)


def speed(rounds: int, steps: int, tokens: int) -> None:
    tokenizer = training.train(ByteTokenizer(kind="byte"), iter([Piece("text", True)]), print)
    vocab_size = tokenizer.vocab_size
    tokenizer.__dict__["end_of_text"] = None  # so that no sample ends early
    print("training in steps/s, sampling in tokens/s, ratio: tinylm / torch")
    print(f"{'':14} {'training':>9} {'':9} {'':7}   {'sampling':>12}")
    print(f"{'model':14} {'torch.nn':>9} {'tinylm':>9} {'ratio':>7}   {'torch loop':>12} {'tinylm':>9} {'ratio':>7}")
    for kind in SECTIONS:
        for width, layers in ((128, 1), (256, 1), (256, 2)):
            plain, ours = PlainModel(kind, vocab_size, width, layers), our_model(kind, vocab_size, width, layers)
            our_tokens_per_second(ours, tokenizer, 5)  # loads the compiled code
            rows = []
            for _ in range(rounds):
                rows.append(
                    (
                        1 / seconds_per_step(None, plain, steps),
                        1 / seconds_per_step(ours, None, steps),
                        plain_tokens_per_second(plain, tokens),
                        our_tokens_per_second(ours, tokenizer, tokens),
                    )
                )
            a, b, c, d = (statistics.median(column) for column in zip(*rows, strict=True))
            training_ratio = statistics.median(row[1] / row[0] for row in rows)
            sampling_ratio = statistics.median(row[3] / row[2] for row in rows)
            name = f"{kind} {layers}x{width}"
            print(f"{name:14} {a:9.1f} {b:9.1f} {training_ratio:7.2f}   {c:12.0f} {d:9.0f} {sampling_ratio:7.1f}", flush=True)


def run_ladder(text: str, minutes: str, seed: int, settings: list[str], out: Path) -> list[dict[str, object]]:
    """Run `tinylm ladder` and return the rows of its table. A ladder that is already finished is not trained again."""
    command = [sys.executable, "-m", "tinylm", "ladder", text, "--minutes", minutes, "--seed", str(seed), "--json"]
    command += ["--out", str(out / f"{Path(text).stem}-{seed}"), *(part for setting in settings for part in ("--set", setting))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    rows: list[dict[str, object]] = json.loads(done.stdout)["rows"]
    return rows


def texts(sources: list[str], minutes: str, seeds: list[int], settings: list[str], out: Path) -> None:
    for text in sources:
        ladders = [run_ladder(text, minutes, seed, settings, out) for seed in seeds]
        print(f"\n{text}: {minutes} minutes of training in total, seeds {' '.join(map(str, seeds))}")
        print("model       parameters  bits per byte  range over seeds     95% interval of the first seed")
        for rows in zip(*ladders, strict=True):
            bits = [float(str(row["bits_per_byte"])) for row in rows]
            low, high = rows[0]["bits_per_byte_ci95"]  # type: ignore[misc]
            print(
                f"{rows[0]['model']:10} {rows[0]['parameters']:11,} {statistics.fmean(bits):14.4f}"
                f"  {min(bits):.4f} to {max(bits):.4f}     {low:.4f} to {high:.4f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("speed", help="compare training and sampling speed with torch.nn")
    measured.add_argument("--rounds", type=int, default=5)
    measured.add_argument("--steps", type=int, default=10, help="training steps in each round")
    measured.add_argument("--tokens", type=int, default=300, help="tokens sampled in each round")
    ladders = commands.add_parser("texts", help="run the ladder on several texts and seeds")
    ladders.add_argument("texts", nargs="+")
    ladders.add_argument("--minutes", default="50", help="total training time of all models in a ladder")
    ladders.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    ladders.add_argument("--set", action="append", default=[], help="a recipe key to set for all models; can be repeated")
    ladders.add_argument("--out", type=Path, default=Path("runs/ladders"))
    arguments = parser.parse_args()
    if arguments.command == "speed":
        speed(arguments.rounds, arguments.steps, arguments.tokens)
    else:
        texts(arguments.texts, arguments.minutes, arguments.seeds, arguments.set, arguments.out)


if __name__ == "__main__":
    main()
