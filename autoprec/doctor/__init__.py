"""The doctor: troubles people have with number formats, found in models, settings, scripts, logs and runs."""
