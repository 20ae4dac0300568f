"""`python -m tinylm`, also under torchrun: the command line."""

from tinylm_cli.app import main

if __name__ == "__main__":
    main()
