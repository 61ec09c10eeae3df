"""A reader that worker processes can import, and that one file kills."""

import os
import signal


class StruckReader:
    """Ends the process that reads a certain file as the OOM killer does; that which made the reader is spared."""

    def __init__(self, reader, name):
        self.reader, self.name, self.maker = reader, name, os.getpid()

    def read(self, item):
        if item.name == self.name and os.getpid() != self.maker:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.reader.read(item)
