import torch
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

model = build().to("cuda")
convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("tensorwise"))
model = torch.compile(model)
for batch in loader:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
