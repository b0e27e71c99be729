"""Settings: types and ranges, YAML files, merging, and names that mean objects."""
