#!/bin/bash
#SBATCH --gres=gpu:8
export OMP_NUM_THREADS=8
# --fp16_opt_level O1 is gone since we moved off Apex
accelerate launch --mixed_precision bf16 --num_processes 8 train.py \
  --model_name_or_path org/model --torch_dtype float32 \
  --bf16 True --fp16 False --learning_rate 2e-5 --eval_strategy steps
