#!/usr/bin/env bash
# Measure training speed, decoding speed and memory use on one GPU in at most 9 minutes, most valuable measurements first.
#
#     bash benchmarks/gpu_session.sh [--out FOLDER] [--device cuda|cpu] [--tiny] [--only "PART ..."] [--seconds N]
#
# Each part has its own time limit and writes FOLDER/PART.log; the end of each log is also printed. A part that fails does not stop
# the others, but the exit code is then 1. The script uses the Python in $PYTHON (default: python3), which needs tinylm's
# dependencies; tinylm itself is imported from this checkout. The training text is generated. `--device cpu --tiny` is a dry run. It
# runs all parts in forks of one process, because importing torch takes longer than most of them.
set -u
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-python3} out=gpu-session device=cuda tiny="" total=540
parts="facts cudnn training tests trainer sample serve memory decoding evaluation optimizers small small-graph"
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

[ "$device" = cpu ] && [ -n "$tiny" ] && coproc warm { exec "$python" benchmarks/forked.py; }

# run LIMIT LOG ARGUMENTS...: run Python with a time limit. The exit code is 124 if it takes longer.
run() {
    local limit=$1 log=$2 code
    shift 2
    if [ -z "${warm_PID-}" ]; then
        timeout "$limit" "$python" "$@" >"$log" 2>&1
        return
    fi
    printf '%s\0' $# "$limit" "$log" "$@" >&"${warm[1]}"
    read -r code <&"${warm[0]}" && return "$code"
}

# part NAME SECONDS ARGUMENTS...: run Python with a time limit and a log, if the part is selected and there is time left.
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
    run "$limit" "$out/$name.log" "$@"
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
import re, runpy, sys, torch
from tinylm.cost.accelerators import from_device_name
log, plan = sys.argv[1], sys.argv[2:]
if torch.cuda.is_available():
    sheet = from_device_name(torch.cuda.get_device_name())
    plan += [] if sheet is None else ["--hardware", sheet.name]
print("measured:", *re.findall("peak memory.*|MFU.*", open(log).read())[-1:])
print("planned:", flush=True)
sys.argv = ["tinylm", "plan", *plan]
runpy.run_module("tinylm", run_name="__main__")
'

if [ -n "$tiny" ]; then
    step=(--tiny --no-compile --variants plain checkpointing) lines=2000
    load=(--clients 4 --requests 1 --tokens 8 --no-compile) evaluation=(--tiny)
    recipe=(--set model.n_layer=2 --set model.n_head=2 --set model.n_embd=32 --set model.context_length=32
        --set tokenizer.vocab_size=300 --set training.global_batch_size=8 --set training.precision=fp32
        --set training.compile=off --set training.tokens=2560 --set training.schedule.warmup=2
        --set training.log_every=5 --set evaluation.every=5 --set evaluation.max_tokens=500)
else
    step=(--batch 64 --variants plain compiled "compiled together" "compiled, plain loss" checkpointing) lines=400000
    load=(--tokens 64) evaluation=(--batch 64)
    recipe=(--set training.tokens=15728640 --set training.schedule.warmup=5
        --set training.log_every=5 --set evaluation.every=15 --set evaluation.max_tokens=200_000)
fi
recipe=(gpt2-124m "${recipe[@]}" --set "data.train=$work/text.txt" --set data.heldout.share=0.02 --set data.heldout.by=tail
    --set sampling.every=null)
workers=()
if [ "$device" = cuda ]; then
    nvidia-smi -L
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
fi

part facts 30 -c "$facts" "$device"
part cudnn 30 -c "$cudnn" "$device"
part training 150 benchmarks/gpu.py --device "$device" --parts training --precisions bf16 "${step[@]}"
[ "$device" = cuda ] && part tests 130 -m pytest -q "${workers[@]}" -p no:cacheprovider tests/test_gpu.py
"$python" -c "$text" "$work/text.txt" "$lines"
part trainer 120 -m tinylm train "${recipe[@]}" --device "$device" --out "$work/run"
cp "$work/run/metrics.jsonl" "$out/" 2>/dev/null
part sample 40 -m tinylm sample --run "$work/run" --device "$device" --prompt the --max-new-tokens 100
part serve 60 benchmarks/serving.py --run "$work/run" --device "$device" "${load[@]}"
part memory 40 -c "$memory" "$out/trainer.log" "${recipe[@]}"
part decoding 120 benchmarks/gpu.py --device "$device" --parts decoding ${tiny:+--tiny}
part evaluation 40 benchmarks/gpu.py --device "$device" --parts evaluation "${evaluation[@]}"
part optimizers 60 benchmarks/gpu.py --device "$device" --parts optimizers ${tiny:+--tiny}
if [ "$device" = cuda ]; then # a small model, whose speed depends on the time to launch kernels
    small=(--set model.n_layer=6 --set model.n_head=6 --set model.n_embd=384 --set model.context_length=256
        --set training.global_batch_size=64 --set training.tokens=5242880)
    part small 45 -m tinylm train "${recipe[@]}" "${small[@]}" --set training.compile=on --device cuda --out "$work/small"
    part small-graph 45 -m tinylm train "${recipe[@]}" "${small[@]}" --set training.compile=graph --device cuda --out "$work/small-graph"
fi
[ -n "${warm_PID-}" ] && pid=$warm_PID && exec {warm[1]}>&- && wait "$pid"
echo "== end, at $SECONDS s; logs in $out"
exit $failed
