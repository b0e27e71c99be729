"""Types and ranges of settings, YAML files, and names that stand for objects."""
