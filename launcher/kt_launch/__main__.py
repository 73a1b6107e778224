"""The command kt-launch, also as python -m kt_launch: Ctrl-C during its imports ends it as it does later."""

import sys

INTERRUPTED = 130
"""Repeated from kt_model.errors, which may be the module being imported."""


def main() -> int:
    """The console script."""
    try:
        from kt_launch.cli import main as launch

        return launch()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
