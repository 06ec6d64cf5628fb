"""What a model is: its names, its files, its parts by role."""
