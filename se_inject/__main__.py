"""``python -m se_inject`` runs the command line if the script is not on the PATH."""

from se_inject.cli.app import main

main()
