"""Launcher for a checkout: `python cli.py search demo` does what the installed `autoprec search demo` does."""

from autoprec.cli.main import main

if __name__ == "__main__":
    main()
