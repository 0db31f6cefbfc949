"""``python -m se_inject``: the command line, where the script is not on the PATH."""

from se_inject.cli.app import main

main()
