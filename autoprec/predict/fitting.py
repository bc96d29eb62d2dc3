"""The largest micro-batch that fits a device."""
