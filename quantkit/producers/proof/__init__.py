"""What is proved of a variant when it is made, against the source's own files."""
