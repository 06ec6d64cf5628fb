"""What is fed in: corpora, files, hub datasets and memory, tokenised under an explicit BOS policy."""

from .corpus import list_corpora as list_corpora
from .load import load_prompts as load_prompts
from .spec import Prompt as Prompt
from .spec import PromptSet as PromptSet
