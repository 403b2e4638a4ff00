"""The launcher of this process, noted before anything else is imported.

torchrun may be killed while its ranks still import torch, which takes seconds, and nothing notifies them. This module
imports nothing else, so that importing it takes no time.
"""

import os

LAUNCHER_PID = os.getppid()
"""Process id of the launcher: this process's parent when it began. A different parent later means that it has died."""
