"""`python -m sae_lens_e2e.cli`."""

import sys

from sae_lens_e2e.cli import main

sys.exit(main())
