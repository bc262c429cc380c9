"""``python -m ldistill`` is the ``ldistill`` command."""

from ldistill.cli import main

if __name__ == "__main__":
    main()
