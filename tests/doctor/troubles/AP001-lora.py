import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

half = torch.float16
model = AutoModelForCausalLM.from_pretrained("org/model", dtype=half).cuda()
trainer = Trainer(model=model, args=TrainingArguments("out", fp16=True, learning_rate=1e-5))
trainer.train()
