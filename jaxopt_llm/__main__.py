"""`python -m jaxopt_llm` is the console script `jaxopt-llm`."""

import sys

from jaxopt_llm.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
