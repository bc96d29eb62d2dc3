"""Search spaces as TOML files, one a space; shipped as `autoprec.search_spaces`."""
