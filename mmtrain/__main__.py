"""Entry point of ``python -m mmtrain``, which is the same as ``mmtrain``."""

from mmtrain.cli import main

if __name__ == "__main__":
    main()
