import lightning as L

trainer = L.Trainer(precision="bf16-true", max_epochs=3)
trainer.fit(module, loader)
