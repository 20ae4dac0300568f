#!/usr/bin/env bash
# Measure training speed, decoding speed and memory use on one GPU in at most 9 minutes, most valuable measurements first.
#
#     bash benchmarks/gpu_session.sh [--out FOLDER] [--device cuda|cpu] [--tiny] [--only "PART ..."] [--seconds N]
#
# Each part has its own time limit and writes FOLDER/PART.log; the end of each log is also printed. A part that fails does not stop
# the others, but the exit code is then 1. The script uses the Python in $PYTHON (default: python3), which needs tinylm's
# dependencies; tinylm itself is imported from this checkout. The training text is generated. `--device cpu --tiny` is a dry run.
set -u
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-python3} out=gpu-session device=cuda tiny="" total=540
parts="facts cudnn training tests trainer sample memory decoding evaluation optimizers"
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --only) parts=$2; shift 2 ;;
        --seconds) total=$2; shift 2 ;;
        --tiny) tiny=1; shift ;;
        *) echo "unknown option $1" >&2; exit 2 ;;
    esac
done

mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT || exit
ln -s "$PWD/cli" "$work/tinylm_cli" && ln -s "$PWD/recipes" "$work/tinylm_recipes"
export PYTHONPATH=$PWD:$work${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TINYLM_CACHE=$work/cache
failed=0

# part NAME SECONDS COMMAND...: run the command with a time limit and a log, if the part is selected and there is time left.
part() {
    local name=$1 limit=$2 code
    shift 2
    case " $parts " in *" $name "*) ;; *) return ;; esac
    [ -n "$tiny" ] && limit=$total # a dry run may share a busy CPU
    [ $((total - SECONDS)) -lt "$limit" ] && limit=$((total - SECONDS))
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left"
        failed=1
        return
    fi
    echo "== $name, at $SECONDS s"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    tail -n 30 "$out/$name.log" | cut -c 1-200
    [ $code -eq 124 ] && echo "stopped after $limit s"
    [ $code -ne 0 ] && echo "exit code $code" && failed=1
}

facts='
import platform, sys, torch
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
try:
    import triton
    print("triton", triton.__version__)
except ImportError:
    print("triton is not installed")
if sys.argv[1] == "cuda":
    properties = torch.cuda.get_device_properties(0)
    print("cuDNN", torch.backends.cudnn.version(), "|", properties.name, "|", round(properties.total_memory / 2**30, 1), "GiB")
'

# Time attention with one query: the first call for each KV length, and a second call for the last one.
cudnn='
import sys, time, torch
from torch.nn.functional import scaled_dot_product_attention
device = sys.argv[1]
def synchronize():
    if device == "cuda":
        torch.cuda.synchronize()
query = torch.randn(1, 12, 1, 64, device=device, dtype=torch.bfloat16)
for keys in (100, 101, 102, 103, 103):
    key = torch.randn(1, 12, keys, 64, device=device, dtype=torch.bfloat16)
    synchronize()
    start = time.perf_counter()
    scaled_dot_product_attention(query, key, key)
    synchronize()
    print(f"{keys} keys: {1e3 * (time.perf_counter() - start):.2f} ms")
'

# Write words of random letters, so that byte-pair encoding can build a large vocabulary.
text='
import random, sys
draw = random.Random(0)
lines, words = int(sys.argv[2]), int(sys.argv[2]) // 6
words = ["".join(draw.choices("etaoinshrdlucm", k=draw.randint(3, 9))) for _ in range(max(words, 100))]
with open(sys.argv[1], "w") as file:
    for _ in range(lines):
        print(*draw.choices(words, k=12), file=file)
'

memory='
import re, subprocess, sys, torch
from tinylm.cost.accelerators import from_device_name
log, plan = sys.argv[1], sys.argv[2:]
if torch.cuda.is_available():
    sheet = from_device_name(torch.cuda.get_device_name())
    plan += [] if sheet is None else ["--hardware", sheet.name]
print("measured:", *re.findall("peak memory.*|MFU.*", open(log).read())[-1:])
print("planned:", flush=True)
sys.exit(subprocess.run([sys.executable, "-m", "tinylm", "plan", *plan]).returncode)
'

if [ -n "$tiny" ]; then
    step=(--tiny --no-compile) lines=2000
    recipe=(--set model.n_layer=2 --set model.n_head=2 --set model.n_embd=32 --set model.context_length=32
        --set tokenizer.vocab_size=300 --set training.global_batch_size=8 --set training.precision=fp32
        --set training.compile=off --set training.tokens=2560 --set training.schedule.warmup=2
        --set training.log_every=5 --set evaluation.every=5 --set evaluation.max_tokens=500)
else
    step=(--batch 64 --variants plain compiled "compiled together" "compiled, plain loss" checkpointing) lines=400000
    recipe=(--set training.tokens=15728640 --set training.schedule.warmup=5
        --set training.log_every=5 --set evaluation.every=15 --set evaluation.max_tokens=200_000)
fi
recipe=(gpt2-124m "${recipe[@]}" --set "data.train=$work/text.txt" --set data.heldout.share=0.02 --set data.heldout.by=tail
    --set sampling.every=null)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)

[ "$device" = cuda ] && nvidia-smi -L
part facts 30 "$python" -c "$facts" "$device"
part cudnn 30 "$python" -c "$cudnn" "$device"
part training 150 "$python" benchmarks/gpu.py --device "$device" --parts training --precisions bf16 "${step[@]}"
[ "$device" = cuda ] && part tests 130 "$python" -m pytest -q "${workers[@]}" -p no:cacheprovider tests/test_gpu.py
"$python" -c "$text" "$work/text.txt" "$lines"
part trainer 120 "$python" -m tinylm train "${recipe[@]}" --device "$device" --out "$work/run"
cp "$work/run/metrics.jsonl" "$out/" 2>/dev/null
part sample 40 "$python" -m tinylm sample --run "$work/run" --device "$device" --prompt the --max-new-tokens 100
part memory 40 "$python" -c "$memory" "$out/trainer.log" "${recipe[@]}"
part decoding 120 "$python" benchmarks/gpu.py --device "$device" --parts decoding ${tiny:+--tiny}
part evaluation 40 "$python" benchmarks/gpu.py --device "$device" --parts evaluation --batch 64 ${tiny:+--tiny}
part optimizers 60 "$python" benchmarks/gpu.py --device "$device" --parts optimizers ${tiny:+--tiny}
echo "== end, at $SECONDS s; logs in $out"
exit $failed
