#!/usr/bin/env bash
# Clone this checkout into a temporary folder and run `make demo`, as a new user would. Print the total time, the training time and
# the held-out bits per byte. Network access is needed to install the dependencies.
# Usage: bash benchmarks/demo.sh
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export TINYLM_CACHE="$folder/cache"
start=$(date +%s)
git clone --quiet "$source" "$folder/tinylm"
cd "$folder/tinylm"
make demo
echo
echo "total time, from cloning to samples: $(($(date +%s) - start)) s"
.venv/bin/python - <<'PYTHON'
import json
lines = [json.loads(line) for line in open("runs/quickstart/metrics.jsonl")]
print(f"training: {lines[-1]['seconds']:.0f} s until the last evaluation, {lines[-1]['val_bits_per_byte']:.4f} held-out bits per byte")
PYTHON
