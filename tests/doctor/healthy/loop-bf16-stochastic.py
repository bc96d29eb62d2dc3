import torch
from torchao.optim import _AdamW

model = build().to(dtype=torch.bfloat16, device="cuda")
optimizer = _AdamW(model.parameters(), lr=1e-4, bf16_stochastic_round=True)
for batch in loader:
    loss = model(batch).float().mean()
    loss.backward()
    optimizer.step()
