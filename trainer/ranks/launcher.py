"""Who started this process, noted before anything else is imported.

torchrun may be killed while its ranks still import torch, which takes seconds, and nothing tells them so. Knows nothing
else, so that importing it takes no time.
"""

import os

PARENT = os.getppid()
"""The parent of this process when it began. Another one since then means that it is gone."""
