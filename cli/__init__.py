"""The tinylm command line. The module of each command parses its options, calls the library, and prints the result."""
