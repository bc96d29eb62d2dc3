import torch

with torch.autocast("cuda", dtype=torch.bfloat16):
    loss = model(**batch).loss
    loss.backward()
