"""What must answer at once does so without loading torch, told by a process that runs it all and looks at its modules."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from command import environment
from tinylm_cli.app import VERBS

SPY = """
import contextlib, io, json, sys
from tinylm_cli.app import main
answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["tinylm", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ending:
            code = ending.code or 0
    answers.append([code, out.getvalue(), err.getvalue(), "torch" in sys.modules])
print(json.dumps(answers))
"""
HELP = [[], ["tokenize"], ["embed"], *([verb, "--help"] for verb in VERBS), ["-h"], ["--help"], ["--version"]]
HELP += [
    ["tokenize", verb, "--help"] for verb in ("train", "encode", "decode", "report", "compare", "explain", "sweep", "add", "remove")
]
EMBED = ("train", "from-run", "nearest", "analogy", "similarity", "odd-one-out", "eval", "export", "import", "plot")
HELP += [["embed", verb, "--help"] for verb in EMBED]
MISTAKES = {
    "trian x": "no such verb 'trian' (did you mean train?)",
    "xyzzy": "no such verb 'xyzzy' (`tinylm --help` lists them)",
    "train": "give a RECIPE, or a report with --replay",
    "train quickstart --epochs 3": "no such option: --epochs (`tinylm train --help` explains)",
    "train quikstart": "quikstart: no such recipe file, and none of that name ships (did you mean quickstart?)",
    "train nowhere.yaml": "nowhere.yaml: no such recipe file",
    "train quickstart --set model.n_layers=3": "--set model.n_layers=3: model.n_layers: unknown key (did you mean n_layer?)",
    "train quickstart --stop-after soon": "--stop-after: 'soon' is not a time (like 90s, 55m or 2h)",
    "train quickstart --resume --overwrite": "--resume, --overwrite: cannot both go on and begin anew",
    "train quickstart --allow-change seed": "--allow-change: only means something with --resume",
    "train quickstart --seed -1": "invalid value for '--seed'",
    "train quickstart --device tpu": "--device: no such device 'tpu' (one of auto, cpu, cuda, mps)",
    "new": "missing argument 'source'",
    "new nowhere.txt": "nowhere.txt: no such file or folder",
    "new -": "-: standard input cannot be read again for training (save it in a file and name that)",
    "new text.txt --minutes 0": "--minutes: must be above 0, not 0",
    "new text.txt --out text.txt": "text.txt: is already there (--overwrite replaces it)",
    "new text.txt --devices 2": "--devices: only means something with --hardware",
    "new text.txt --hardware h100-smx": "did you mean h100-sxm?",
    "new text.txt": "text.txt: 4,500 bytes are too few to learn from (use more text)",
    "plan": "missing argument 'recipe'",
    "plan quickstart --set training.micro_batch_size=3": "training.micro_batch_size: 3 does not divide global_batch_size",
    "plan quickstart --hardware abacus": "--hardware: there is no data sheet for 'abacus' (known: b200, h200,",
    "plan quickstart --hardware h100-smx": "did you mean h100-sxm?",
    "plan quickstart --devices 2": "--devices: only means something with --hardware",
    "sample": "no run under runs/ yet (train one with `tinylm train quickstart`, or name one with --run)",
    "sample -n 0": "invalid value for '-n'",
    "sample --run nowhere": "nowhere: no such run (`tinylm runs` lists those here)",
    "eval --threads 0": "invalid value for '--threads'",
    "eval --errors perhaps": "--errors: must be strict or replace, not 'perhaps'",
    "eval --harness": "--harness: names no task (like `tinylm eval --harness my_task.yaml`)",
    "eval --harness nowhere.yaml": "nowhere.yaml: no such task file",
    "eval --harness piqa --context 8": "--context: means nothing with --harness",
    "eval --limit 3": "--limit: only means something with --harness",
    "export --to hf": "missing argument 'path'",
    "export out": "missing option '--to'",
    "export out --to hff": "--to: must be hf, gguf or onnx, not 'hff' (did you mean hf?)",
    "export out --to hf --type f16": "--type: only means something with --to gguf",
    "export out --to gguf --type q8": "--type: must be f32, f16, q8_0 or q4_0, not 'q8' (did you mean q8_0?)",
    "export out --to gguf": "no run under runs/ yet",
    "import nowhere --out run": "nowhere: no such file or folder",
    "import text.txt": "missing option '--out'",
    "runs nowhere": "nowhere: no such folder",
    "recipes quikstart": "quikstart: no recipe of that name ships (did you mean quickstart?)",
    "tokenize trian": "no such command 'trian'",
    "tokenize encode nowhere.txt": "no run under runs/ yet",
    "tokenize encode - -t nowhere.json": "nowhere.json: no such tokenizer file",
    "tokenize encode - -t x --format hex": "--format: must be ids, tokens or jsonl, not 'hex'",
    "tokenize train nowhere.txt --out t.json": "nowhere.txt: no such file or folder",
    "tokenize train nowhere.txt --out t.json --kind wordpice": "not 'wordpice' (did you mean wordpiece?)",
    "tokenize train nowhere.txt --out t.json --vocab-size 9": "--vocab-size: bpe needs at least 257",
    "tokenize train nowhere.txt --out t.json --kind char --vocab-size 9": "--vocab-size: only kinds bpe, unigram, wordpiece,",
    "tokenize train nowhere.txt --out t.json --kind word --dropout 9": "no such option",
    "tokenize train nowhere.txt --out t.json --normalize nfx": "--normalize: must be none or some of nfc, nfd,",
    "tokenize compare nowhere.json --on nowhere.txt": "nowhere.json: no such tokenizer file",
    "tokenize sweep nowhere.txt --sizes 5,x": "--sizes: must be numbers with commas between them",
    "tokenize add abc -t nowhere.json --out t.json": "nowhere.json: no such tokenizer file",
    "embed nearst": "no such command 'nearst'",
    "embed train": "missing argument 'source'",
    "embed train nowhere.txt": "SOURCE: nowhere.txt: no such file or folder",
    "embed train text.txt --method glow": "--method: must be one of skipgram, cbow, glove, not 'glow' (did you mean glove?)",
    "embed train text.txt --window 0": "--window: must be a whole number of at least 1, not 0",
    "embed train text.txt --method glove --negatives 3": "--negatives: unknown key",
    "embed train text.txt --set method.lr_end=1": "--set method.lr_end=1: method.lr_end: 1 is above lr: the rate falls",
    "embed train text.txt --tokenizer t.json --keep-case": "--keep-case: only means something for words",
    "embed train text.txt --resume --overwrite": "--resume, --overwrite: cannot both go on and begin anew",
    "embed train text.txt --stop-after soon": "--stop-after: 'soon' is not a time",
    "train vectors.yaml --dry-run": "--dry-run: means nothing for embeddings",
    "train vectors.yaml --workers 2": "--workers: means nothing for embeddings",
    "train vectors.yaml --device cuda": "--device: means nothing for embeddings",
    "train vectors.yaml --resume --overwrite": "--resume, --overwrite: cannot both go on and begin anew",
    "plan vectors.yaml": "vectors.yaml: for embeddings, not for a language model",
    "embed nearest king": "no vectors under embeddings/ yet (`tinylm embed train SOURCE` makes some, --vectors names others)",
    "embed nearest king -v nowhere": "nowhere: no such file",
    "embed nearest king -v text.txt": "text.txt:1: holds something that is not a number",
    "embed nearest king -v three.txt": "no vector for 'king' among 3",
    "embed analogy a b -v three.txt": "the command line: an analogy takes three words, not 2",
    "embed analogy a b c --method cosine": "--method: must be 3cosadd or 3cosmul, not 'cosine'",
    "embed similarity a -v three.txt": "similarity takes two words, not 1",
    "embed odd-one-out a b -v three.txt": "needs at least three words, or none is odd",
    "embed eval nowhere.txt -v three.txt": "nowhere.txt: No such file or directory",
    "embed export three.txt -v three.txt": "three.txt: exists already (--overwrite replaces it)",
    "embed export out.dat -v three.txt": "out.dat: names no format",
    "embed import three.txt --out out.bin": "--out: must end in .safetensors",
    "embed plot map.gif -v three.txt": "map.gif: must end in .html, .png, .svg, .pdf",
    "embed plot map.html -v three.txt --projection tsna": "--projection: must be pca, umap, tsne, not 'tsna' (did you mean tsne?)",
    "embed from-run --out v.safetensors --which inputs": "--which: must be input, output or contextual, not 'inputs'",
    "embed from-run --out v.safetensors --which contextual": "needs a SOURCE whose tokens stand in a context",
    "embed from-run --out v.safetensors --layer 1": "--layer: only means something with --which contextual",
    "embed from-run --out v.safetensors --run nowhere": "nowhere: no such run",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str, bool]]:
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
    spy = [sys.executable, "-c", SPY, json.dumps(commands)]
    done = subprocess.run(spy, cwd=folder, capture_output=True, text=True, env=environment(), timeout=120, check=True)
    assert sorted(folder.iterdir()) == before, "nothing that failed left anything behind"
    return {" ".join(command): tuple(answer) for command, answer in zip(commands, json.loads(done.stdout), strict=True)}


def test_nothing_loads_torch(answers: dict[str, tuple[int, str, str, bool]]) -> None:
    assert [command for command, answer in answers.items() if answer[3]] == []


@pytest.mark.parametrize("command", [" ".join(command) for command in HELP if command and command not in (["tokenize"], ["embed"])])
def test_help_is_an_answer(answers: dict[str, tuple[int, str, str, bool]], command: str) -> None:
    code, out, err, _ = answers[command]
    assert (code, err) == (0, "")
    assert "tinylm" in out


def test_help_lists_every_verb(answers: dict[str, tuple[int, str, str, bool]]) -> None:
    assert all(f" {verb} " in answers["--help"][1] for verb in VERBS)


@pytest.mark.parametrize("command", ["", "tokenize", "embed"])
def test_without_a_verb_help_is_no_answer(answers: dict[str, tuple[int, str, str, bool]], command: str) -> None:
    code, out, err, _ = answers[command]
    assert (code, out) == (2, "")
    assert "Usage" in err


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(answers: dict[str, tuple[int, str, str, bool]], command: str) -> None:
    code, out, err, _ = answers[command]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert MISTAKES[command] in err


def test_a_plan_is_made_without_torch(answers: dict[str, tuple[int, str, str, bool]]) -> None:
    code, out, _, _ = answers["plan recipe.yaml --json"]
    assert code == 0
    assert json.loads(out)["steps"] == 5
    code, out, _, _ = answers["plan recipe.yaml --hardware l4"]
    assert (code, "time on 1 l4" in out) == (0, True)


def test_no_runs_is_an_empty_list(answers: dict[str, tuple[int, str, str, bool]]) -> None:
    assert answers["runs --json"][:3] == (0, "[]\n", "")


def test_completion_knows_verbs_and_their_options() -> None:
    for words, expected in (("tinylm tok", "tokenize"), ("tinylm train --dry", "--dry-run"), ("tinylm tokenize enc", "encode")):
        wanted = {"_TINYLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        code = "import sys; sys.argv = ['tinylm']; from tinylm_cli.app import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**environment(), **wanted})
        assert done.stdout.split() == [expected]
