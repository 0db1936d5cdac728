"""python -m mmquant."""

from mmquant.cli import main

main()
