from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5ForConditionalGeneration

model = T5ForConditionalGeneration.from_pretrained("google/flan-t5-large", dtype="float32")
Seq2SeqTrainer(model=model, args=Seq2SeqTrainingArguments("out", fp16=True)).train()
