"""The version of mmtrain. This module imports nothing, so that light commands can read the version quickly."""

__version__ = "0.1.0"
