"""Where the ``lte`` command begins: so light that an interrupt is answered while everything else is imported."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is one line and exit code 130 whenever it comes."""
    try:
        from lte.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
