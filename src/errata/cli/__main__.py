"""`python -m errata.cli` is `errata`."""

from errata.cli.main import main

if __name__ == "__main__":
    main(prog_name="errata")
