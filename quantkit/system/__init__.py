"""What knows nothing of the field: files, memory, progress."""
