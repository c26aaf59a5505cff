"""`python -m torchrec_turbossd.cli`."""

from torchrec_turbossd.cli import main

main()
