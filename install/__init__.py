"""What `make` does before quantkit is installed; standard library only."""
