"""``python -m lte.lm_eval``: the command line of lm-evaluation-harness, which has no plug-ins, with ``lte`` known."""

import sys

from lte.errors import LTEError


def main() -> None:
    """Entry point: a user's error is one line on stderr and exit code 2, as in ``lte``."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import lte.lm_eval  # noqa: F401 - registers

        cli_evaluate()
    except LTEError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
