from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

model = AutoModelForCausalLM.from_pretrained("org/model")
SFTTrainer(model=model, args=SFTConfig(output_dir="out", bf16=True, learning_rate=1e-5), train_dataset=data).train()
