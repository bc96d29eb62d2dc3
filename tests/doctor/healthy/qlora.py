import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained("org/model", quantization_config=quant, dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=16))
args = TrainingArguments("out", bf16=True, learning_rate=1e-4)
