"""`python -m autoprec` is the command `autoprec`."""

from autoprec.cli.main import main

if __name__ == "__main__":
    main()
