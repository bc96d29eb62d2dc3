"""Devices as TOML files, one a device: peaks with their sources."""
