import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

model = AutoModelForCausalLM.from_pretrained("org/model", dtype=torch.bfloat16)
Trainer(model=model, args=TrainingArguments("out", bf16=True, learning_rate=1e-5)).train()
