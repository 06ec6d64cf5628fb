"""What every room of the house may use: errors, the registry, axis names, the manifest. Imports nothing of sinklens."""
