"""JSON Schemas of the files that other programs read."""
