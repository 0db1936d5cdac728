"""Run the command line: python -m mmquant."""

from mmquant.commands.cli import main

main()
