"""`python -m fid`: score a set of generated images against real ones and write a report."""

from fid.cli import cli

if __name__ == "__main__":
    cli()
