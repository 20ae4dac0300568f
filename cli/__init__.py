"""The command line of tinylm: parses, calls the library, shows the answer."""
