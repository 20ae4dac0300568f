"""The command line of tinylm. The module of a command parses its options, calls the library and prints the result."""
