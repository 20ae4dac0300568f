"""Test that help, listings and errors do not import torch, because they must be fast. One subprocess runs all commands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from command import environment
from tinylm_cli.app import COMMANDS

RUNNER = """
import contextlib, io, json, sys
from tinylm_cli.app import main
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["tinylm", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as exit_request:
            code = exit_request.code or 0
    results.append([code, out.getvalue(), err.getvalue(), "torch" in sys.modules])
print(json.dumps(results))
"""
HELP = [[], ["tokenize"], ["embed"], *([name, "--help"] for name in COMMANDS), ["-h"], ["--help"], ["--version"]]
HELP += [
    ["tokenize", name, "--help"] for name in ("train", "encode", "decode", "report", "compare", "explain", "sweep", "add", "remove")
]
EMBED = ("train", "from-run", "nearest", "analogy", "similarity", "odd-one-out", "eval", "export", "import", "plot")
HELP += [["embed", name, "--help"] for name in EMBED]
Results = dict[str, tuple[int, str, str, bool]]
"""For each command line: exit code, stdout, stderr, and whether torch was imported."""
MISTAKES = {
    "trian x": "no such command 'trian' (did you mean train?)",
    "generate hello": "no such command 'generate' (did you mean sample?)",
    "list": "no such command 'list' (did you mean runs?)",
    "sample hello": "(pass the text to continue with --prompt; see `tinylm sample --help`)",
    "sample --max_tokens 3": "no such option: --max_tokens (did you mean --max-new-tokens?; see `tinylm sample --help`)",
    "train text.txt": "text.txt: is a text, not a recipe (`tinylm new text.txt --out my.yaml` writes a recipe for this text",
    "train builtin:python-docs": "builtin:python-docs: is a text, not a recipe",
    "new text.txt --minutes 2x": "--minutes: must be a positive duration, not '2x' (a number of minutes, or 90s, 5m or 2h)",
    "new text.txt --minutes 2m": "text.txt: 4,500 bytes are not enough to train on",
    "tokenize train text.txt --field body --out t.json": "text.txt: --field (data.field) has no effect on plain text",
    "embed from-run --out v.dat --run nowhere": "v.dat: the suffix is not one of .safetensors, .bin, .vec, .txt, .tsv",
    "xyzzy": "no such command 'xyzzy' (`tinylm --help` lists the commands)",
    "train": "requires either a RECIPE or --replay REPORT",
    "train quickstart --epochs 3": "no such option: --epochs (set it with --set training.epochs=VALUE; see `tinylm train --help`)",
    "train quikstart": "quikstart: no such recipe (did you mean quickstart?)",
    "train nowhere.yaml": "nowhere.yaml: no such file (`tinylm recipes` lists",
    "train runs/nowhere": "runs/nowhere: no such file (`tinylm recipes` lists",
    "train nowhere": "nowhere: no such recipe (`tinylm recipes` lists",
    "train quickstart --set model.n_layers=3": "--set model.n_layers=3: model.n_layers: unknown key (did you mean n_layer?)",
    "train quickstart --stop-after soon": "--stop-after: 'soon' is not a duration (for example 90s, 55m or 2h)",
    "train quickstart --resume --overwrite": "--resume, --overwrite: these options are mutually exclusive",
    "train quickstart --allow-change seed": "--allow-change: requires --resume",
    "train quickstart --seed -1": "invalid value for '--seed'",
    "train quickstart --device tpu": "--device: no such device 'tpu' (use one of auto, cpu, cuda, mps)",
    "new": "SOURCE: missing (pass a text, or conversations with --chat FILE --from RUN)",
    "new nowhere.txt": "nowhere.txt: no such file or folder",
    "new -": "-: standard input cannot be read again for training (save it to a file)",
    "new text.txt --minutes 0": "--minutes: must be a positive duration, not '0'",
    "new text.txt --minutes 1e9": "not '1e9' (write the number without an exponent: a number of minutes",
    "new text.txt --out text.txt": "text.txt: already exists (--overwrite replaces it)",
    "new text.txt --devices 2": "--devices: requires --hardware",
    "new text.txt --hardware h100-smx": "did you mean h100-sxm?",
    "new text.txt": "text.txt: 4,500 bytes are not enough to train on (use a longer text)",
    "scale": "SOURCE: is required (pass a text, or compare a run with --check RUN)",
    "scale text.txt": "text.txt: 4,500 bytes are not enough to train on (use a longer text)",
    "plan": "missing argument 'recipe'",
    "plan quickstart --set training.micro_batch_size=3": "training.micro_batch_size: 3 does not divide global_batch_size",
    "plan quickstart --hardware abacus": "--hardware: unknown accelerator 'abacus' (known accelerators: b200, h200,",
    "plan quickstart --hardware h100-smx": "did you mean h100-sxm?",
    "plan quickstart --devices 2": "--devices: requires --hardware",
    "sample": "there are no runs in runs/ yet (train one with `tinylm train quickstart`, or select one with --run)",
    "sample -n 0": "invalid value for '-n'",
    "sample --top-k 0": "--top-k: must be 1 or more, not 0",
    "sample --temperature -1": "--temperature: must be 0 or more, not -1.0",
    "sample --max-new-tokens -3": "--max-new-tokens: must be 0 to 1000000000, not -3",
    "sample --run nowhere": "nowhere: no such run (`tinylm runs` lists the runs in runs/)",
    "eval --threads 0": "invalid value for '--threads'",
    "eval --stride 0": "--stride: must be at least 1, not 0",
    "eval --errors perhaps": "--errors: must be strict or replace, not 'perhaps'",
    "eval --harness": "--harness: requires a task (for example `tinylm eval --harness my_task.yaml`)",
    "eval --harness nowhere.yaml": "nowhere.yaml: no such task file",
    "eval --harness piqa --context 8": "--context: cannot be combined with --harness",
    "eval --limit 3": "--limit: requires --harness",
    "export --to hf": "missing argument 'path'",
    "export out": "missing option '--to'",
    "export out --to hff": "--to: must be hf, gguf, onnx or arpa, not 'hff' (did you mean hf?)",
    "export out --to onnx --type f16": "--type: requires --to hf or gguf",
    "export out --to gguf --type q8": "--type: must be f32, f16, q8_0 or q4_0 with --to gguf, not 'q8' (did you mean q8_0?)",
    "export out --to gguf": "there are no runs in runs/ yet",
    "import nowhere --out run": "nowhere: no such file or folder",
    "import text.txt": "missing option '--out'",
    "runs nowhere": "nowhere: no such folder",
    "recipes quikstart": "quikstart: no such recipe (did you mean quickstart?)",
    "tokenize trian": "no such command 'trian'",
    "tokenize encode nowhere.txt": "there are no runs in runs/ yet",
    "tokenize encode - -t nowhere.json": "nowhere.json: no such tokenizer file",
    "tokenize encode - -t x --format hex": "--format: must be ids, tokens or jsonl, not 'hex'",
    "tokenize train nowhere.txt --out t.json": "nowhere.txt: no such file or folder",
    "tokenize train nowhere.txt --out t.json --kind wordpice": "not 'wordpice' (did you mean wordpiece?)",
    "tokenize train nowhere.txt --out t.json --vocab-size 9": "--vocab-size: must be at least 257 for bpe",
    "tokenize train nowhere.txt --out t.json --kind char --vocab-size 9": "--vocab-size: not supported for char tokenizers, only",
    "tokenize train nowhere.txt --out t.json --kind word --dropout 9": "no such option",
    "tokenize train nowhere.txt --out t.json --normalize nfx": "--normalize: must be none or some of nfc, nfd,",
    "tokenize compare nowhere.json --on nowhere.txt": "nowhere.json: no such tokenizer file",
    "tokenize sweep nowhere.txt --sizes 5,x": "--sizes: must be numbers separated by commas",
    "tokenize add abc -t nowhere.json --out t.json": "nowhere.json: no such tokenizer file",
    "embed nearst": "no such command 'nearst'",
    "embed train": "missing argument 'source'",
    "embed train nowhere.txt": "SOURCE: nowhere.txt: no such file or folder",
    "embed train text.txt --method glow": "--method: must be one of skipgram, cbow, glove, not 'glow' (did you mean glove?)",
    "embed train text.txt --window 0": "--window: must be a whole number of at least 1, not 0",
    "embed train text.txt --method glove --negatives 3": "--negatives: not a key of method glove",
    "embed train text.txt --set method.lr_end=1": "method.lr_end: must be at most lr 0.025",
    "embed train text.txt --tokenizer t.json --keep-case": "--keep-case: cannot be combined with --tokenizer",
    "embed train text.txt --resume --overwrite": "--resume, --overwrite: these options are mutually exclusive",
    "embed train text.txt --stop-after soon": "--stop-after: 'soon' is not a duration",
    "train vectors.yaml --dry-run": "--dry-run: not supported for embeddings",
    "train vectors.yaml --workers 2": "--workers: not supported for embeddings",
    "train vectors.yaml --device cuda": "--device: not supported for embeddings",
    "train vectors.yaml --resume --overwrite": "--resume, --overwrite: these options are mutually exclusive",
    "plan vectors.yaml": "vectors.yaml: this recipe is for embeddings, not for a language model",
    "embed nearest king": "there are no vectors under embeddings/ (train some with",
    "embed nearest king -v nowhere": "nowhere: no such file",
    "embed nearest king -v text.txt": "text.txt:1: contains a value that is not a number",
    "embed nearest king -v three.txt": "'king' is not among the 3 vectors",
    "embed analogy a b -v three.txt": "analogy requires three words, not 2",
    "embed analogy a b c --method cosine": "--method: must be 3cosadd or 3cosmul, not 'cosine'",
    "embed similarity a -v three.txt": "similarity requires two words, not 1",
    "embed odd-one-out a b -v three.txt": "the odd one out needs at least three words, not 2",
    "embed eval nowhere.txt -v three.txt": "nowhere.txt: No such file or directory",
    "embed export three.txt -v three.txt": "three.txt: the file already exists (--overwrite replaces it)",
    "embed export out.dat -v three.txt": "out.dat: the suffix is not one of",
    "embed import three.txt --out out.bin": "--out: must end in .safetensors",
    "embed plot map.gif -v three.txt": "map.gif: the file name must end in one of .html, .png, .svg, .pdf",
    "embed plot map.html -v three.txt --projection tsna": "not 'tsna' (did you mean tsne?)",
    "embed from-run --out v.safetensors --which inputs": (
        "--which: must be input, output, contextual or sentence, not 'inputs' (did you mean input?)"
    ),
    "embed from-run --out v.safetensors --which contextual": "--which contextual: requires a SOURCE",
    "embed from-run --out v.safetensors --layer 1": "--layer: requires --which contextual",
    "embed from-run --out v.safetensors --run nowhere": "nowhere: no such run",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("empty")
    commands = [
        *HELP,
        ["plan", "recipe.yaml", "--json"],
        ["plan", "recipe.yaml", "--hardware", "l4"],
        ["runs", "--json"],
        ["recipes"],
        ["embed", "nearest", "a", "-v", "three.txt", "--json"],
        *(line.split() for line in MISTAKES),
    ]
    (folder / "recipe.yaml").write_text(
        "data: {train: text.txt}\ntokenizer: {kind: byte}\n"
        "model: {n_embd: 32, n_head: 2, context_length: 16}\ntraining: {steps: 5}\n"
    )
    (folder / "three.txt").write_text("a 1 2\nb 2 1\nc 3 3\n")
    (folder / "vectors.yaml").write_text("kind: embeddings\ndata: {train: text.txt}\n")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    before = sorted(folder.iterdir())
    runner = [sys.executable, "-c", RUNNER, json.dumps(commands)]
    process = subprocess.run(runner, cwd=folder, capture_output=True, text=True, env=environment(), timeout=600, check=True)
    assert sorted(folder.iterdir()) == before, "failed commands must not leave files"
    return {" ".join(command): tuple(result) for command, result in zip(commands, json.loads(process.stdout), strict=True)}


def test_no_command_imports_torch(results: Results) -> None:
    assert [command for command, result in results.items() if result[3]] == []


@pytest.mark.parametrize("command", [" ".join(command) for command in HELP if command and command not in (["tokenize"], ["embed"])])
def test_help_is_printed_on_stdout(results: Results, command: str) -> None:
    code, out, err, _ = results[command]
    assert (code, err) == (0, "")
    assert "tinylm" in out


def test_help_lists_every_command(results: Results) -> None:
    assert all(f" {name} " in results["--help"][1] for name in COMMANDS)


@pytest.mark.parametrize("command", ["", "tokenize", "embed"])
def test_help_is_printed_on_stderr_if_no_command_is_specified(results: Results, command: str) -> None:
    code, out, err, _ = results[command]
    assert (code, out) == (2, "")
    assert "Usage" in err


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_reported_on_one_line_with_exit_code_2(results: Results, command: str) -> None:
    code, out, err, _ = results[command]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert MISTAKES[command] in err


def test_plan_estimates_the_cost_without_torch(results: Results) -> None:
    code, out, _, _ = results["plan recipe.yaml --json"]
    assert code == 0
    assert json.loads(out)["steps"] == 5
    code, out, _, _ = results["plan recipe.yaml --hardware l4"]
    assert (code, "time on 1 l4" in out) == (0, True)


def test_the_list_of_runs_is_empty_if_there_are_none(results: Results) -> None:
    assert results["runs --json"][:3] == (0, "[]\n", "")


def test_shell_completion_offers_commands_and_their_options() -> None:
    for words, expected in (("tinylm tok", "tokenize"), ("tinylm train --dry", "--dry-run"), ("tinylm tokenize enc", "encode")):
        variables = {"_TINYLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        code = "import sys; sys.argv = ['tinylm']; from tinylm_cli.app import main; main()"
        environment_variables = {**environment(), **variables}
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment_variables)
        assert process.stdout.split() == [expected]
