"""Entry point for `python -m tinylm`, which also works under torchrun."""

from tinylm_cli.app import main

if __name__ == "__main__":
    main()
