"""``python -m mmtrain`` is ``mmtrain``."""

from mmtrain.cli import main

if __name__ == "__main__":
    main()
