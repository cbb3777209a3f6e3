"""`python -m llm_distill`, and `accelerate launch -m llm_distill`."""

import sys

from llm_distill.cli import main

if __name__ == "__main__":
    sys.exit(main())
