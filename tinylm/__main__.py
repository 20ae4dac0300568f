"""Run the command line with `python -m tinylm`, also under torchrun."""

from tinylm_cli.app import main

if __name__ == "__main__":
    main()
