"""The command kt-launch, also as python -m kt_launch: Ctrl-C while it is still loading ends it as it does later."""

import sys

INTERRUPTED = 130
"""kt_model.errors has it too, but that may be what was being loaded."""


def main() -> int:
    """The console script."""
    try:
        from kt_launch.cli import main as launch

        return launch()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
