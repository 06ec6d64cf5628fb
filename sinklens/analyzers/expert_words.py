"""Units and plain names of what the Super-Expert analyzer reports."""

UNITS = {
    "abs_max": "abs-max of the down_proj output before the routing weight",
    "value": "the same, signed",
    "share_of_sink_token": "share of prompts that route the token at this position to this expert",
    "routing_weight": "mean routing weight there",
    "sink_share_change": "change of the sink's share of attention without this expert alone",
    "sink_lost": "drop of the sink's share without it / its share beyond even attention (1: down to even attention)",
    "predictions_change": "KL of the predictions without it, nats per token",
}


LABELS = {
    "abs_max": "largest output",
    "value": "the same, with its sign",
    "share_of_sink_token": "prompts that send the token here",
    "routing_weight": "routing weight there",
    "n_prompts": "prompts with tokens for it",
    "routed_tokens": "tokens sent to it",
    "rank": "rank by size",
    "sink_share_change": "change of the sink's share without it",
    "sink_lost": "sink lost without it",
    "predictions_change": "change of the predictions without it",
    "without_it": "what its removal shows",
    "threshold_percentile": "limit by percentile",
    "threshold_fraction": "limit by fraction of the largest",
    "threshold_floor": "limit by the median expert",
    "percentile_used": "percentile rule in force",
    "experts_seen": "experts that received tokens",
    "projections_compared": "projections compared",
    "largest": "ten largest outputs",
    "median": "median output",
    "n_found": "Super Experts",
    "causal_ranking": "experts by effect on the sink",
    "sink_rate_with_all": "sink rate with all experts",
    "share_with_all": "sink share with all experts",
    "sink_rate_without_them": "sink rate without the Super Experts",
    "share_without_them": "sink share without the Super Experts",
    "sink_rate_without_others": "sink rate without as many others",
    "share_without_others": "sink share without as many others",
}
