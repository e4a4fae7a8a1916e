"""The command line, with one module for each group of commands.

A module is imported only when one of its commands is called, which keeps ``mmtrain --help`` fast. These modules define
the arguments, the printed output and the exit status. The work itself belongs in the layers below.
"""

from mmtrain.cli.app import main, run_app

__all__ = ["main", "run_app"]
