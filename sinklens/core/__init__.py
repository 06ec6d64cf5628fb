"""What every room of the house may use: errors, the registry, figures as data, the manifest.

Imports nothing of sinklens outside itself.
"""
