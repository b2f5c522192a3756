"""`python -m thinet` is the same as `thinet`."""

from thinet.cli import main

main()
