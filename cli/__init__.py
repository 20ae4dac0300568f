"""The tinylm command line. Each command's module parses options, calls the library, and prints the result."""
