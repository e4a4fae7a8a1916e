"""The command line, one module for each group of commands.

A module is imported when one of its commands is called, so that ``mmtrain --help`` is quick. What a command does
belongs in the layers below; here are its arguments, what it prints, and its exit status.
"""

from mmtrain.cli.app import main, run_app

__all__ = ["main", "run_app"]
