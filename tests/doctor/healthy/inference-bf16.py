import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B", dtype=torch.bfloat16, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-8B")
ids = tokenizer("Hello!!!!", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**ids)[0]))
