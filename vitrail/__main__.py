"""`python -m vitrail`, and `torchrun -m vitrail train ...`."""

from vitrail.cli.main import entry

if __name__ == "__main__":
    entry()
