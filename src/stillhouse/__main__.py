"""`python -m stillhouse`: the command, for launchers such as torchrun."""

from stillhouse.cli import main

main()
