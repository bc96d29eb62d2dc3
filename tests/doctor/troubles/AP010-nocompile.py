import torch
from torchao.float8 import convert_to_float8_training

model = build().to("cuda")
convert_to_float8_training(model)
for batch in loader:
    model(**batch).loss.backward()
    optimizer.step()
