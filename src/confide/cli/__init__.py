"""The command line: presentation only, a module a command."""
