"""Models as TOML files with their structure as JSON, one of each a model; `docs/models.md`."""
