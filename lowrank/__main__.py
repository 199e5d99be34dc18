"""`python -m lowrank`."""

from lowrank.cli.main import main

main()
