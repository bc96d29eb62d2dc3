import apex

model, optimizer = apex.amp.initialize(model, optimizer, opt_level="O2")
