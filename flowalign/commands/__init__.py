"""The commands of the command line: their arguments, their help, and what they call."""
