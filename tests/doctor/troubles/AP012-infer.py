import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("org/model", torch_dtype=torch.float32).cuda().eval()
with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
    print(model.generate(ids))
