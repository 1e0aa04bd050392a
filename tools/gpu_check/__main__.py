"""Entry point of tools/gpu_check.sh."""

import sys

from gpu_check.command import main

sys.exit(main(sys.argv[1:]))
