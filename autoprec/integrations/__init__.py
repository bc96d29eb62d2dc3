"""Plans inside other libraries' training; each file is imported by name, because each needs its library."""
