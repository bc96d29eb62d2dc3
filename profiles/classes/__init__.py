"""What transformers builds of widely used classes, sizes left open; `docs/models.md`."""
