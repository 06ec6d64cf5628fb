"""Recording: which signals exist, the taps that see them in a running model, and the Trace they become."""
