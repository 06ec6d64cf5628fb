"""The command line: one small module per command. Results on stdout, progress and logs on stderr."""
