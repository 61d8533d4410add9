"""`python -m sae_lens_e2e`, which torchrun can start in several processes."""

import sys

from sae_lens_e2e.cli import main

sys.exit(main())
