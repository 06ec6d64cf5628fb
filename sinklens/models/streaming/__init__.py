"""Models larger than memory: their blocks are read from disk when they run."""

from .blocks import BUDGET as BUDGET
from .blocks import SHELL as SHELL
from .blocks import Sizes as Sizes
from .blocks import StreamedBlocks as StreamedBlocks
from .blocks import Walk as Walk
from .blocks import walking as walking
from .opening import open_streamed as open_streamed
from .sampling import sampled as sampled
from .sampling import samples as samples
