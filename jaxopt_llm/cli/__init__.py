"""The command line: one thin module a command; `main` runs them, `flags` and `show` are what they share."""
