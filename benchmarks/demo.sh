#!/usr/bin/env bash
# A newcomer's first minutes: clone, `make demo`, samples. Prints the seconds of the whole, of the training, and the numbers.
# Usage: bash benchmarks/demo.sh    (clones this checkout into a temporary folder; needs the network for the installation)
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
echo "from clone to samples: $(($(date +%s) - start)) s"
.venv/bin/python - <<'PYTHON'
import json
lines = [json.loads(line) for line in open("runs/quickstart/metrics.jsonl")]
print(f"training: {lines[-1]['seconds']:.0f} s up to its last evaluation, {lines[-1]['val_bits_per_byte']:.4f} bits per byte held out")
PYTHON
