"""Vision transformers under supermasks: train, evaluate, benchmark; see `blockshock.vision`."""

import sys

from blockshock.vision.command import main

if __name__ == "__main__":
    sys.exit(main())
