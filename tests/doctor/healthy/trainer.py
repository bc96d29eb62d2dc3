"""Full fine-tuning in BF16 autocast over FP32 weights; avoids 'Attempting to unscale FP16 gradients'."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

tokenizer = AutoTokenizer.from_pretrained("org/model")
model = AutoModelForCausalLM.from_pretrained("org/model", dtype=torch.float32, attn_implementation="sdpa")
args = TrainingArguments("out", bf16=True, eval_strategy="steps", learning_rate=2e-5, dataloader_num_workers=4)
Trainer(model=model, args=args, processing_class=tokenizer).train()
