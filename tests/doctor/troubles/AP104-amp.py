from torch.cuda import amp

with amp.autocast(dtype=torch.bfloat16):
    loss = model(x)
