"""`python -m sinklens`."""

from sinklens.cli.main import run

run()
