"""Tracing a model whose blocks are read from disk: block by block, all prompts through each."""

from .kept import take_up as take_up
from .steps import InStep as InStep
from .sweep import trace_streamed as trace_streamed
