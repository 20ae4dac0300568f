"""The recipes that ship with tinylm. `tinylm recipes` lists them."""
