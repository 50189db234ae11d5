"""`python -m fsdfm` is `fsdfm`."""

import sys

from fsdfm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
