"""What a change of a model does: paired over prompts, on the sink and on the predictions."""
