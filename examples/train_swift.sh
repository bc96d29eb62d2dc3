#!/usr/bin/env bash
# Fine-tune with ms-swift and a plan in force: ./train_swift.sh MODEL plan.json DATASET
# Not run here: ms-swift wants an older Transformers. The plugin's names were checked against ms-swift 4.6.0.
set -euo pipefail
model=$1 plan=$2 dataset=$3
autoprec export "$plan" --to swift --out planned_swift.py
# the flags that go with the plan stand in the plugin's first lines
flags=$(grep -oE -- '--bf16 (true|false) --fp16 (true|false)' planned_swift.py)
# shellcheck disable=SC2086
swift sft --model "$model" --dataset "$dataset" --torch_dtype float32 $flags --external_plugins planned_swift.py \
    --output_dir trained
