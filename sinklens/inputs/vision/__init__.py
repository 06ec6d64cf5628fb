"""Pictures as prompts: read, put through the model's processor, and laid out token by token."""

from .documents import holds_pictures as holds_pictures
from .encode import require_vision as require_vision
from .load import load_pictures as load_pictures
