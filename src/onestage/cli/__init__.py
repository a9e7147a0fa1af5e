"""The command line."""

from onestage.cli.main import main as main
