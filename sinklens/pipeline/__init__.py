"""The one place that knows the order: open, read prompts, check, trace, analyze, judge, save."""
