"""What is said when an experiment of a run begins."""

from __future__ import annotations

STAGES = {
    "effects": "Verify what the model does without the causes that were found, beside controls",
    "sensitivity": "Sensitivity the same measurement under other inputs, lengths and precisions",
    "visual_effects": "Removal found visual tokens taken out, against as many others of their pictures",
    "visual_exit": "Exit the picture leaves at every layer in turn",
    "visual_horizon": "Horizon one window of the picture is left, from every layer on",
}
"""By experiment: a word, then what it does."""
