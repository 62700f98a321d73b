"""`python -m layerwise` is the command `layerwise`."""

import sys

try:
    from layerwise.cli.main import main
except KeyboardInterrupt:  # before anything has begun
    print("layerwise: stopped.", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
